"""Start from weights in a local file: what fits by name and shape, or a trunk by order and shape.

The trunk is YOLOv7-base's layer for layer, so weights of that network fit it under other names.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from shared_utils import checkpoint
from shared_utils.errors import InputError
from yolop_mtl.layer_order import TRUNK, fit, read_layers, trunk_order
from yolop_mtl.model import YOLOPv2

ANCHORS = "detection.anchors"  # these are the configuration's


class LoadReport(NamedTuple):
    """Names of tensors: loaded or missing ones of the network, unexpected ones of the file."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        """One line."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            first = f" (first {names[0]})" if names else ""
            parts.append(f"{len(names)} {what}{first}")
        return ", ".join(parts)


def load_pretrained(model: YOLOPv2, path: Path) -> LoadReport:
    """Put what fits of a file into a network, in place; anchors stay the network's own.

    Args:
        model: not folded.
        path: `.safetensors`, or a `.pt` that opens weights-only: a state dict, or a dictionary that
            holds one as `ema`, `model` or `state_dict`, such as a checkpoint of a run.

    Raises: MissingFileError; InputError for a file that is no such thing, or of which nothing fits.
    """
    tensors = read_tensors(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if name != ANCHORS}
    found = {
        name: tensors[name]
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape == tensor.shape
    }
    used = set(found)
    if not any(name.startswith(TRUNK) for name in found):
        found, used = _by_order(model, tensors)
    if not found:
        some = next(iter(tensors), "nothing")
        raise InputError(
            "model.weights",
            f"{path} of which no tensor fits (it begins with {some})",
            f"weights whose trunk is as wide and deep as that of the network ({len(own)} tensors)",
            "take another file or another model.preset",
        )
    model.load_state_dict({**model.state_dict(), **found})
    return LoadReport(
        loaded=list(found),
        missing=[name for name in own if name not in found],
        unexpected=[name for name in tensors if name not in used and name != ANCHORS],
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, in the order of layers."""
    if path.suffix == ".safetensors":
        tensors, _ = checkpoint.load_weights(path)  # its names are sorted as words
        return {name: tensors[name] for name in sorted(tensors, key=_natural)}
    state: Mapping[str, object] = checkpoint.load(path)
    for key in ("ema", "model", "state_dict"):
        inner = state.get(key)
        if isinstance(inner, Mapping):
            state = inner
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers count as numbers: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"[._]", name)]


def _by_order(model: YOLOPv2, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Trunk tensors by their place: as many convolutions from the first on as have our shapes.

    Returns: tensors by our names, and the names of the file that they have there.
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, kernel in zip(trunk_order(model), read_layers(tensors).kernels, strict=False):
        fitted = fit(model, name, kernel)
        if fitted is None:
            break
        found |= fitted
        used |= set(kernel.names)
    return found, used
