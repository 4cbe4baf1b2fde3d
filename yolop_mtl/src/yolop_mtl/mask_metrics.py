"""Drivable area and lanes: pixel counts of an image, and figures from counts of many.

Counted at the network's size, the padding left out. Two ways:

- Strict: truth brought to that size by nearest, one table of counts over the whole set.
- Legacy, as YOLOP counted (for its family's tables only): truth averaged over the area and taken as
  foreground from the faintest trace on, which widens thin lines; figures of 32 images at a time,
  averaged.

Unknown pixels (255) count nowhere. Shapes: C classes of the drivable head, (H, W) the network's
input, (h, w) the part of it that the image fills.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from yolop_mtl.geometry import Letterbox
from yolop_mtl.targets import IGNORE

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.uint8]

THRESHOLDS = np.arange(1, 100, dtype=np.float32) / np.float32(100)  # of lane probability
DEFAULT = 49  # index of 0.50
TOLERANCE = 2  # pixels that both lane masks grow by, to every side, diagonals included
LEGACY_BATCH = 32
LEGACY_TRACE = 1  # of 255: what YOLOP takes as foreground is above it


class DrivableCounts(NamedTuple):
    """Pixels of an image: `strict` (C, C) and `legacy` (2, 2), rows truth, columns prediction."""

    strict: Counts
    legacy: Counts


class LaneCounts(NamedTuple):
    """Pixels of an image.

    Attributes:
        by_probability: (2, 100) background and lane pixels, by how many of the `THRESHOLDS` their
            probability exceeds.
        tolerant: (2,) intersection and union of the grown masks.
        legacy: (2, 2) rows truth, columns prediction.
    """

    by_probability: Counts
    tolerant: Counts
    legacy: Counts


class LaneCurve(NamedTuple):
    """Precision, recall, F1 and IoU of lanes by threshold: five arrays (99,)."""

    threshold: Floats
    precision: Floats
    recall: Floats
    f1: Floats
    IoU: Floats


@torch.no_grad()
def count_drivable(logits: Tensor, truth: Mask, letterbox: Letterbox) -> DrivableCounts:
    """Compare an image's drivable logits with its mask.

    Args:
        logits: (C, H, W); class 0 is background.
        truth: class numbers and 255, of the image's own size.
        letterbox: how the image lies in the input.
    """
    inner = _inner(logits, letterbox)
    # The same as argmax, whose walk over two maps takes many times as long.
    predicted = (inner[1] > inner[0]).long() if len(inner) == 2 else inner.argmax(0)
    near = _nearest(truth, letterbox, logits.device)
    legacy = confusion(_area(truth, letterbox, near), (predicted > 0).long(), 2)
    return DrivableCounts(confusion(near, predicted, len(logits)), legacy)


@torch.no_grad()
def count_lane(logits: Tensor, truth: Mask, letterbox: Letterbox) -> LaneCounts:
    """Compare an image's lane logits with its mask. A lane has a probability above 0.5.

    Args:
        logits: (1, H, W).
        truth: 0, 1 and 255, of the image's own size.
        letterbox: how the image lies in the input.
    """
    share = _inner(logits, letterbox)[0].sigmoid()
    near = _nearest(truth, letterbox, logits.device)
    thresholds = torch.from_numpy(THRESHOLDS).to(logits.device)
    exceeded = torch.bucketize(share, thresholds)  # of t < p for every t counted
    is_known = near != IGNORE
    bins = len(THRESHOLDS) + 1
    flat = near[is_known] * bins + exceeded[is_known]
    by_probability = flat.bincount(minlength=2 * bins).view(2, bins)
    predicted = share > THRESHOLDS[DEFAULT]
    grown, grown_truth = _grow(predicted & is_known), _grow(near == 1)
    tolerant = torch.stack(
        [
            (grown & grown_truth & is_known).sum(),
            ((grown | grown_truth) & is_known).sum(),
        ]
    )
    legacy = confusion(_area(truth, letterbox, near), predicted.long(), 2)
    return LaneCounts(by_probability.cpu().numpy(), tolerant.cpu().numpy(), legacy)


def confusion(truth: Tensor, predicted: Tensor, num_classes: int) -> Counts:
    """Pixels by class: (C, C), rows truth, columns prediction; truth of 255 is left out.

    Args:
        truth: (...) int64, 0 to `num_classes` or 255.
        predicted: (...) int64.
        num_classes: C.
    """
    is_known = truth != IGNORE
    flat = truth[is_known] * num_classes + predicted[is_known]
    counts: Counts = flat.bincount(minlength=num_classes**2).cpu().numpy()
    return counts.reshape(num_classes, num_classes)


def drivable_metrics(counts: Counts) -> dict[str, float]:
    """Figures from pixels (C, C) of a whole set.

    Returns: `mIoU`, the mean over the classes that occur in truth or prediction, background
        included; `IoU` of class 1; with three classes `alternative_IoU` of class 2; `accuracy`, the
        share of right pixels.
    """
    counts = counts.astype(np.float64)
    right = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - right
    iou = right / np.maximum(union, 1)
    metrics = {
        "mIoU": float(iou[union > 0].mean()) if union.any() else 0.0,
        "IoU": float(iou[1]),
        "accuracy": _ratio(right.sum(), counts.sum()),
    }
    if len(counts) == 3:
        metrics["alternative_IoU"] = float(iou[2])
    return metrics


def lane_metrics(counts: Counts) -> dict[str, float]:
    """Figures from pixels (2, 2) of a whole set; 0 where there is nothing to divide by.

    Returns: `precision`, `recall`, `f1`, `IoU` of the lane class; `accuracy`, the mean of the
        shares of lane and of background pixels that are found, (TPR + TNR) / 2; `pixel_accuracy`,
        the share of right pixels, which a network without any lane has too; `mIoU`, with the
        background.
    """
    (tn, fp), (fn, tp) = counts.astype(np.float64).tolist()
    iou = _ratio(tp, tp + fp + fn)
    return {
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "IoU": iou,
        "accuracy": (_ratio(tp, tp + fn) + _ratio(tn, tn + fp)) / 2,
        "pixel_accuracy": _ratio(tp + tn, tp + tn + fp + fn),
        "mIoU": (iou + _ratio(tn, tn + fp + fn)) / 2,
    }


def at_threshold(by_probability: Counts, index: int = DEFAULT) -> Counts:
    """Pixels (2, 2) where a lane needs more than `THRESHOLDS[index]`."""
    low = by_probability[:, : index + 1].sum(1)
    return np.stack([low, by_probability.sum(1) - low], 1)


def lane_curve(by_probability: Counts) -> LaneCurve:
    """Figures at every threshold, from counts (2, 100) of a whole set."""
    rows = [lane_metrics(at_threshold(by_probability, i)) for i in range(len(THRESHOLDS))]
    columns = (np.array([row[name] for row in rows]) for name in LaneCurve._fields[1:])
    return LaneCurve(THRESHOLDS.astype(np.float64).round(2), *columns)


def legacy_drivable_metrics(
    images: Sequence[Counts], batch_size: int = LEGACY_BATCH
) -> dict[str, float]:
    """YOLOP's `accuracy` (share of right pixels), `IoU` and `mIoU` of the drivable area.

    Averages over batches. A batch is so many images in the order of the set, whatever the loader's
    batches were; a smaller last one weighs less. What cannot be divided is 0. All kinds of area
    are one.

    Args:
        images: (2, 2) of each image, in the order of the set, one or more.
        batch_size: of the average.
    """
    return _batch_average(images, batch_size, accuracy="pixel_accuracy")


def legacy_lane_metrics(
    images: Sequence[Counts], batch_size: int = LEGACY_BATCH
) -> dict[str, float]:
    """YOLOP's `accuracy` (which is the recall), `IoU` and `mIoU` of lanes, averages over batches.

    Arguments as of `legacy_drivable_metrics`.
    """
    return _batch_average(images, batch_size, accuracy="recall")


def _batch_average(images: Sequence[Counts], batch_size: int, *, accuracy: str) -> dict[str, float]:
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    rows = [lane_metrics(np.sum(batch, axis=0)) for batch in batches]
    sizes = [len(batch) for batch in batches]
    names = {"accuracy": accuracy, "IoU": "IoU", "mIoU": "mIoU"}
    return {
        name: float(np.average([row[source] for row in rows], weights=sizes))
        for name, source in names.items()
    }


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _inner(logits: Tensor, letterbox: Letterbox) -> Tensor:
    """(C, H, W) -> (C, h, w) float32."""
    return logits[:, letterbox.rows, letterbox.columns].float()


def _nearest(truth: Mask, letterbox: Letterbox, device: torch.device) -> Tensor:
    """A mask of the image's size -> (h, w) int64."""
    inner = np.ascontiguousarray(letterbox.crop(letterbox.mask(truth)))
    return torch.from_numpy(inner).to(device).long()


def _area(truth: Mask, letterbox: Letterbox, near: Tensor) -> Tensor:
    """A mask of the image's size -> (h, w) int64 as YOLOP had it: 0, 1; 255 as in `near`."""
    height, width = letterbox.inner
    is_smaller = height < truth.shape[0] or width < truth.shape[1]
    method = cv2.INTER_AREA if is_smaller else cv2.INTER_LINEAR
    painted = ((truth > 0) & (truth != IGNORE)).astype(np.uint8) * np.uint8(255)
    if painted.shape != letterbox.inner:
        painted = np.asarray(cv2.resize(painted, (width, height), interpolation=method))
    found = torch.from_numpy(painted > LEGACY_TRACE).to(near.device).long()
    found[near == IGNORE] = IGNORE
    return found


def _grow(mask: Tensor) -> Tensor:
    """(h, w) bool -> the same with all pixels nearby, as far as `TOLERANCE`."""
    side, grown = 2 * TOLERANCE + 1, mask[None].float()
    grown = F.max_pool2d(grown, (side, 1), stride=1, padding=(TOLERANCE, 0))
    return F.max_pool2d(grown, (1, side), stride=1, padding=(0, TOLERANCE))[0] > 0
