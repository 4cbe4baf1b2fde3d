"""Which predictions answer for which box.

Paper: Han et al., YOLOPv2 (arXiv 2208.11434), trains boxes as its parents do; that the authors
refined candidates by optimal transport (OTA, as simplified by YOLOX) is likely and not known.
Written from a description, not from code.

Differs from the parents: a box chooses among its own candidates only, so that each box it is
assigned can be reached by decoding; and a prediction that two boxes share goes to one of them.

Shapes: T boxes, L scales, A anchors of a scale, J = 3 L A candidate places of a box, N predictions
of an image (see `boxes`), P positives.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert

from yolop_mtl.boxes import Grid, box_overlap, decode_boxes

MAX_RATIO = 4.0  # between sides of a box and of an anchor; decoding reaches as far
TOP_OVERLAPS = 10
IOU_COST = 3.0
EPS = 1e-7


class Candidates(NamedTuple):
    """The J places of each box.

    Attributes:
        places: (T, J) int64, number of the prediction in its image; 0 where there is none.
        valid: (T, J) bool.
    """

    places: Tensor
    valid: Tensor


class Positives(NamedTuple):
    """Predictions that answer for boxes: `boxes` (P,) numbers of boxes, `places` (P,) in [0, N)."""

    boxes: Tensor
    places: Tensor


def find_candidates(
    boxes_cxcywh: Tensor,
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    anchors: Tensor,
    *,
    max_ratio: float = MAX_RATIO,
) -> Candidates:
    """Places whose anchor fits the box: the cell of its centre and the two nearest beside it.

    An anchor fits where neither side differs by a factor of `max_ratio` or more. A neighbour lies
    left (up) of the cell where the centre is in its first half, otherwise right (down); neighbours
    outside the grid are dropped, and so is a box whose centre is outside.

    Args:
        boxes_cxcywh: (T, 4) pixels.
        sizes: (H, W) in cells of each scale.
        strides: pixels per cell of each scale.
        anchors: (L, A, 2) pixels.
        max_ratio: see above.

    Returns: places in the order scale, anchor, then centre, horizontal, vertical neighbour.
    """
    device = boxes_cxcywh.device
    per_scale = anchors.shape[1]
    counts = torch.tensor([per_scale * height * width for height, width in sizes], device=device)
    offsets = counts.cumsum(0) - counts  # (L,)
    rows = torch.tensor([height for height, _ in sizes], device=device)
    columns = torch.tensor([width for _, width in sizes], device=device)
    pixels = torch.tensor(strides, device=device, dtype=boxes_cxcywh.dtype)

    ratio = boxes_cxcywh[:, None, None, 2:] / anchors  # (T, L, A, 2)
    fits = torch.maximum(ratio, 1 / ratio).amax(-1) < max_ratio
    centre = boxes_cxcywh[:, None, :2] / pixels[:, None]  # (T, L, 2)
    cell = centre.floor()
    step = torch.where(centre - cell < 0.5, -1, 1)
    moves = torch.tensor([[0, 0], [1, 0], [0, 1]], device=device)
    places = cell.long()[:, :, None] + step[:, :, None] * moves  # (T, L, 3, 2)
    column, row = places.unbind(-1)
    inside = (column >= 0) & (row >= 0) & (column < columns[:, None]) & (row < rows[:, None])
    # A neighbour inside of a centre outside does not count.
    inside = inside & inside[:, :, :1]

    anchor = torch.arange(per_scale, device=device)[:, None]
    in_scale = (anchor * rows[:, None, None] + row[:, :, None]) * columns[:, None, None]
    index = offsets[:, None, None] + in_scale + column[:, :, None]  # (T, L, A, 3)
    valid = fits[..., None] & inside[:, :, None]
    return Candidates(index.where(valid, torch.zeros_like(index)).flatten(1), valid.flatten(1))


def take_all(candidates: Candidates) -> Positives:
    """Plain matching: all places of all scales that fit."""
    boxes, place = candidates.valid.nonzero(as_tuple=True)
    return Positives(boxes, candidates.places[boxes, place])


@torch.no_grad()
def take_cheapest(
    candidates: Candidates,
    raw: Tensor,
    grid: Grid,
    boxes_cxcywh: Tensor,
    labels: Tensor,
    images: Tensor,
) -> Positives:
    """OTA: of its candidates each box takes the k cheapest, k from how well they overlap it.

    k is the sum of a box's ten largest overlaps, rounded down, at least 1. The cost of a place is
    the binary cross entropy of its class scores (the root of class times objectness; with one
    class, of objectness) plus -3 ln IoU. A prediction that several boxes take stays with the one
    to which it is cheapest, and among equals with the first.

    Args:
        candidates: of `find_candidates`.
        raw: (B, N, 5 + C) predictions; no gradient is taken.
        grid: of the N predictions.
        boxes_cxcywh: (T, 4) pixels.
        labels: (T,) int64.
        images: (T,) int64.

    Returns: positives, a subset of the candidates; no prediction twice.
    """
    index, valid = candidates
    if not len(index):
        return take_all(candidates)
    near = raw[images[:, None], index].float()  # (T, J, 5 + C)
    found = decode_boxes(near[..., :4], grid.cells[index], grid.strides[index], grid.anchors[index])
    iou, _ = box_overlap(
        box_convert(found, "cxcywh", "xyxy"),
        box_convert(boxes_cxcywh, "cxcywh", "xyxy").float()[:, None],
    )
    iou = iou.clamp(min=0) * valid
    top = iou.topk(min(TOP_OVERLAPS, iou.shape[1]), 1).values
    quota = top.sum(1).int().clamp(min=1)
    cost = _class_cost(near, labels) - IOU_COST * (iou + EPS).log()
    cost = cost.where(valid, torch.full_like(cost, torch.inf))
    rank = cost.argsort(dim=1, stable=True).argsort(dim=1)
    taken = valid & (rank < quota[:, None])

    box, place = taken.nonzero(as_tuple=True)
    price, target = cost[box, place], index[box, place]
    key = images[box] * raw.shape[1] + target  # the same prediction of the same image
    _, group = key.unique(return_inverse=True)
    least = torch.full_like(price, torch.inf)
    least = least.scatter_reduce(0, group, price, "amin")
    wins = price == least[group]
    order = torch.arange(len(box), device=box.device)
    first = torch.full_like(order, len(order))
    first = first.scatter_reduce(0, group, order.where(wins, first), "amin")
    kept = order == first[group]
    return Positives(box[kept], target[kept])


def _class_cost(near: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy summed over classes: (T, J, 5 + C), (T,) -> (T, J)."""
    objectness = near[..., 4:5].sigmoid()
    num_classes = near.shape[-1] - 5
    share = objectness if num_classes == 1 else objectness * near[..., 5:].sigmoid()
    score = share.sqrt().clamp(EPS, 1 - EPS)
    is_own = F.one_hot(labels, num_classes)[:, None].bool()
    return -torch.where(is_own, score.log(), (1 - score).log()).sum(-1)
