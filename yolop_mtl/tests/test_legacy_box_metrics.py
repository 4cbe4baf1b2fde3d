"""YOLOP's way with boxes: what it differs in, with its numbers."""

import numpy as np
import pytest

from yolop_mtl.box_metrics import ImageBoxes, box_metrics, overlap
from yolop_mtl.legacy_box_metrics import average_precision, legacy_box_metrics, legacy_match

from .box_sets import EXAMPLE, TRUTH, image_boxes, random_set


def test_the_worked_example() -> None:
    recall, precision = (
        np.array([0.25, 0.25, 0.5, 0.75, 0.75]),
        np.array([1, 0.5, 2 / 3, 0.75, 0.6]),
    )
    assert average_precision(recall, precision) == pytest.approx(0.626, abs=1e-9)
    metrics = legacy_box_metrics([EXAMPLE], 1)
    assert metrics["mAP50"] == pytest.approx(0.626)
    assert metrics["mAP50_95"] == pytest.approx(0.626)
    # At the lowest confidence, where the strict pair has .75 and .75.
    assert (metrics["precision"], metrics["recall"]) == pytest.approx((0.6, 0.75))


def test_its_end_of_the_curve_is_not_that_of_later_versions() -> None:
    # With a curve that ends at (1, 0) instead the example is .698, and a perfect detector .995.
    def later(recall: list[float], precision: list[float]) -> float:
        x, y = np.array([0, *recall, 1]), np.array([1, *precision, 0])
        steps = np.linspace(0, 1, 101)
        falling = np.maximum.accumulate(y[::-1])[::-1]
        return float(np.trapezoid(np.interp(steps, x, falling), steps))

    recall, precision = [0.25, 0.25, 0.5, 0.75, 0.75], [1, 0.5, 2 / 3, 0.75, 0.6]
    perfect = [0.25, 0.5, 0.75, 1.0]
    assert later(recall, precision) == pytest.approx(0.698, abs=1e-9)
    assert later(perfect, [1.0] * 4) == pytest.approx(0.995, abs=1e-9)
    assert average_precision(np.array(perfect), np.ones(4)) == pytest.approx(1)


def test_a_perfect_detector() -> None:
    metrics = legacy_box_metrics([image_boxes(TRUTH, [0.9, 0.8, 0.7, 0.6], TRUTH)], 1)
    assert set(metrics) == {"mAP50", "mAP50_95", "precision", "recall"}
    assert list(metrics.values()) == pytest.approx([1] * 4)


def test_nothing_found_is_zero_and_nothing_to_find_is_undefined() -> None:
    assert set(legacy_box_metrics([image_boxes([], [], TRUTH)], 1).values()) == {0.0}
    assert legacy_box_metrics([image_boxes(TRUTH, [0.9, 0.8, 0.7, 0.6], [])], 1) == {}


def test_a_claim_at_half_overlap_holds_for_all() -> None:
    # The better score has IoU .6, the other fits exactly: only the first can be right, and only
    # up to its own overlap. COCO lets the second have the truth from .65 on.
    found = image_boxes([[0.0, 0, 10, 6], [0, 0, 10, 10]], [0.9, 0.8], TRUTH[:1])
    right = legacy_match(found)
    # IoU .6 in binary lies on the far side of the third threshold by a hair; .55 is safe.
    assert right[0].tolist()[:2] == [True, True]
    assert not right[0, 3:].any()
    assert not right[1].any()
    strict, _ = box_metrics([found], 1)
    assert strict["mAP50_95"] > legacy_box_metrics([found], 1)["mAP50_95"]


def test_only_the_nearest_truth_counts_and_half_is_not_enough() -> None:
    truth = [[0.0, 0, 10, 10], [2, 0, 12, 10]]
    # The second also overlaps the other truth, which is free: by COCO's rule it would be right.
    both = image_boxes([[0.0, 0, 10, 10], [0.5, 0, 10.5, 10]], [0.9, 0.8], truth)
    assert legacy_match(both)[:, 0].tolist() == [True, False]
    half = image_boxes([[0.0, 0, 10, 5]], [0.9], truth[:1])
    assert not legacy_match(half).any()


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_a_plain_loop(seed: int) -> None:
    for image in random_set(seed):
        assert (legacy_match(image) == _loop(image)).all()


def _loop(image: ImageBoxes) -> np.ndarray:
    right = np.zeros((len(image.scores), 10), dtype=bool)
    iou, taken = overlap(image), set()
    for row in range(len(right)):
        if len(image.truth_labels):
            truth = int(iou[row].argmax())
            if iou[row, truth] > 0.5 and truth not in taken:
                taken.add(truth)
                right[row] = [iou[row, truth] > 0.5 + 0.05 * step for step in range(10)]
    return right


def test_means_over_classes_with_truth() -> None:
    image = image_boxes([TRUTH[0], TRUTH[3]], [0.9, 0.8], TRUTH[:2], [0, 2], [0, 1])
    metrics = legacy_box_metrics([image], 3)
    assert metrics["mAP50"] == pytest.approx(0.5)
    assert metrics["recall"] == pytest.approx(0.5)
