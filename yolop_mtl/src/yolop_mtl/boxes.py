"""Anchors, raw maps to boxes and back, overlap, and suppression of doubles.

Boxes are in pixels of the network's input. Shapes: B batch, L scales, A anchors of a scale, N all
anchors of all cells (scale, then anchor, then row, then column), C classes, T boxes.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert, nms

from shared_utils.errors import InputError

Anchors = Sequence[Sequence[Sequence[float]]]

# (w, h) at 640 pixels, found in the released graph: those of COCO, never fitted to driving scenes.
COCO_ANCHORS: Anchors = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
MAX_CANDIDATES = 30_000  # boxes of an image that suppression looks at


class Grid(NamedTuple):
    """What each of the N predictions of an image belongs to.

    Attributes:
        cells: (N, 2) column and row, float32.
        strides: (N,) pixels per cell, float32.
        anchors: (N, 2) width and height in pixels, float32.
        scales: (N,) number of the scale, int64.
    """

    cells: Tensor
    strides: Tensor
    anchors: Tensor
    scales: Tensor


class Decoded(NamedTuple):
    """Every prediction of a batch: `boxes_xyxy` (B, N, 4) pixels, `scores` (B, N, C) 0 to 1."""

    boxes_xyxy: Tensor
    scores: Tensor


class Detections(NamedTuple):
    """What is left for an image, best first: `boxes_xyxy` (T, 4), `scores` (T,), `labels` (T,)."""

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor


def check_anchors(anchors: Anchors | Tensor, *, num_scales: int) -> Tensor:
    """Anchors as (L, A, 2) float32. Raises: InputError where they are none."""
    try:
        table = torch.as_tensor(anchors, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError) as error:
        do = "give every scale as many pairs"
        raise InputError("anchors", anchors, "as many (w, h) pairs for each scale", do) from error
    if table.ndim != 3 or table.shape[0] != num_scales or table.shape[2] != 2 or not table.numel():
        shape = " x ".join(map(str, table.shape))
        do = "give (w, h) pairs for each scale"
        raise InputError("anchors", shape, f"{num_scales} scales x anchors x 2", do)
    if not (table > 0).all() or not table.isfinite().all():
        raise InputError("anchors", table.tolist(), "sizes of more than 0 pixels", "correct them")
    return table


def build_grid(sizes: Sequence[tuple[int, int]], strides: Sequence[int], anchors: Tensor) -> Grid:
    """Lay out the N predictions of an image.

    Args:
        sizes: (H, W) in cells of each scale.
        strides: pixels per cell of each scale.
        anchors: (L, A, 2) pixels; the grid lies on their device.
    """
    device, parts = anchors.device, []
    for scale, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True)):
        rows = torch.arange(height, device=device, dtype=torch.float32)
        columns = torch.arange(width, device=device, dtype=torch.float32)
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        cells = torch.stack([column, row], -1).view(1, -1, 2)
        table = anchors[scale].float()[:, None]  # (A, 1, 2)
        count = (len(table), cells.shape[1], 2)
        flat = len(table) * cells.shape[1]
        parts.append(
            (
                cells.expand(count).reshape(-1, 2),
                torch.full((flat,), float(stride), device=device),
                table.expand(count).reshape(-1, 2),
                torch.full((flat,), scale, device=device),
            )
        )
    return Grid(*(torch.cat(column) for column in zip(*parts, strict=True)))


def flatten(maps: Sequence[Tensor], num_anchors: int) -> Tensor:
    """Raw maps (B, A (5 + C), H, W) of all scales -> (B, N, 5 + C), their type unchanged."""
    return torch.cat(
        [x.unflatten(1, (num_anchors, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3) for x in maps], 1
    )


def decode_boxes(raw: Tensor, cells: Tensor, strides: Tensor, anchors: Tensor) -> Tensor:
    """Raw x, y, w, h to a box.

    The centre lies -0.5 to 1.5 cells from the cell's corner, a side is 0 to 4 anchors long.

    Args:
        raw: (..., 4).
        cells: (..., 2) column and row.
        strides: (...) pixels per cell.
        anchors: (..., 2) pixels.

    Returns: `boxes_cxcywh` (..., 4) in pixels, float32 or wider.
    """
    share = raw.to(torch.promote_types(raw.dtype, torch.float32)).sigmoid()
    centre = (2 * share[..., :2] - 0.5 + cells) * strides[..., None]
    return torch.cat([centre, (2 * share[..., 2:]) ** 2 * anchors], -1)


def encode_boxes(boxes_cxcywh: Tensor, cells: Tensor, strides: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `decode_boxes`: raw values (..., 4); infinite for boxes out of reach."""
    centre = (boxes_cxcywh[..., :2] / strides[..., None] - cells + 0.5) / 2
    size = (boxes_cxcywh[..., 2:] / anchors).sqrt() / 2
    return torch.logit(torch.cat([centre, size], -1).clamp(0, 1))


