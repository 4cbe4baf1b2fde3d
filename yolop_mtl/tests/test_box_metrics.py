"""Strict box metrics: COCO's numbers, and precision and recall at the best confidence."""

import numpy as np
import pytest

from yolop_mtl.box_metrics import COCO_BEST, ImageBoxes, box_metrics, match

from .box_sets import EXAMPLE, TRUTH, image_boxes, random_set

# mAP50 and mAP50_95 of random_set(seed) that pycocotools 2.0.11 gives, another program.
PYCOCOTOOLS = {
    0: (0.3187801861, 0.1783856697),
    1: (0.2789367075, 0.1478691516),
    2: (0.2930895097, 0.1629928359),
    3: (0.3060728172, 0.1809108440),
    4: (0.3254688194, 0.1870889290),
}


@pytest.mark.parametrize("seed", PYCOCOTOOLS)
def test_equal_to_pycocotools(seed: int) -> None:
    metrics, _ = box_metrics(random_set(seed), 3)
    found = (metrics["mAP50"], metrics["mAP50_95"])
    assert found == pytest.approx(PYCOCOTOOLS[seed], abs=1e-6)


def test_the_worked_example() -> None:
    metrics, curves = box_metrics([EXAMPLE], 1)
    assert metrics["mAP50"] == pytest.approx(0.628713, abs=1e-6)
    # The boxes that are right fit exactly: every IoU gives the same.
    assert metrics["mAP50_95"] == pytest.approx(0.628713, abs=1e-6)
    # F1 after each detection: .4, 1/3, 4/7, .75, 2/3.
    assert metrics["f1"] == pytest.approx(0.75)
    assert (metrics["precision"], metrics["recall"]) == (0.75, 0.75)
    assert metrics["confidence"] == pytest.approx(0.6)
    assert curves is not None
    assert curves.precision.shape == (1, 101)
    assert curves.ap50 == pytest.approx(0.628713, abs=1e-6)
    assert curves.confidence == pytest.approx([0.6, 0.7, 0.9])
    assert curves.at_confidence[0] == pytest.approx([3 / 4, 2 / 3, 1])
    assert curves.at_confidence[1] == pytest.approx([3 / 4, 2 / 4, 1 / 4])
    assert curves.best == 0


def test_a_perfect_detector() -> None:
    metrics, _ = box_metrics([image_boxes(TRUTH, [0.9, 0.8, 0.7, 0.6], TRUTH)], 1)
    names = ("mAP50", "mAP50_95", "precision", "recall", "f1")
    assert [metrics[name] for name in names] == pytest.approx([1] * 5)


def test_nothing_found_is_zero_and_nothing_to_find_is_undefined() -> None:
    metrics, curves = box_metrics([image_boxes([], [], TRUTH)], 2)
    assert set(metrics.values()) == {0.0}
    assert curves is not None
    assert np.isnan(curves.precision[1]).all()
    assert box_metrics([image_boxes(TRUTH, [0.9, 0.8, 0.7, 0.6], [])], 2) == ({}, None)


def test_a_class_without_truth_is_in_no_mean() -> None:
    both = image_boxes(TRUTH[:2], [0.9, 0.8], TRUTH[:1], labels=[0, 2], truth_labels=[0])
    metrics, _ = box_metrics([both], 3)
    assert metrics["mAP50"] == pytest.approx(1)
    # The wrong box of that class counts where classes are counted together, above no right one.
    assert (metrics["precision"], metrics["recall"]) == (1, 1)


def test_best_first_each_takes_the_nearest_truth_that_is_free() -> None:
    truth = [[0.0, 0, 10, 10], [4, 0, 14, 10]]
    # The first overlaps the second truth more; the third finds both taken.
    found = image_boxes([[3.0, 0, 13, 10], [2, 0, 12, 10], [2, 0, 12, 10]], [0.9, 0.8, 0.7], truth)
    assert match(found).tolist() == [True, True, False]
    # IoU of 0.5 exactly is enough; another class is not.
    half = image_boxes([[0.0, 0, 10, 5]] * 2, [0.9, 0.8], TRUTH[:1], [1, 0], [0])
    assert match(half).tolist() == [False, True]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_other_confidence_has_a_higher_f1(seed: int) -> None:
    images = random_set(seed)
    metrics, _ = box_metrics(images, 3)
    num_truths = sum(len(image.truth_labels) for image in images)
    best = (0.0, 0.0, 0.0, 0.0)
    for threshold in sorted({float(s) for image in images for s in image.scores}):
        kept = [_above(image, threshold) for image in images]
        right = sum(int(match(image).sum()) for image in kept)
        found = sum(len(image.scores) for image in kept)
        f1 = 2 * right / (found + num_truths)
        best = max(best, (f1, right / found, right / num_truths, threshold))
    names = ("f1", "precision", "recall", "confidence")
    assert [metrics[name] for name in names] == pytest.approx(best)


def _above(image: ImageBoxes, threshold: float) -> ImageBoxes:
    kept = image.scores >= threshold
    return image._replace(
        boxes_xyxy=image.boxes_xyxy[kept], scores=image.scores[kept], labels=image.labels[kept]
    )


def test_the_best_hundred_of_a_class_count_as_in_coco() -> None:
    wrong = [[0.0, 50, 10, 60]] * COCO_BEST
    scores = np.linspace(0.9, 0.5, COCO_BEST + 1).tolist()
    late = image_boxes([*wrong, TRUTH[0]], scores, TRUTH[:1])
    assert box_metrics([late], 1)[0]["mAP50"] == 0
    in_time = image_boxes([*wrong[1:], TRUTH[0]], scores[1:], TRUTH[:1])
    assert box_metrics([in_time], 1)[0]["mAP50"] == pytest.approx(0.01)


def test_order_of_images_changes_nothing() -> None:
    images = random_set(3)
    metrics, _ = box_metrics(images, 3)
    again, _ = box_metrics(images[::-1], 3)
    assert again == pytest.approx(metrics, abs=1e-12)
