"""Pixel counts and figures of masks, with the specification's numbers."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from yolop_mtl.geometry import fit
from yolop_mtl.mask_metrics import (
    DEFAULT,
    THRESHOLDS,
    at_threshold,
    confusion,
    count_drivable,
    count_lane,
    drivable_metrics,
    lane_curve,
    lane_metrics,
    legacy_drivable_metrics,
    legacy_lane_metrics,
)

# Rows truth, columns prediction: ((TN, FP), (FN, TP)).
A = np.array([[978, 14], [2, 6]])
C = np.array([[890, 10], [10, 90]])


def test_the_counts_of_one_image() -> None:
    a, c = lane_metrics(A), lane_metrics(C)
    assert (a["recall"], a["precision"]) == pytest.approx((0.75, 0.30))
    assert a["IoU"] == pytest.approx(0.272727, abs=1e-6)
    assert a["accuracy"] == pytest.approx(0.867944, abs=1e-6)
    assert a["pixel_accuracy"] == pytest.approx(0.984)
    assert a["mIoU"] == pytest.approx(0.628315, abs=1e-6)
    assert c["recall"] == pytest.approx(0.9)
    assert c["IoU"] == pytest.approx(0.818182, abs=1e-6)
    assert c["accuracy"] == pytest.approx(0.944444, abs=1e-6)
    # The same four numbers as those of an area.
    area = drivable_metrics(A)
    assert (area["mIoU"], area["IoU"]) == pytest.approx((a["mIoU"], a["IoU"]))
    assert area["accuracy"] == pytest.approx(0.984)


def test_pooled_and_averaged() -> None:
    pooled = lane_metrics(A + C)
    assert pooled["recall"] == pytest.approx(0.888889, abs=1e-6)
    assert pooled["IoU"] == pytest.approx(0.727273, abs=1e-6)
    assert pooled["mIoU"] == pytest.approx(0.854183, abs=1e-6)
    mean = legacy_lane_metrics([A, C], batch_size=1)
    assert mean["accuracy"] == pytest.approx(0.825)
    assert mean["IoU"] == pytest.approx(0.545455, abs=1e-6)
    # In one batch of 32 they are pooled.
    assert legacy_lane_metrics([A, C])["IoU"] == pytest.approx(pooled["IoU"])
    assert legacy_drivable_metrics([A, C])["mIoU"] == pytest.approx(pooled["mIoU"])


def test_legacy_batches_weigh_by_their_size_in_order() -> None:
    images = [A] * 32 + [C] * 8
    found = legacy_lane_metrics(images)
    assert found["IoU"] == pytest.approx((32 * 3 / 11 + 8 * 9 / 11) / 40)
    assert found["accuracy"] == pytest.approx((32 * 0.75 + 8 * 0.9) / 40)
    turned = legacy_lane_metrics(images[::-1])
    assert turned["IoU"] != pytest.approx(found["IoU"], abs=1e-3)
    assert set(found) == {"accuracy", "IoU", "mIoU"}


def test_f1_goes_with_iou_and_the_ends_are_one_and_zero() -> None:
    for counts in (A, C, A + C):
        found = lane_metrics(counts)
        assert found["f1"] == pytest.approx(2 * found["IoU"] / (1 + found["IoU"]))
    names = ("precision", "recall", "f1", "IoU", "accuracy")
    right, wrong = np.diag([900, 100]), np.diag([900, 100])[::-1]
    assert [lane_metrics(right)[name] for name in names] == [1] * 5
    assert [lane_metrics(wrong)[name] for name in names] == [0] * 5
    assert drivable_metrics(right)["mIoU"] == 1
    assert drivable_metrics(wrong)["mIoU"] == 0


def test_nothing_to_divide_by_is_zero() -> None:
    empty = np.array([[1000, 0], [0, 0]])
    found = lane_metrics(empty)
    assert (found["IoU"], found["f1"], found["recall"], found["accuracy"]) == (0, 0, 0, 0.5)
    assert legacy_lane_metrics([empty])["IoU"] == 0
    # A class that neither is there nor was found is in no mean; legacy counts it as 0.
    assert drivable_metrics(empty)["mIoU"] == 1
    assert legacy_drivable_metrics([empty])["mIoU"] == 0.5
    assert drivable_metrics(np.zeros((2, 2)))["mIoU"] == 0


def test_three_classes() -> None:
    counts = np.array([[50, 10, 0], [0, 20, 5], [0, 5, 10]])
    found = drivable_metrics(counts)
    iou = [50 / 60, 20 / 40, 10 / 20]
    assert found["mIoU"] == pytest.approx(sum(iou) / 3)
    assert (found["IoU"], found["alternative_IoU"]) == pytest.approx((0.5, 0.5))
    assert found["accuracy"] == pytest.approx(0.8)


def test_counting_leaves_the_unknown_out() -> None:
    truth = torch.tensor([[0, 1, 2], [2, 255, 1]])
    predicted = torch.tensor([[0, 1, 1], [2, 2, 0]])
    assert confusion(truth, predicted, 3).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_an_area_is_compared_at_the_networks_size_without_padding() -> None:
    # 180 x 320 pixels in an input of 96 x 160: half the size, 3 rows of padding above and below.
    truth = np.zeros((180, 320), dtype=np.uint8)
    truth[90:] = 1
    truth[:20] = 255
    box = fit((180, 320), (96, 160))
    assert (box.inner, box.top) == ((90, 160), 3)
    logits = torch.zeros(2, 96, 160)
    logits[1, 58:] = 5.0  # drivable from row 55 of the image's 90 on: 10 rows late
    logits[0, :58] = 5.0
    logits[:, :3], logits[:, 93:] = torch.tensor([0.0, 9])[:, None, None], 0  # padding is wrong
    counts = count_drivable(logits, truth, box)
    assert counts.strict.tolist() == [[35 * 160, 0], [10 * 160, 35 * 160]]
    assert counts.legacy.tolist() == counts.strict.tolist()


def test_legacy_truth_takes_the_faintest_trace_and_merges_areas() -> None:
    # A line one pixel wide, at half the size: nearest keeps it or not, an average always does.
    truth = np.zeros((192, 320), dtype=np.uint8)
    truth[:, 100], truth[:, 201] = 1, 1
    box = fit((192, 320), (96, 160))
    lane = count_lane(torch.full((1, 96, 160), -5.0), truth, box)
    assert lane.legacy[1].tolist() == [2 * 96, 0]
    assert lane.by_probability[1].sum() == 96
    # One of 200 pixels is 1.3 of 255, rounded to 1: no more than the trace that is left out.
    thin = np.zeros((96 * 14, 160 * 14), dtype=np.uint8)
    thin[0, 0], thin[50, 50:52] = 1, 1
    small = fit(thin.shape, (96, 160))
    assert count_lane(torch.zeros(1, 96, 160), thin, small).legacy[1].sum() == 1
    three = truth.copy()
    three[:, 201] = 2
    logits = torch.zeros(3, 96, 160)
    logits[2] = 1
    area = count_drivable(logits, three, box)
    assert area.strict.sum() == area.legacy.sum() == 96 * 160
    assert area.legacy[1].tolist() == [0, 2 * 96]


def test_lane_counts_at_every_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 32, 64, generator=generator) * 3
    logits[0, 0, :8] = 0.0  # a probability of exactly 0.5 is no lane
    truth = np.random.default_rng(0).choice([0, 0, 0, 1, 255], size=(32, 64)).astype(np.uint8)
    counts = count_lane(logits, truth, fit((32, 64), (32, 64)))
    near, share = torch.from_numpy(truth).long(), logits[0].sigmoid()
    assert THRESHOLDS[DEFAULT] == 0.5
    for index in (0, 12, DEFAULT, 98):
        predicted = (share > float(THRESHOLDS[index])).long()
        expected = confusion(near, predicted, 2)
        assert at_threshold(counts.by_probability, index).tolist() == expected.tolist()
    curve = lane_curve(counts.by_probability)
    assert (curve.threshold[0], curve.threshold[-1], len(curve.IoU)) == (0.01, 0.99, 99)
    at_half = lane_metrics(at_threshold(counts.by_probability))
    assert curve.recall[DEFAULT] == at_half["recall"]
    assert (np.diff(curve.recall) <= 0).all()


def test_tolerance_is_two_pixels_to_every_side() -> None:
    truth = np.zeros((64, 64), dtype=np.uint8)
    truth[:, 30] = 1

    def tolerant(column: int, unknown: slice | None = None) -> list[int]:
        logits = torch.full((1, 64, 64), -5.0)
        logits[..., column] = 5.0
        mask = truth.copy()
        if unknown is not None:
            mask[:, unknown] = 255
        return count_lane(logits, mask, fit((64, 64), (64, 64))).tolerant.tolist()

    assert tolerant(30) == [5 * 64, 5 * 64]
    assert tolerant(31) == [4 * 64, 6 * 64]
    assert tolerant(34) == [64, 9 * 64]
    assert tolerant(35) == [0, 10 * 64]
    # What is predicted in the unknown does not reach out of it, nor does anything count inside.
    assert tolerant(34, slice(33, 64)) == [0, 5 * 64]


def test_growing_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    truth = (rng.random((32, 32)) < 0.03).astype(np.uint8)
    logits = torch.from_numpy(rng.normal(size=(1, 32, 32)) - 2).float()
    predicted = (logits[0] > 0).numpy()

    def grow(mask: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero(mask)
        result = np.zeros_like(mask, dtype=bool)
        for row, column in zip(rows, columns, strict=True):
            result[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = True
        return result

    grown, grown_truth = grow(predicted), grow(truth == 1)
    expected = [int((grown & grown_truth).sum()), int((grown | grown_truth).sum())]
    assert count_lane(logits, truth, fit((32, 32), (32, 32))).tolerant.tolist() == expected


def test_half_precision_counts_as_what_it_is() -> None:
    logits = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    truth, box = np.ones((32, 32), dtype=np.uint8), fit((32, 32), (32, 32))
    assert (
        F.softmax(logits.float(), 0).argmax(0).sum()
        == count_drivable(logits, truth, box).strict[1, 1]
    )
