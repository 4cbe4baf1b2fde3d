"""Small networks on disk, as a user has them."""

from pathlib import Path

import torch

from yolop_mtl import build_model, model_io
from yolop_mtl.config import DataConfig, ModelConfig

from .networks import randomize

SIZE = (96, 160)
NAMES = ("car", "truck")


def save_network(
    folder: Path,
    *,
    tasks: tuple[str, ...] = ("detection", "drivable", "lane"),
    areas: str = "merged",
    is_half: bool = False,
) -> Path:
    """A nano network of random weights; returns the folder."""
    torch.manual_seed(0)
    config = ModelConfig(preset="nano", tasks=tasks)
    data = DataConfig(img_size=SIZE, area_classes=areas)
    model = build_model(
        "nano", num_classes=len(NAMES), tasks=tasks, num_drivable=3 if areas == "three" else 2
    )
    randomize(model)
    model_io.save(model, folder, config=config, data=data, class_names=NAMES, is_half=is_half)
    return folder
