"""The network as it is deployed: folded, boxes decoded, one dictionary of named outputs.

Shapes: B batch, N predictions of an image, C classes of boxes, H W size of the input.
"""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from yolop_mtl.boxes import decode
from yolop_mtl.geometry import PADDING
from yolop_mtl.heads import DetectionHead
from yolop_mtl.model import MAX_STRIDE, YOLOPv2, fuse
from yolop_mtl.model_io import AREAS, Deployed
from yolop_mtl.subpixel import to_subpixel

INPUT = "images"
FORMAT_VERSION = 1
FREE_BATCH, FREE_SIZE = 2, (64, 96)  # what is recorded where batch or size are free

OUTPUTS = {
    "boxes": "(B, N, 4) float32: x1, y1, x2, y2 in pixels of the input",
    "scores": "(B, N, C) float32: 0 to 1",
    "detection": "(B, A (5 + C), H/s, W/s) float32: raw x, y, w, h, objectness, classes per anchor",
    "drivable": "(B, areas, H, W) float32: logits, background first",
    "lane": "(B, 1, H, W) float32: logit",
}


class Shape(NamedTuple):
    """Of the input; None where it is free.

    Attributes:
        batch: number of images.
        size: (H, W) in pixels.
    """

    batch: int | None
    size: tuple[int, int] | None

    @property
    def example(self) -> tuple[int, int, int, int]:
        """What is recorded."""
        height, width = self.size or FREE_SIZE
        return self.batch or FREE_BATCH, 3, height, width

    def __str__(self) -> str:
        """As (B, 3, H, W)."""
        height, width = self.size or ("H", "W")
        return f"({self.batch or 'B'}, 3, {height}, {width})"


class Deployable(nn.Module):
    """A folded copy of a network that gives named tensors, all of them float32."""

    anchors: Tensor

    def __init__(self, model: YOLOPv2, *, is_raw: bool = False, is_half: bool = False) -> None:
        """Build.

        Args:
            model: left as it is.
            is_raw: give the box head's maps as they are, one per scale.
            is_half: weights and arithmetic of the network in 16 bits; boxes are decoded in 32.
        """
        super().__init__()
        model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        head = model.detection
        if head is not None:
            self.register_buffer("anchors", head.anchors.clone())  # in 32 bits
        fuse(model, completely=True)
        to_subpixel(model)
        self.model = model.half() if is_half else model
        self.is_raw, self.is_half = is_raw, is_half

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) float32, RGB, 0 to 1 -> outputs by name, see `OUTPUTS`."""
        raw: dict[str, Any] = self.model(images.half() if self.is_half else images)
        found: dict[str, Tensor] = {}
        if "detection" in raw:
            maps = cast(list[Tensor], raw["detection"])
            strides = cast(DetectionHead, self.model.detection).strides
            if self.is_raw:
                found |= {
                    f"detection_s{stride}": x.float()
                    for stride, x in zip(strides, maps, strict=True)
                }
            else:
                found["boxes"], found["scores"] = decode(maps, self.anchors, strides)
        return found | {task: raw[task].float() for task in ("drivable", "lane") if task in raw}


def record(graph: Deployable, shape: Shape) -> torch.export.ExportedProgram:
    """The graph, with batch and size as free as `shape` says; free sides are 64 pixels or more."""
    dims: dict[int, Any] = {}
    if shape.batch is None:
        dims[0] = torch.export.Dim("batch", min=1)
    if shape.size is None:
        # From 2 on: at 1 cell the exporter would record another graph.
        dims |= {axis: MAX_STRIDE * torch.export.Dim(f"cells{axis}", min=2) for axis in (2, 3)}
    example = torch.zeros(shape.example)
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes={INPUT: dims})


def script(graph: Deployable, shape: Shape) -> torch.jit.ScriptModule:
    """The graph as TorchScript; batch and size stay free in any case."""
    with torch.no_grad():
        traced = torch.jit.trace(graph, (torch.zeros(shape.example),), strict=False)  # a dictionary
    return cast(torch.jit.ScriptModule, traced)


def load_torchscript(path: Path) -> torch.jit.ScriptModule:
    """Open TorchScript on the CPU; it runs code that the file carries."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        return cast(torch.jit.ScriptModule, torch.jit.load(str(path), map_location="cpu"))


def describe(deployed: Deployed, names: Sequence[str], shape: Shape) -> dict[str, Any]:
    """What a user of the file has to know, as plain data; it goes into the file.

    Args:
        deployed: the network.
        names: of the outputs.
        shape: of the input.
    """
    model = deployed.model
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tasks": list(model.tasks),
        "preprocessing": {
            "img_size": list(shape.size or deployed.img_size),
            "channels": "RGB",
            "divide_by": 255,
            "padding": PADDING,
            "multiple_of": MAX_STRIDE,
        },
        "outputs": {name: OUTPUTS[name.partition("_")[0]] for name in names},
    }
    if model.detection is not None:
        facts["class_names"] = list(deployed.class_names)
        facts["anchors"] = model.detection.anchors.tolist()
        facts["strides"] = list(model.detection.strides)
    if model.drivable is not None:
        facts["drivable_names"] = list(AREAS[: model.drivable.output.conv.out_channels])
    return facts
