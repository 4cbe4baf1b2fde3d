"""Images with truths and detections that tests of the box metrics share."""

import numpy as np

from yolop_mtl.box_metrics import ImageBoxes


def image_boxes(
    boxes: list[list[float]],
    scores: list[float],
    truth: list[list[float]],
    labels: list[int] | None = None,
    truth_labels: list[int] | None = None,
) -> ImageBoxes:
    """One image from lists; all of class 0 where no labels are given."""
    return ImageBoxes(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(scores, dtype=np.float32),
        np.array([0] * len(boxes) if labels is None else labels, dtype=np.int64),
        np.array(truth, dtype=np.float32).reshape(-1, 4),
        np.array([0] * len(truth) if truth_labels is None else truth_labels, dtype=np.int64),
    )


def random_set(seed: int, num_classes: int = 3, num_images: int = 40) -> list[ImageBoxes]:
    """Truths, copies of them that are off by more or less, and boxes that are nowhere.

    The first images lack truths, the next ones detections, one both; a class may be confused.
    """
    rng = np.random.default_rng(seed)
    images = []
    for number in range(num_images):
        num_truths = 0 if number in (0, 1, 4) else int(rng.integers(1, 9))
        corner, size = rng.random((num_truths, 2)) * 500, rng.random((num_truths, 2)) * 120 + 5
        truth = np.concatenate([corner, corner + size], 1)
        truth_labels = rng.integers(num_classes, size=num_truths)
        repeats = rng.integers(0, 3, size=num_truths)
        copies = truth.repeat(repeats, 0)
        copies += rng.normal(size=copies.shape) * size.repeat(repeats, 0)[:, [0, 1, 0, 1]] * 0.08
        copies = np.concatenate([np.minimum(copies[:, :2], copies[:, 2:] - 1), copies[:, 2:]], 1)
        labels = truth_labels.repeat(repeats)
        labels = np.where(rng.random(len(labels)) < 0.1, (labels + 1) % num_classes, labels)
        start = rng.random((int(rng.integers(0, 6)), 2)) * 500
        extra = np.concatenate([start, start + rng.random(start.shape) * 100 + 4], 1)
        boxes = np.concatenate([copies, extra])
        labels = np.concatenate([labels, rng.integers(num_classes, size=len(extra))])
        if number in (2, 3, 4):
            boxes, labels = boxes[:0], labels[:0]
        scores = np.sort(rng.random(len(boxes)))[::-1]
        order = rng.permutation(len(boxes))
        images.append(
            ImageBoxes(
                boxes[order].astype(np.float32),
                scores.astype(np.float32),
                labels[order].astype(np.int64),
                truth.astype(np.float32),
                truth_labels.astype(np.int64),
            )
        )
    return images


TRUTH = [[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]
NOWHERE = [[0.0, 50, 10, 60], [20, 50, 30, 60]]
# Detections right, wrong, right, right, wrong; one truth is never found.
EXAMPLE = image_boxes(
    [TRUTH[0], NOWHERE[0], TRUTH[1], TRUTH[2], NOWHERE[1]], [0.9, 0.8, 0.7, 0.6, 0.5], TRUTH
)
