"""A network on disk: `model.safetensors` (weights, anchors among them) and `model.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shared_utils import checkpoint
from shared_utils.errors import InputError
from yolop_mtl.config import DataConfig, ModelConfig
from yolop_mtl.geometry import PADDING
from yolop_mtl.model import YOLOPv2, build_model

WEIGHTS, CARD = "model.safetensors", "model.json"
AREAS = ("background", "drivable", "alternative")


class Deployed(NamedTuple):
    """What is needed to use a network.

    Attributes:
        model: in eval mode, on the CPU.
        class_names: of boxes, by number.
        img_size: (H, W) of its input in pixels.
    """

    model: YOLOPv2
    class_names: tuple[str, ...]
    img_size: tuple[int, int]


def save(
    model: YOLOPv2,
    folder: Path,
    *,
    config: ModelConfig,
    data: DataConfig,
    class_names: Sequence[str],
) -> None:
    """Write what is deployed."""
    head = model.detection
    num_drivable = 3 if data.area_classes == "three" else 2
    card = {
        "format": 1,
        "model": {
            "preset": config.preset,
            "num_classes": len(class_names),
            "tasks": list(model.tasks),
            "num_drivable": num_drivable,
            "use_repconv": config.use_repconv,
            "use_attention": config.use_attention,
        },
        "class_names": list(class_names),
        "drivable_names": list(AREAS[:num_drivable]),
        "anchors": None if head is None else head.anchors.tolist(),
        "strides": None if head is None else list(head.strides),
        "preprocessing": {
            "img_size": list(data.img_size),
            "channels": "RGB",
            "divide_by": 255,
            "padding": PADDING,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_weights(model.state_dict(), folder / WEIGHTS, {"format": "pt"})
    checkpoint.write_text(json.dumps(card, indent=1) + "\n", folder / CARD)


def load(folder: Path) -> Deployed:
    """Read it back.

    Raises: MissingFileError; InputError where the files are damaged or do not belong together.
    """
    with checkpoint.reading(folder / CARD, "a model.json of yolop_mtl"):
        card: dict[str, Any] = json.loads((folder / CARD).read_text())
        described, size = dict(card["model"]), card["preprocessing"]["img_size"]
        names = tuple(card["class_names"])
    model = build_model(described.pop("preset"), **described)
    tensors, _ = checkpoint.load_weights(folder / WEIGHTS)
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [x[name].shape if name in x else None for x in (tensors, own)]
        if shapes[0] != shapes[1]:
            got, expected = ("none" if s is None else f"shape {tuple(s)}" for s in shapes)
            do = "restore the two files of one run"
            raise InputError(f"{folder / WEIGHTS} {name}", got, f"{expected}, by {CARD}", do)
    model.load_state_dict(tensors)
    return Deployed(model.eval(), names, (int(size[0]), int(size[1])))
