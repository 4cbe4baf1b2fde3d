"""Losses of the three tasks: named, unweighted, differentiable, in single precision.

Paper: Han et al., YOLOPv2 (arXiv 2208.11434): boxes as in YOLOv7, cross entropy for the drivable
area, focal and Dice for lanes. The released training log adds an IoU term for lanes.

Differs from the release: logits meet each loss once (its log shows a second sigmoid before the
drivable loss, which leaves a perfect prediction a loss of 0.503), and lane IoU is soft, so it has a
gradient. What is not labelled, 255 in masks and unknown cells, is left out.

Shapes: B images, (H, W) pixels, C classes, N predictions of an image, P positives, L scales.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, sigmoid_focal_loss

from shared_utils.errors import InputError
from yolop_mtl.assignment import Positives, find_candidates, take_all, take_cheapest
from yolop_mtl.boxes import (
    Anchors,
    Grid,
    box_overlap,
    build_grid,
    check_anchors,
    decode_boxes,
    flatten,
)
from yolop_mtl.targets import IGNORE, Targets

Assign = Literal["ota", "plain"]
Reduce = Literal["image", "batch"]
BALANCE = (4.0, 1.0, 0.4)  # of objectness at strides 8, 16, 32
SMOOTH = 1.0


class Criterion(nn.Module):
    """All terms of the tasks that the network gives outputs for.

    Terms: `loss_box`, `loss_obj`, `loss_cls`; `loss_drivable`; `loss_lane_focal`, `loss_lane_dice`,
    `loss_lane_iou`. A task with nothing labelled in the batch gives zeros, which have a gradient of
    zero, so that processes with different batches agree on what has one.
    """

    anchors: Tensor

    def __init__(
        self,
        *,
        anchors: Anchors | Tensor,
        strides: Sequence[int],
        assign: Assign = "ota",
        balance: Sequence[float] = BALANCE,
        focal_gamma: float = 0.0,
        lane_alpha: float = 0.25,
        lane_gamma: float = 2.0,
        lane_fp: float = 0.5,
        lane_fn: float = 0.5,
        lane_exponent: float = 1.0,
        lane_reduce: Reduce = "image",
        smooth: float = SMOOTH,
    ) -> None:
        """Build.

        Args:
            anchors: (L, A, 2) pixels, those of the network.
            strides: pixels per cell of each scale.
            assign: ota, or plain: every place whose anchor fits.
            balance: weight of objectness at each scale.
            focal_gamma: focal exponent of objectness and class; 0 is plain cross entropy.
            lane_alpha: weight of lane pixels in the focal term, the others have 1 - lane_alpha.
            lane_gamma: exponent of the focal term.
            lane_fp: weight of false positives in the Dice term; with another than 0.5 for this and
                `lane_fn` it is Tversky's.
            lane_fn: weight of false negatives in it.
            lane_exponent: the Dice term is raised to it.
            lane_reduce: overlap of each image, then the mean; or of the batch as one.
            smooth: added to numerator and denominator of Dice and IoU.

        Raises: InputError for another name, or lists that do not fit.
        """
        super().__init__()
        for field, value, known in (
            ("assign", assign, ("ota", "plain")),
            ("lane_reduce", lane_reduce, ("image", "batch")),
        ):
            if value not in known:
                raise InputError(field, f"'{value}'", " or ".join(known), "correct it")
        if len(balance) != len(strides):
            raise InputError("balance", len(balance), f"{len(strides)} weights", "one a scale")
        self.register_buffer(
            "anchors", check_anchors(anchors, num_scales=len(strides)), persistent=False
        )
        self.strides, self.assign, self.balance = tuple(strides), assign, tuple(balance)
        self.focal_gamma = focal_gamma
        self.lane_alpha, self.lane_gamma = lane_alpha, lane_gamma
        self.lane_fp, self.lane_fn, self.lane_exponent = lane_fp, lane_fn, lane_exponent
        self.lane_reduce, self.smooth = lane_reduce, smooth

    def forward(self, out: Mapping[str, Any], targets: Targets) -> dict[str, Tensor]:
        """The unweighted terms, scalars in float32, in or outside autocast.

        Args:
            out: what the network gives, of any float type.
            targets: of the same batch, on the same device.
        """
        some = next(iter(out.values()))
        device = (some[0] if isinstance(some, list) else some).device
        losses: dict[str, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            if "detection" in out:
                losses |= detection_losses(
                    out["detection"],
                    targets,
                    self.anchors,
                    self.strides,
                    assign=self.assign,
                    balance=self.balance,
                    focal_gamma=self.focal_gamma,
                )
            if "drivable" in out:
                losses["loss_drivable"] = drivable_loss(out["drivable"], targets.drivable)
            if "lane" in out:
                losses |= lane_losses(
                    out["lane"],
                    targets.lane,
                    alpha=self.lane_alpha,
                    gamma=self.lane_gamma,
                    fp=self.lane_fp,
                    fn=self.lane_fn,
                    exponent=self.lane_exponent,
                    reduce=self.lane_reduce,
                    smooth=self.smooth,
                )
        return losses


def detection_losses(
    maps: Sequence[Tensor],
    targets: Targets,
    anchors: Tensor,
    strides: Sequence[int],
    *,
    assign: Assign = "ota",
    balance: Sequence[float] = BALANCE,
    focal_gamma: float = 0.0,
) -> dict[str, Tensor]:
    """Terms of the boxes.

    `loss_box` is 1 - CIoU at positives; `loss_obj` binary cross entropy of objectness, whose target
    is the IoU at positives (the best, where boxes share a prediction) and 0 elsewhere; `loss_cls`
    binary cross entropy of classes at positives, 0 with one class. Each is a mean over a scale,
    summed over scales. Cells with a pixel where boxes are not labelled are left out of `loss_obj`,
    unless they are positive.

    Args:
        maps: per scale (B, A (5 + C), H/s, W/s), raw.
        targets: `boxes_cxcywh`, `labels`, `images` and `known` are read.
        anchors: (L, A, 2) pixels.
        strides: pixels per cell of each scale.
        assign: ota or plain.
        balance: weight of `loss_obj` at each scale.
        focal_gamma: exponent of |target - score| in front of both cross entropies.
    """
    sizes = [(x.shape[2], x.shape[3]) for x in maps]
    raw = flatten(maps, anchors.shape[1]).float()  # (B, N, 5 + C)
    grid = build_grid(sizes, strides, anchors)
    truth, labels, images = targets.boxes_cxcywh.float(), targets.labels, targets.images
    candidates = find_candidates(truth, sizes, strides, anchors)
    if assign == "ota":
        positives = take_cheapest(candidates, raw, grid, truth, labels, images)
    else:
        positives = take_all(candidates)

    boxes, index = positives
    near = raw[images[boxes], index]  # (P, 5 + C)
    cells, pixels = grid.cells[index], grid.strides[index]
    found = decode_boxes(near[:, :4], cells, pixels, grid.anchors[index])
    iou, complete = box_overlap(
        box_convert(found / pixels[:, None], "cxcywh", "xyxy"),
        box_convert(truth[boxes] / pixels[:, None], "cxcywh", "xyxy"),
    )
    scales = grid.scales[index]
    share = 1 / scales.bincount(minlength=len(sizes)).clamp(min=1)[scales]  # (P,)

    num_classes = raw.shape[2] - 5
    loss_cls = raw.new_zeros(())
    if num_classes > 1:
        wanted = F.one_hot(labels[boxes], num_classes).to(raw.dtype)
        loss_cls = (_cross_entropy(near[:, 5:], wanted, focal_gamma).mean(1) * share).sum()
    return {
        "loss_box": ((1 - complete) * share).sum(),
        "loss_obj": _objectness(raw, grid, targets, positives, iou, sizes, balance, focal_gamma),
        "loss_cls": loss_cls,
    }


def _objectness(
    raw: Tensor,
    grid: Grid,
    targets: Targets,
    positives: Positives,
    iou: Tensor,
    sizes: Sequence[tuple[int, int]],
    balance: Sequence[float],
    focal_gamma: float,
) -> Tensor:
    batch, count = raw.shape[:2]
    place = targets.images[positives.boxes] * count + positives.places
    wanted = raw.new_zeros(batch * count)
    wanted = wanted.scatter_reduce(0, place, iou.detach().clamp(0, 1), "amax")
    known = known_cells(targets.known, sizes, batch, len(grid.scales), raw.device)
    known = known.flatten().index_fill(0, place, True).view(batch, count)
    in_scale = F.one_hot(grid.scales, len(sizes)).to(raw.dtype)  # (N, L)
    num_known = known.to(raw.dtype).sum(0) @ in_scale  # (L,)
    weight = raw.new_tensor(tuple(balance)) / num_known.clamp(min=1)
    terms = _cross_entropy(raw[..., 4], wanted.view(batch, count), focal_gamma)
    return ((terms * known).sum(0) * weight[grid.scales]).sum()


def known_cells(
    known: Tensor | None,
    sizes: Sequence[tuple[int, int]],
    batch: int,
    count: int,
    device: torch.device,
) -> Tensor:
    """Which predictions lie in cells whose every pixel is labelled with boxes: bool (B, N).

    Args:
        known: (B, H, W) bool, or None: all.
        sizes: (H, W) in cells of each scale.
        batch: B.
        count: N.
        device: of the result.
    """
    if known is None:
        return torch.ones(batch, count, dtype=torch.bool, device=device)
    per_scale = count // sum(height * width for height, width in sizes)
    unknown = (~known)[:, None].to(torch.float32)
    parts = [F.adaptive_max_pool2d(unknown, size).flatten(1) for size in sizes]
    return torch.cat([part.repeat(1, per_scale) for part in parts], 1) == 0


def _cross_entropy(logits: Tensor, wanted: Tensor, focal_gamma: float) -> Tensor:
    terms = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if focal_gamma:
        terms = terms * (wanted - logits.sigmoid()).abs() ** focal_gamma
    return terms


def drivable_loss(logits: Tensor, masks: Tensor | None) -> Tensor:
    """Cross entropy, the mean over labelled pixels; 0 where there are none.

    Args:
        logits: (B, C, H, W), background first.
        masks: (B, H, W) class numbers or 255; None: nothing is labelled.
    """
    if masks is None:
        return logits.float().sum() * 0
    _check_masks("drivable", logits, masks)
    wanted = masks.long()
    total = F.cross_entropy(logits.float(), wanted, ignore_index=IGNORE, reduction="sum")
    return total / (wanted != IGNORE).sum().clamp(min=1)


def lane_losses(
    logits: Tensor,
    masks: Tensor | None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    fp: float = 0.5,
    fn: float = 0.5,
    exponent: float = 1.0,
    reduce: Reduce = "image",
    smooth: float = SMOOTH,
) -> dict[str, Tensor]:
    """Terms of the lanes: `loss_lane_focal`, `loss_lane_dice`, `loss_lane_iou`.

    With soft counts TP = Σ p g, FP = Σ p (1 - g), FN = Σ (1 - p) g over labelled pixels, Dice is
    (2 TP + s) / (2 TP + FP + FN + s), IoU (TP + s) / (TP + FP + FN + s), and the terms are 1 minus
    these: means over the images with a labelled pixel, or of the batch as one.

    Args:
        logits: (B, 1, H, W).
        masks: (B, H, W), 0, 1 or 255; None: nothing is labelled.
        alpha: weight of lane pixels in the focal term.
        gamma: its exponent.
        fp: weight of FP in Dice, which is (TP + s/2) / (TP + fp FP + fn FN + s/2).
        fn: weight of FN.
        exponent: of the Dice term.
        reduce: image or batch.
        smooth: s.
    """
    names = ("loss_lane_focal", "loss_lane_dice", "loss_lane_iou")
    if masks is None:
        return {name: logits.float().sum() * 0 for name in names}
    _check_masks("lane", logits, masks)
    flat, wanted = logits.float().flatten(1), masks.flatten(1)  # (B, H W)
    known = (wanted != IGNORE).float()
    truth = (wanted == 1).float()
    focal = sigmoid_focal_loss(flat, truth, alpha, gamma, reduction="none") * known
    share = flat.sigmoid() * known
    hits = (share * truth).sum(1)
    extra, missed = share.sum(1) - hits, truth.sum(1) - hits  # (B,)
    num_known = known.sum(1)
    if reduce == "batch":
        hits, extra, missed, num_known = (
            x.sum(0, keepdim=True) for x in (hits, extra, missed, num_known)
        )
    dice = 1 - overlap(hits, extra, missed, fp, fn, smooth / 2)
    iou = 1 - overlap(hits, extra, missed, 1, 1, smooth)
    counts = (num_known > 0).float()
    mean = counts / counts.sum().clamp(min=1)
    terms = (
        focal.sum() / num_known.sum().clamp(min=1),
        (dice.clamp(min=0) ** exponent * mean).sum(),
        (iou * mean).sum(),
    )
    return dict(zip(names, terms, strict=True))


def overlap(
    hits: Tensor, extra: Tensor, missed: Tensor, fp: float, fn: float, smooth: float
) -> Tensor:
    """(TP + s) / (TP + fp FP + fn FN + s): Tversky; Dice with halves, IoU with ones."""
    return (hits + smooth) / (hits + fp * extra + fn * missed + smooth)


def _check_masks(field: str, logits: Tensor, masks: Tensor) -> None:
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(masks.shape) != expected:
        got, wanted = ("x".join(map(str, shape)) for shape in (masks.shape, expected))
        raise InputError(field, f"masks of {got}", wanted, "letterbox masks as the images")
