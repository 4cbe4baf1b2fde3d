"""The network and its presets.

Paper: Han et al., YOLOPv2 (arXiv 2208.11434). Rebuilt from the graph of the released weights.

Differs from the release: outputs are logits everywhere; a sigmoid belongs to prediction. (Its
training passed a sigmoid into a loss that takes logits.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from shared_utils.errors import InputError, near_miss
from yolop_mtl.blocks import CSP, Conv, Deconv, RepConv
from yolop_mtl.boxes import COCO_ANCHORS
from yolop_mtl.heads import DetectionHead, DrivableHead, LaneHead, Upsample
from yolop_mtl.trunk import STRIDES, Backbone, Neck, scaled

Task = Literal["detection", "drivable", "lane"]
TASKS: tuple[Task, ...] = get_args(Task)
MAX_STRIDE = STRIDES[-1]


class YOLOPv2(nn.Module):
    """One trunk and up to three heads; what no head needs is not there.

    Attributes:
        tasks: the tasks that are on, in the order of `TASKS`.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: Neck,
        detection: DetectionHead | None = None,
        drivable: DrivableHead | None = None,
        lane: LaneHead | None = None,
    ) -> None:
        """Assemble; a task without a head is off."""
        super().__init__()
        self.backbone, self.neck = backbone, neck
        self.detection, self.drivable, self.lane = detection, drivable, lane
        self.tasks = tuple(task for task in TASKS if getattr(self, task) is not None)

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Raw outputs of the tasks that are on.

        Args:
            images: (B, 3, H, W) float, RGB, 0 to 1, no mean or deviation; H and W multiples of 32.

        Returns: `detection`: three maps (B, 3 (5 + num_classes), H/s, W/s) at s = 8, 16, 32;
            `drivable`: (B, 2, H, W), background first; `lane`: (B, 1, H, W). All logits.

        Raises: InputError for another size.
        """
        # Not while the graph is recorded: sizes are symbols there.
        is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not is_traced and not torch.compiler.is_compiling():
            check_size(images.shape)
        features = self.neck(*self.backbone(images))
        out: dict[str, Any] = {}
        if self.detection is not None:
            out["detection"] = self.detection(features.detection)
        if self.drivable is not None:
            out["drivable"] = self.drivable(features.drivable)
        if self.lane is not None:
            out["lane"] = self.lane(features.lane)
        return out


def check_size(shape: Sequence[int]) -> None:
    """Raise InputError unless the shape is that of a batch the network takes."""
    if len(shape) != 4 or shape[1] != 3:
        got = "x".join(map(str, shape))
        raise InputError("images", got, "B x 3 x H x W", "pass a batch of RGB images")
    height, width = shape[2:]
    if height % MAX_STRIDE or width % MAX_STRIDE:
        fit = " x ".join(str(max(1, round(n / MAX_STRIDE)) * MAX_STRIDE) for n in (height, width))
        raise InputError(
            "images",
            f"{height} x {width} pixels",
            f"a height and a width that are multiples of {MAX_STRIDE}",
            f"letterbox to {fit} or another such size",
        )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of a network."""

    width: float = 1.0
    depth: float = 1.0
    num_classes: int | None = None  # fixed; None: from the data


PRESETS = {
    "release": Preset(num_classes=80),
    "base": Preset(),
    "small": Preset(width=0.5, depth=0.5),
    "nano": Preset(width=0.125, depth=0.5),
}


