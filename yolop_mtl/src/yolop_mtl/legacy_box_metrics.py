"""Boxes as YOLOP counted them, for comparison with published tables of its family only.

It differs from COCO's rules in four ways: a detection is compared with the one truth it overlaps
most, and wrong if another took that; a truth taken at IoU 0.5 is taken at all IoUs; the curve ends
0.01 after the last recall; and the precision and recall shown are those of the lowest confidence.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from yolop_mtl.box_metrics import Floats, ImageBoxes, overlap

IOUS = np.linspace(0.5, 0.95, 10)
NUM_CONFIDENCES = 1000


def legacy_box_metrics(images: Sequence[ImageBoxes], num_classes: int) -> dict[str, float]:
    """`mAP50`, `mAP50_95`, `precision` and `recall` by YOLOP's rules, means over classes.

    Precision and recall are those at the one of 1000 confidences where the mean recall is highest,
    as a rule the lowest: with a recall of 0.92 there goes a precision of 0.13.

    Args:
        images: those labelled with boxes, perhaps with none.
        num_classes: labels are 0 to it.

    Returns: nothing where there is no truth at all.
    """
    truths = np.concatenate([np.zeros(0, dtype=np.int64), *(x.truth_labels for x in images)])
    counts = np.bincount(truths, minlength=num_classes)
    if not counts.sum():
        return {}
    scores = np.concatenate([image.scores for image in images]).astype(np.float64)
    labels = np.concatenate([image.labels for image in images])
    is_right = np.concatenate([legacy_match(image) for image in images])  # (N, 10)
    order = np.argsort(-scores, kind="stable")
    scores, labels, is_right = scores[order], labels[order], is_right[order]
    steps = np.linspace(0, 1, NUM_CONFIDENCES)
    aps, precisions, recalls = [], [], []
    for number in np.flatnonzero(counts):
        own = labels == number
        right = is_right[own].cumsum(0)  # (n, 10)
        if not len(right):
            aps.append(np.zeros(len(IOUS)))
            precisions.append(np.zeros(NUM_CONFIDENCES))
            recalls.append(np.zeros(NUM_CONFIDENCES))
            continue
        recall = right / counts[number]
        precision = right / np.arange(1, len(right) + 1)[:, None]
        columns = range(len(IOUS))
        aps.append(np.array([average_precision(recall[:, t], precision[:, t]) for t in columns]))
        # Negated: what is interpolated over has to ascend.
        precisions.append(np.interp(-steps, -scores[own], precision[:, 0], left=1))
        recalls.append(np.interp(-steps, -scores[own], recall[:, 0], left=0))
    table = np.stack(aps)  # (classes with truth, 10)
    mean_recall = np.mean(recalls, axis=0)
    shown = int(mean_recall.argmax())
    return {
        "mAP50": float(table[:, 0].mean()),
        "mAP50_95": float(table.mean()),
        "precision": float(np.mean(precisions, axis=0)[shown]),
        "recall": float(mean_recall[shown]),
    }


def average_precision(recall: Floats, precision: Floats) -> float:
    """The area under the curve by YOLOP's rule.

    The curve starts at (0, 1) and ends at (last recall + 0.01, 0), made to fall only; the area is
    that of trapezoids between 101 recalls.

    Args:
        recall: (N,) ascending, of detections from the highest score down; N is 1 or more.
        precision: (N,).
    """
    x = np.concatenate([[0.0], recall, [recall[-1] + 0.01]])
    y = np.concatenate([[1.0], precision, [0.0]])
    falling = np.maximum.accumulate(y[::-1])[::-1]
    steps = np.linspace(0, 1, 101)
    return float(np.trapezoid(np.interp(steps, x, falling), steps))


def legacy_match(image: ImageBoxes) -> NDArray[np.bool_]:
    """Which detections are right at each of the IoUs 0.50, 0.55, ..., 0.95: (D, 10)."""
    iou = overlap(image)
    is_right = np.zeros((len(iou), len(IOUS)), dtype=bool)
    if not iou.size:
        return is_right
    nearest, best = iou.argmax(1), iou.max(1)
    rows = np.flatnonzero(best > IOUS[0])
    _, first = np.unique(nearest[rows], return_index=True)  # best score first: it has the claim
    claims = rows[first]
    is_right[claims] = best[claims, None] > IOUS
    return is_right
