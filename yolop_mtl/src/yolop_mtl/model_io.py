"""A network on disk: `model.safetensors` (weights, anchors among them) and `model.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    is_half: bool = False,
) -> None:
    """Write what is deployed.

    Args:
        model: not fused, as `build_model` makes it of `config` and `data`.
        folder: made where it is not there.
        config: what it was built from.
        data: input size and classes of areas.
        class_names: of boxes, by number.
        is_half: kernels as 16-bit floats, half the bytes; vectors stay, since the statistics of
            norms may lie beyond that type's range.

    Raises: InputError where a weight is too large for 16 bits.
    """
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
    tensors = model.state_dict()
    if is_half:
        tensors = {name: _halved(name, tensor) for name, tensor in tensors.items()}
    checkpoint.save_weights(tensors, folder / WEIGHTS, {"format": "pt"})
    checkpoint.write_text(json.dumps(card, indent=1) + "\n", folder / CARD)


def _halved(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim < 4:
        return tensor
    half = tensor.half()
    if not half.isfinite().all():
        got, limit = f"{tensor.abs().max():g}", torch.finfo(torch.float16).max
        raise InputError(name, got, f"weights up to {limit:g}", "save it with is_half=False")
    return half


def load(path: Path) -> Deployed:
    """Read it back, 16-bit weights as 32-bit ones.

    Args:
        path: run folder, another folder with the two files, or the file of weights itself, with
            model.json beside it.

    Raises: MissingFileError; InputError where the files are damaged or do not belong together.
    """
    if path.is_file() and path.suffix != Path(WEIGHTS).suffix:
        got, expected = f"a file of type '{path.suffix}'", f"a run folder or {WEIGHTS}"
        raise InputError(str(path), got, expected, "turn it into one with yolop-mtl import-weights")
    weights = path if path.is_file() else path / WEIGHTS
    beside = weights.with_name(CARD)
    with checkpoint.reading(beside, "a model.json of yolop_mtl"):
        card: dict[str, Any] = json.loads(beside.read_text())
        described, size = dict(card["model"]), card["preprocessing"]["img_size"]
        names = tuple(card["class_names"])
    model = build_model(described.pop("preset"), **described)
    stored, _ = checkpoint.load_weights(weights)
    tensors = {name: x.float() if x.is_floating_point() else x for name, x in stored.items()}
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [x[name].shape if name in x else None for x in (tensors, own)]
        if shapes[0] != shapes[1]:
            got, expected = ("none" if s is None else f"shape {tuple(s)}" for s in shapes)
            do = "restore the two files of one run"
            raise InputError(f"{weights} {name}", got, f"{expected}, by {CARD}", do)
    model.load_state_dict(tensors)
    return Deployed(model.eval(), names, (int(size[0]), int(size[1])))