def build_model(
    preset: str = "base",
    *,
    num_classes: int | None = None,
    tasks: Sequence[str] = TASKS,
    anchors: Sequence[Sequence[Sequence[float]]] = COCO_ANCHORS,
    num_drivable: int = 2,
    use_repconv: bool = False,
    use_attention: bool = True,
    use_deconv_bias: bool = True,
    lane_upsample: Upsample = "deconv",
) -> YOLOPv2:
    """Build a network with random weights; torch's seed decides them.

    Args:
        preset: release (as published, 80 classes), base (the same with your classes), small, nano.
        num_classes: of boxes, 1 or more; the release's are 80, and 1 is the default elsewhere.
        tasks: which of detection, drivable, lane; what only the others need is not built.
        anchors: per scale three (w, h) in pixels of the network's input.
        num_drivable: classes of the drivable head, background included.
        use_repconv: train the box head's 3x3 convolutions as `RepConv`; the released graph, being
            folded, does not tell.
        use_attention: channel attention in the lane head, which the release has.
        use_deconv_bias: a bias in the lane head's transposed convolutions beside their norm.
        lane_upsample: how the lane head doubles sizes: deconv, or nearest with a 3x3 convolution.

    Raises: InputError for an unknown preset, task or `lane_upsample`, or a number that cannot be.
    """
    if preset not in PRESETS:
        raise InputError("preset", f"'{preset}'", "a known one", near_miss(preset, PRESETS))
    sizes = PRESETS[preset]
    classes = _num_classes(preset, num_classes)
    if num_drivable < 2:
        do = "count the background too"
        raise InputError("num_drivable", num_drivable, "2 or more", do)
    on = check_tasks(tasks)

    def widths(*channels: int) -> tuple[int, ...]:
        return tuple(scaled(count, sizes.width) for count in channels)

    backbone = Backbone(width=sizes.width, num_convs=max(1, round(2 * sizes.depth)))
    neck = Neck(
        width=sizes.width,
        num_convs=max(1, round(4 * sizes.depth)),
        has_lane="lane" in on,
        has_detection="detection" in on,
    )
    detection = drivable = lane = None
    if "detection" in on:
        detection = DetectionHead(
            in_chans=neck.out_chans,
            hidden=widths(256, 512, 1024),
            strides=STRIDES,
            anchors=anchors,
            num_classes=classes,
            use_repconv=use_repconv,
        )
    if "drivable" in on:
        drivable = DrivableHead(
            in_chans=neck.f4_chans,
            widths=widths(256, 64, 32, 16),
            csp_widths=widths(128, 8),
            num_outputs=num_drivable,
        )
    if "lane" in on:
        lane = LaneHead(
            in_chans=neck.f3_chans,
            widths=widths(128, 32, 16, 8),
            csp_widths=widths(64, 8),
            attention_width=2 * neck.f3_chans if use_attention else None,
            use_deconv_bias=use_deconv_bias,
            upsample=lane_upsample,
        )
    return YOLOPv2(backbone=backbone, neck=neck, detection=detection, drivable=drivable, lane=lane)


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks in the order of `TASKS`. Raises: InputError for none or an unknown one."""
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    for name in names:
        if name not in TASKS:
            raise InputError("tasks", f"'{name}'", "known tasks", near_miss(name, TASKS))
    if not names:
        raise InputError("tasks", "none", f"one or more of {', '.join(TASKS)}", "name one")
    return tuple(task for task in TASKS if task in names)


def _num_classes(preset: str, num_classes: int | None) -> int:
    fixed = PRESETS[preset].num_classes
    count = num_classes if num_classes is not None else fixed or 1
    if count < 1:
        raise InputError("num_classes", count, "1 or more", "correct it")
    if fixed is not None and count != fixed:
        do = "leave it out, or take preset base, the same network with your classes"
        raise InputError("num_classes", f"{count} for preset {preset}", str(fixed), do)
    return count


def fuse(model: nn.Module, *, completely: bool = False) -> nn.Module:
    """Fold what inference can do without, in place; outputs in eval mode stay the same.

    Norms go into the convolutions before them, and RepConv's branches into one convolution. Call it
    in eval mode, on a copy where training is to go on: it cannot be undone.

    Args:
        model: a network or a part of one.
        completely: also the norm after the join in CSP blocks and the box head's implicit vectors,
            which the released graph keeps.

    Returns: the same model.

    Raises: InputError in training mode, whose norms use the batch.
    """
    if model.training:
        do = "call model.eval() first"
        raise InputError("model", "one in training mode", "one in eval mode", do)
    for module in list(model.modules()):
        if isinstance(module, Conv | Deconv | RepConv):
            module.fuse()
        elif completely and isinstance(module, CSP):
            module.fuse_joined()
        elif completely and isinstance(module, DetectionHead):
            module.merge_implicit()
    return model
