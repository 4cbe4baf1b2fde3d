"""Anchors: the axes, and that fitting finds what is there."""

import numpy as np
import pytest

from yolop_mtl.anchors import fit_anchors, letterboxed, measure_anchors
from yolop_mtl.boxes import check_anchors


def wide_boxes(count: int = 600, seed: int = 0) -> np.ndarray:
    """Widths about twice the heights, of all sizes, as cars have."""
    generator = np.random.default_rng(seed)
    height = generator.lognormal(3, 0.8, count).clip(3, 150)
    return np.stack([2 * height * generator.normal(1, 0.1, count).clip(0.7, 1.3), height], 1)


def test_sizes_in_the_letterboxed_image() -> None:
    sizes, images = np.array([[100.0, 50.0]] * 2), np.array([[1280.0, 720.0], [720.0, 1280.0]])
    # Half for the landscape, 384 / 1280 for the portrait.
    assert letterboxed(sizes, images, (384, 640)).tolist() == [[50, 25], [30, 15]]


def test_anchors_of_wide_boxes_are_wide() -> None:
    # Not with swapped axes, which published anchors of YOLOP have.
    anchors = np.array(fit_anchors(wide_boxes(), num_steps=50))
    assert anchors.shape == (3, 3, 2)
    assert (anchors[..., 0] > 1.3 * anchors[..., 1]).all()
    areas = anchors.reshape(9, 2).prod(1)
    assert (np.diff(areas) > 0).all()
    check_anchors(anchors.tolist(), num_scales=3)


def test_known_clusters_are_found() -> None:
    generator = np.random.default_rng(1)
    truth = np.array([[10, 8], [22, 40], [60, 30], [120, 90], [200, 60], [300, 220]], float)
    sizes = np.repeat(truth, 40, axis=0) * generator.normal(1, 0.01, (240, 2))
    anchors = np.array(fit_anchors(sizes, num_scales=2, num_steps=100)).reshape(-1, 2)
    order = truth[truth.prod(1).argsort()]
    assert np.allclose(anchors, order, rtol=0.05)
    assert measure_anchors(sizes, anchors).fitness > 0.95


def test_changes_only_make_the_fit_better_and_the_seed_decides_them() -> None:
    sizes = wide_boxes()
    plain, better, again = (
        np.array(fit_anchors(sizes, num_steps=steps)).reshape(-1, 2) for steps in (0, 200, 200)
    )
    assert measure_anchors(sizes, better).fitness > measure_anchors(sizes, plain).fitness
    assert np.array_equal(better, again)


def test_measures_by_hand() -> None:
    sizes = np.array([[10.0, 10], [20, 10], [100, 10]])
    fit = measure_anchors(sizes, np.array([[10.0, 10], [10, 20]]))
    # First: 1 and 0.5; second: 0.5 and 0.5; third: 0.1 and 0.1, no match.
    assert fit.recall == pytest.approx(2 / 3)
    assert fit.fitness == pytest.approx((1 + 0.5) / 3)
    assert fit.per_box == pytest.approx(4 / 3)


def test_too_few_boxes_are_refused() -> None:
    message = (
        "boxes: got 8 of 9 with sides of 2 pixels or more, expected 9 different sizes or more; give"
    )
    sizes = np.concatenate([wide_boxes(8) + 2, [[1.0, 1.0]]])
    with pytest.raises(ValueError, match=message):
        fit_anchors(sizes)
