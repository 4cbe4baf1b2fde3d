"""Boxes by the rules of COCO: average precision, and precision and recall at the best confidence.

Average precision comes from faster-coco-eval, fed from memory. It takes the best 100 boxes of a
class in an image, as COCO does. All boxes are in pixels of the images themselves.

What is kept of an image are its truths and the detections that suppression left, at most `max_det`:
memory grows by that, some kilobytes an image, and by nothing else.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MATCH_IOU = 0.5  # overlap that makes a detection right, for precision and recall
COCO_BEST = 100  # boxes of a class in an image that count


class ImageBoxes(NamedTuple):
    """Detections and truth of an image that is labelled with boxes, in its own pixels.

    Attributes:
        boxes_xyxy: (D, 4) float32, best first.
        scores: (D,) float32.
        labels: (D,) int64.
        truth_xyxy: (T, 4) float32.
        truth_labels: (T,) int64.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    truth_xyxy: NDArray[np.float32]
    truth_labels: NDArray[np.int64]


class BoxCurves(NamedTuple):
    """What the plots need. Shapes: C classes, N points of confidence.

    Attributes:
        recall: (101,) 0 to 1.
        precision: (C, 101) at that recall and IoU 0.5, by COCO's rule; NaN for a class without
            truth.
        ap50: (C,) the mean of each row.
        confidence: (N,) ascending.
        at_confidence: (3, N) precision, recall and F1 of all classes together where boxes of that
            confidence and more count.
        best: index of the highest F1.
    """

    recall: Floats
    precision: Floats
    ap50: Floats
    confidence: Floats
    at_confidence: Floats
    best: int


def box_metrics(
    images: Sequence[ImageBoxes], num_classes: int
) -> tuple[dict[str, float], BoxCurves | None]:
    """COCO's figures over a whole set, and the curves behind them.

    `mAP50` and `mAP50_95` are means over the classes that have a truth. `precision`, `recall`, `f1`
    and `confidence` are at the confidence of the highest F1, counted over all classes together.
    Each at its threshold alone: a detection is right if it is the best one of its class to claim a
    truth with an IoU of 0.5 or more.

    Args:
        images: those labelled with boxes, perhaps with none.
        num_classes: labels are 0 to it.

    Returns: no metric and no curve where there is no truth at all, which leaves them undefined.
    """
    num_truths = sum(len(image.truth_labels) for image in images)
    if not num_truths:
        return {}, None
    precision = _coco_precision(images, num_classes)  # (10, 101, C), -1: a class without truth
    table = np.where(precision < 0, np.nan, precision)
    has_truth = ~np.isnan(table[0, 0])
    metrics = {
        "mAP50": float(table[0][:, has_truth].mean()),
        "mAP50_95": float(table[:, :, has_truth].mean()),
    }
    confidence, at_confidence = _confidence_curve(images, num_truths)
    best = int(at_confidence[2].argmax())
    names = ("precision", "recall", "f1")
    metrics |= dict(zip(names, at_confidence[:, best].tolist(), strict=True))
    metrics["confidence"] = float(confidence[best])
    recall = np.linspace(0, 1, 101)
    curves = BoxCurves(recall, table[0].T, table[0].mean(0), confidence, at_confidence, best)
    return metrics, curves


def _coco_precision(images: Sequence[ImageBoxes], num_classes: int) -> Floats:
    """Precision (10 IoUs, 101 recalls, C) by COCO's rule."""
    truths: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        _append(truths, number, image.truth_xyxy, image.truth_labels, None)
        kept = _best_of_each_class(image)
        _append(found, number, image.boxes_xyxy[kept], image.labels[kept], image.scores[kept])
    shared = {
        "images": [{"id": number} for number in range(1, len(images) + 1)],
        "categories": [{"id": number} for number in range(1, num_classes + 1)],
    }
    evaluation = COCOeval_faster(
        COCO({**shared, "annotations": truths}), COCO({**shared, "annotations": found}), "bbox"
    )
    # Of the sizes only "all", of the counts only the largest: no other figure is asked for.
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.maxDets = [COCO_BEST]
    evaluation.evaluate()
    evaluation.accumulate()
    result: Floats = np.asarray(evaluation.eval["precision"])[..., 0, 0]
    return result


def _best_of_each_class(image: ImageBoxes) -> NDArray[np.intp]:
    kept = [np.flatnonzero(image.labels == c)[:COCO_BEST] for c in np.unique(image.labels)]
    return np.concatenate(kept) if kept else np.zeros(0, dtype=np.intp)


def _append(
    annotations: list[dict[str, Any]],
    number: int,
    boxes_xyxy: NDArray[np.float32],
    labels: NDArray[np.int64],
    scores: NDArray[np.float32] | None,
) -> None:
    boxes = boxes_xyxy.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    for row, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        annotation = {
            "id": len(annotations) + 1,
            "image_id": number,
            "category_id": label + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        if scores is not None:
            annotation["score"] = float(scores[row])
        annotations.append(annotation)


def _confidence_curve(images: Sequence[ImageBoxes], num_truths: int) -> tuple[Floats, Floats]:
    """Confidence (N,) of every right detection, ascending; precision, recall, F1 (3, N) there.

    F1 is highest at the score of a right detection, so no other confidence is needed.
    """
    scores = np.concatenate([image.scores for image in images]).astype(np.float64)
    is_right = np.concatenate([match(image) for image in images])
    right = np.unique(scores[is_right])
    if not len(right):
        return np.zeros(1), np.zeros((3, 1))
    all_scores, right_scores = np.sort(scores), np.sort(scores[is_right])
    num_found = len(scores) - np.searchsorted(all_scores, right)
    num_right = len(right_scores) - np.searchsorted(right_scores, right)
    f1 = 2 * num_right / (num_found + num_truths)
    return right, np.stack([num_right / num_found, num_right / num_truths, f1])


def match(image: ImageBoxes, least: float = MATCH_IOU) -> NDArray[np.bool_]:
    """Which detections (D,) are right.

    Best first, each takes the truth of its class that it overlaps most among those not yet taken,
    if with `least` or more.
    """
    iou = overlap(image)
    iou[iou < least] = -math.inf
    is_right = np.zeros(len(iou), dtype=bool)
    for row in np.flatnonzero((iou > 0).any(1)):
        truth = int(iou[row].argmax())
        if iou[row, truth] > 0:
            is_right[row] = True
            iou[:, truth] = -math.inf
    return is_right


def overlap(image: ImageBoxes) -> Floats:
    """IoU (D, T) of detections and truths; 0 between classes."""
    found, truth = (x.astype(np.float64) for x in (image.boxes_xyxy, image.truth_xyxy))
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum(found[:, None, 2:], truth[None, :, 2:])
    inner = (high - low).clip(min=0).prod(2)
    sizes = [(x[:, 2:] - x[:, :2]).prod(1) for x in (found, truth)]
    union = sizes[0][:, None] + sizes[1][None] - inner
    same = image.labels[:, None] == image.truth_labels[None]
    result: Floats = np.where(same & (inner > 0), inner / np.where(union > 0, union, 1), 0.0)
    return result
