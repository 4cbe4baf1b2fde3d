"""Overlays, sheets and curves."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from yolop_mtl.box_metrics import box_metrics
from yolop_mtl.curves import draw_box_curves, draw_lane_curve
from yolop_mtl.draw import BOXES, DRIVABLE, LANE, overlay, sheet
from yolop_mtl.mask_metrics import lane_curve

from .box_sets import random_set

GREY = np.full((120, 200, 3), 128, dtype=np.uint8)
BOX = np.array([[60.0, 50, 120, 90]], dtype=np.float32)


def test_masks_are_mixed_where_they_are_and_lanes_lie_on_top() -> None:
    drivable, lane = np.zeros((2, 120, 200), dtype=bool)
    drivable[60:], lane[60:, 90:100] = True, True
    image = GREY.copy()
    drawn = overlay(image, drivable=drivable, lane=lane)
    assert (image == GREY).all()
    assert (drawn.shape, drawn.dtype) == (GREY.shape, np.uint8)
    assert (drawn[:60] == 128).all()
    expected = [round(128 * 0.55 + 0.45 * c) for c in DRIVABLE]
    assert drawn[80, 20].tolist() == expected
    near_lane = [round(0.15 * e + 0.85 * c) for e, c in zip(expected, LANE, strict=True)]
    assert np.abs(drawn[80, 95].astype(int) - near_lane).max() <= 1
    assert (overlay(GREY) == GREY).all()


def test_a_box_hugs_its_pixels_and_carries_its_name() -> None:
    drawn = overlay(
        GREY,
        boxes_xyxy=BOX,
        labels=np.array([1]),
        scores=np.array([0.5], dtype=np.float32),
        class_names=("car", "truck"),
    )
    color = np.array(BOXES[1])
    assert (drawn[50, 60:120] == color).all()
    assert (drawn[50:90, 119] == color).all()
    assert (drawn[60:80, 70:110] == 128).all()
    # The name lies above the box, dark on the box's colour.
    tag = drawn[36:48, 60:100].reshape(-1, 3)
    assert (tag == color).all(1).mean() > 0.3
    assert (tag.sum(1) < 150).any()
    bare = overlay(GREY, boxes_xyxy=BOX)
    assert (bare[36:48] == 128).all()
    assert (bare[50, 60:120] == BOXES[0]).all()


def test_names_stay_in_the_picture_and_the_best_box_is_on_top() -> None:
    # At the upper edge the name goes below; a class without a name shows its number.
    top = np.array([[150.0, 0, 200, 30]], dtype=np.float32)
    drawn = overlay(GREY, boxes_xyxy=top, labels=np.array([7]))
    below = drawn[33:42, 150:160].reshape(-1, 3)
    assert (below == np.array(BOXES[7 % len(BOXES)])).all(1).any()
    both = overlay(GREY, boxes_xyxy=np.repeat(BOX, 2, 0), labels=np.array([1, 0]))
    assert (both[50, 60:120] == BOXES[1]).all()
    # Outside of the image and of no size: nothing breaks.
    odd = np.array([[-50, -50, -10, -10], [10, 10, 10, 10], [190, 110, 260, 190]], np.float32)
    assert overlay(GREY, boxes_xyxy=odd, labels=np.zeros(3, int)).shape == GREY.shape
    assert overlay(GREY[:1, :1], boxes_xyxy=odd, labels=np.zeros(3, int)).shape == (1, 1, 3)
    assert (overlay(GREY, boxes_xyxy=np.zeros((0, 4), np.float32)) == GREY).all()


def test_lane_lines_are_white_on_black() -> None:
    line = np.array([[20.0, 100], [100, 20]], dtype=np.float32)
    drawn = overlay(GREY, lane_lines=[line])
    assert (drawn[60, 60] == 255).all()
    assert (drawn[20:100].min(2) < 60).any()
    assert (drawn[:10] == 128).all()
    assert (overlay(GREY, lane_lines=[]) == GREY).all()


def test_a_track_has_its_number_and_none_has_none() -> None:
    def drawn(number: int) -> np.ndarray:
        return overlay(GREY, boxes_xyxy=BOX, labels=np.array([0]), track_ids=np.array([number]))

    plain = overlay(GREY, boxes_xyxy=BOX, labels=np.array([0]))
    assert (drawn(0) == plain).all()
    assert (drawn(7) != plain).any()
    assert (drawn(7) != drawn(8)).any()


def test_colours_are_explained() -> None:
    mask = np.zeros((120, 200), dtype=bool)
    both = overlay(GREY, drivable=mask, lane=mask, is_explained=True)
    rows = [(both[:, 1] == np.array(color)).all(1) for color in (DRIVABLE, LANE)]
    assert min(row.sum() for row in rows) >= 8
    assert rows[0].argmax() == 0
    assert rows[1].argmax() == rows[0].sum()  # one below the other
    assert (both[60:] == 128).all()
    only = overlay(GREY, lane=mask, is_explained=True)
    assert not (only == np.array(DRIVABLE)).all(2).any()
    assert (overlay(GREY, is_explained=True) == GREY).all()


def test_a_sheet() -> None:
    black, small = np.zeros((20, 30, 3), np.uint8), np.zeros((10, 10, 3), np.uint8)
    drawn = sheet([black, small, black], 2)
    assert drawn.shape == (44, 64, 3)
    assert not drawn[:20, :30].any()
    assert not drawn[5:15, 44:54].any()
    assert (drawn[:5, 34:] == 255).all()
    assert (drawn[24:, 34:] == 255).all()
    assert sheet([black], 5).shape == black.shape
    with pytest.raises(ValueError, match="images: got 0 in 2 columns, expected 1 or more"):
        sheet([], 2)


def test_curves_are_pictures(tmp_path: Path) -> None:
    _, curves = box_metrics(random_set(0), 4)  # the last class has no truth
    assert curves is not None
    draw_box_curves(curves, ("car", "bus", "truck", "train"), tmp_path / "boxes.png")
    counts = np.random.default_rng(0).integers(50, size=(2, 100))
    draw_lane_curve(lane_curve(counts), tmp_path / "lanes.png")
    for name in ("boxes.png", "lanes.png"):
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
