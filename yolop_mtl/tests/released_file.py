"""TorchScript files as the published one is made: its order of layers, names and outputs."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yolop_mtl import build_model, fuse
from yolop_mtl.blocks import CSP, SPPCSPC, Conv, Deconv
from yolop_mtl.model import YOLOPv2

from .networks import enliven

PYRAMID = ("before.0", "shortcut", "before.1", "before.2", "after.0", "after.1", "out")


class Block(nn.Module):
    """A convolution, and its norm where it is not folded."""

    def __init__(self, ours: Conv | Deconv) -> None:
        super().__init__()
        self.conv = ours.conv
        if ours.norm is not None:
            self.bn = ours.norm


class Vector(nn.Module):
    """An implicit vector."""

    def __init__(self, ours: Tensor) -> None:
        super().__init__()
        self.implicit = nn.Parameter(ours.detach()[None, :, None, None].clone())

    def forward(self) -> Tensor:
        return self.implicit


class Group(nn.Module):
    """Modules by name."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Anchors(nn.Module):
    """What the box head registers beside its layers."""

    def __init__(self, anchors: Tensor) -> None:
        super().__init__()
        strides = torch.tensor([8.0, 16.0, 32.0]).view(3, 1, 1)
        self.register_buffer("anchors", anchors / strides)
        self.register_buffer("anchor_grid", anchors.view(3, 1, 3, 1, 1, 2).clone())


class Released(nn.Module):
    """A network of ours under the names of the published file, with its outputs."""

    def __init__(self, net: YOLOPv2, *, has_sigmoid: bool = True, is_swapped: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for part in (net.backbone, net.neck):
            pyramids = [name for name, m in part.named_modules() if isinstance(m, SPPCSPC)]
            for name, module in part.named_modules():
                if isinstance(module, SPPCSPC):
                    inner = dict(module.named_modules())
                    parts = {f"cv{i}": Block(inner[x]) for i, x in enumerate(PYRAMID, 1)}
                    layers.append(Group(**parts))
                elif isinstance(module, Conv) and not any(
                    name.startswith(f"{x}.") for x in pyramids
                ):
                    layers.append(Block(module))
        head = net.detection
        detect = Anchors(head.anchors)
        detect.m = head.outputs
        if head.adds is not None:
            head.adds = nn.ModuleList(Vector(x.vector) for x in head.adds)
            head.muls = nn.ModuleList(Vector(x.vector) for x in head.muls)
            detect.ia, detect.im = head.adds, head.muls
        layers += [*(Block(conv) for conv in head.convs), detect]
        for part in (net.drivable, net.lane):
            for module in part.children():
                if isinstance(module, Conv | Deconv):
                    layers.append(Block(module))
                else:
                    layers.append(_csp(module) if isinstance(module, CSP) else module)
        if is_swapped:  # two layers of one shape, side by side
            layers[4], layers[5] = layers[5], layers[4]
        self.model = nn.Sequential(*layers)
        self.run = (net, detect)  # not registered: the layers above are theirs
        self.has_sigmoid = has_sigmoid

    def forward(self, images: Tensor) -> Any:
        net, detect = self.run
        raw = net(images)
        masks = [raw["drivable"], raw["lane"]]
        if self.has_sigmoid:
            masks = [logits.sigmoid() for logits in masks]
        return (raw["detection"], list(detect.anchor_grid.unbind(0))), *masks


def _csp(ours: CSP) -> nn.Module:
    first, second, third, last = ours.main
    middle = nn.Sequential(Group(cv1=Block(second), cv2=Block(third)))
    parts = {"cv1": Block(first), "cv2": ours.side, "cv3": last, "cv4": Block(ours.out)}
    return Group(**parts, bn=ours.norm, m=middle)


def network(preset: str = "nano", num_classes: int = 80) -> YOLOPv2:
    """With random weights, anchors of its own and another for every class."""
    torch.manual_seed(0)
    anchors = (torch.arange(18.0).view(3, 3, 2) * 8 + 8).tolist()
    net = build_model(preset, num_classes=num_classes, anchors=anchors)
    for part in (*net.detection.adds, *net.detection.muls):
        nn.init.normal_(part.vector, mean=1)
    return enliven(net)


def write_released(net: YOLOPv2, path: Path, *, is_folded: bool = True, **options: bool) -> None:
    """Write the file; `net` is left as it is."""
    net = copy.deepcopy(net)
    if is_folded:
        fuse(net)
    released = Released(net, **options).eval()
    trace(released, torch.zeros(1, 3, 64, 64), path)


def trace(module: nn.Module, example: Tensor, path: Path) -> None:
    """Write any module as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, example, strict=False, check_trace=False)
        torch.jit.save(traced, str(path))