def score_classes(raw: Tensor) -> Tensor:
    """Scores of raw predictions (..., 5 + C) -> (..., C), 0 to 1.

    Objectness times class. With one class, objectness alone: nothing trains that class channel.
    """
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    objectness = raw[..., 4:5].sigmoid()
    return objectness if raw.shape[-1] == 6 else objectness * raw[..., 5:].sigmoid()


def decode(maps: Sequence[Tensor], anchors: Tensor, strides: Sequence[int]) -> Decoded:
    """Raw maps of all scales to boxes and scores of all N predictions.

    Args:
        maps: per scale (B, A (5 + C), H/s, W/s), raw.
        anchors: (L, A, 2) pixels.
        strides: pixels per cell of each scale.
    """
    sizes = [(x.shape[2], x.shape[3]) for x in maps]
    grid = build_grid(sizes, strides, anchors.to(maps[0].device))
    raw = flatten(maps, anchors.shape[1])
    boxes = decode_boxes(raw[..., :4], grid.cells, grid.strides, grid.anchors)
    return Decoded(box_convert(boxes, "cxcywh", "xyxy"), score_classes(raw))


def box_overlap(
    boxes_xyxy: Tensor, others_xyxy: Tensor, eps: float = 1e-9
) -> tuple[Tensor, Tensor]:
    """IoU and CIoU of pairs of boxes, both (...); CIoU's α carries no gradient.

    CIoU = IoU - d² / c² - α v, with d the distance of the centres, c the diagonal of the box around
    both, v = 4/π² (difference of the angles atan(w / h))² and α = v / (1 - IoU + v).

    Args:
        boxes_xyxy: (..., 4).
        others_xyxy: (..., 4), of the same unit.
        eps: added to denominators, in that unit.
    """
    (top, bottom), (other_top, other_bottom) = boxes_xyxy.split(2, -1), others_xyxy.split(2, -1)
    size, other_size = bottom - top, other_bottom - other_top
    inner = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp(min=0)
    intersection = inner.prod(-1)
    union = size.prod(-1) + other_size.prod(-1) - intersection
    iou = intersection / (union + eps)
    around = torch.maximum(bottom, other_bottom) - torch.minimum(top, other_top)
    diagonal = around.square().sum(-1) + eps
    distance = ((top + bottom - other_top - other_bottom) / 2).square().sum(-1)
    angles = (_angle(other_size, eps) - _angle(size, eps)) * (2 / math.pi)
    v = angles.square()
    with torch.no_grad():
        alpha = v / (1 - iou + v + eps)
    return iou, iou - distance / diagonal - alpha * v


def _angle(size: Tensor, eps: float) -> Tensor:
    return torch.atan(size[..., 0] / (size[..., 1] + eps))


def suppress(
    decoded: Decoded,
    *,
    conf_threshold: float = 0.25,
    iou_threshold: float = 0.45,
    max_detections: int = 300,
    is_class_agnostic: bool = False,
    is_multi_label: bool = False,
) -> list[Detections]:
    """Keep the best of overlapping boxes, image by image.

    There is no time limit. Where more than 30,000 boxes of an image pass `conf_threshold` the best
    so many are looked at, with a warning.

    Args:
        decoded: of `decode`.
        conf_threshold: a box needs a higher score.
        iou_threshold: of two boxes of one class that overlap more, the better one stays.
        max_detections: at most so many for an image.
        is_class_agnostic: boxes of different classes suppress one another too.
        is_multi_label: a box may stand for several classes, each with its score.
    """
    results = []
    for boxes, table in zip(decoded.boxes_xyxy, decoded.scores, strict=True):
        if is_multi_label:
            rows, labels = (table > conf_threshold).nonzero(as_tuple=True)
            scores = table[rows, labels]
        else:
            scores, labels = table.max(1)
            rows = (scores > conf_threshold).nonzero()[:, 0]
            scores, labels = scores[rows], labels[rows]
        if len(scores) > MAX_CANDIDATES:
            warnings.warn(
                f"{len(scores)} boxes of an image pass conf_threshold {conf_threshold}; "
                f"the best {MAX_CANDIDATES} are looked at",
                stacklevel=2,
            )
            best = scores.topk(MAX_CANDIDATES).indices
            rows, scores, labels = rows[best], scores[best], labels[best]
        near = boxes[rows]
        if is_class_agnostic:
            kept = nms(near, scores, iou_threshold)
        else:
            kept = batched_nms(near, scores, labels, iou_threshold)
        kept = kept[:max_detections]
        results.append(Detections(near[kept], scores[kept], labels[kept]))
    return results
