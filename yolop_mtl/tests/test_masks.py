"""Mask files in every form, and the check that tells a wrong form."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from yolop_mtl.masks import check_share, decode_lane_byte, read_mask

from .label_files import write_image


def save(path: Path, values: list[list[int]]) -> Path:
    pixels = np.array(values, dtype=np.uint8)
    return write_image(path, pixels, pixels.shape)


def test_official_drivable_masks(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", [[0, 1, 2]])
    assert read_mask(path, "drivable", "value").tolist() == [[1, 1, 0]]
    assert read_mask(path, "drivable", "value", classes="direct_only").tolist() == [[1, 0, 0]]
    assert read_mask(path, "drivable", "value", classes="three").tolist() == [[1, 2, 0]]


def test_yolops_masks(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", [[0, 127, 255]])
    assert read_mask(path, "drivable", "binary").tolist() == [[0, 1, 1]]
    assert read_mask(path, "lane", "binary").tolist() == [[0, 1, 1]]


def test_official_lane_bytes(tmp_path: Path) -> None:
    # Category 3, style and direction set; the same as background; 255.
    path = save(tmp_path / "a.png", [[3 + 16 + 32, 3 + 8, 255, 0, 4]])
    assert read_mask(path, "lane", "bits").tolist() == [[1, 0, 0, 1, 1]]
    parts = decode_lane_byte(np.array([3 + 16 + 32, 4, 255], dtype=np.uint8))
    assert parts.is_lane.tolist() == [True, True, False]
    assert parts.category.tolist()[:2] == [3, 4]
    assert parts.style.tolist()[:2] == parts.direction.tolist()[:2] == [1, 0]


def test_colour_maps(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    pixels = np.array([[[255, 0, 0], [0, 0, 255], [0, 0, 0]]], dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    assert read_mask(path, "drivable", "color").tolist() == [[1, 1, 0]]
    assert read_mask(path, "drivable", "color", classes="three").tolist() == [[1, 2, 0]]
    with pytest.raises(ValueError, match="got pixels of 1x3x3, expected one channel for 'binary'"):
        read_mask(path, "drivable", "binary")


def test_class_numbers_as_they_are(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", [[0, 1, 255]])
    assert read_mask(path, "lane", "index").tolist() == [[0, 1, 255]]
    path = save(tmp_path / "b.png", [[0, 127]])
    with pytest.raises(
        ValueError, match="got values 127, expected only 0, 1, 2, 255 for mask_form"
    ):
        read_mask(path, "drivable", "index")
    with pytest.raises(
        ValueError, match="got values 127, expected only 0, 1, 2 for mask_format 'v"
    ):
        read_mask(path, "drivable", "value")


def test_the_wrong_form_is_told_by_its_foreground(tmp_path: Path) -> None:
    # A fifth of road in the official form; read as YOLOP's it comes out inverted, 80 %.
    official = np.full((10, 10), 2, dtype=np.uint8)
    official[8:] = 0
    path = write_image(tmp_path / "a.png", official, (10, 10))
    good = read_mask(path, "drivable", "value")
    assert check_share("drivable", "value", [good, good]) == pytest.approx(0.2)
    wrong = read_mask(path, "drivable", "binary")
    message = (
        "mask_format 'binary': got 80.0% foreground in 2 drivable masks, expected 2% to 60%; "
        "take the form that the masks have"
    )
    with pytest.raises(ValueError, match=message):
        check_share("drivable", "binary", [wrong, wrong])
    lanes = np.full((10, 10), 255, dtype=np.uint8)
    path = write_image(tmp_path / "b.png", lanes, (10, 10))
    assert check_share("lane", "bits", [read_mask(path, "lane", "bits")]) == 0
    with pytest.raises(ValueError, match=r"got 100.0% foreground in 1 lane masks, expected 0% to"):
        check_share("lane", "binary", [read_mask(path, "lane", "binary")])


def test_unknown_pixels_do_not_count_in_the_share() -> None:
    mask = np.array([[1, 0, 0, 0, 255, 255]], dtype=np.uint8)
    assert check_share("drivable", "index", [mask]) == 0.25


@pytest.mark.parametrize(
    ("kind", "mask_format", "message"),
    [
        ("lane", "bit", r"mask_format: got 'bit', expected a known one; did you mean 'bits'\?"),
        ("lane", "value", "mask_format: got 'value' for lane masks, expected drivable masks; take"),
        ("drivable", "bits", "mask_format: got 'bits' for drivable masks, expected lane masks; ta"),
    ],
)
def test_wrong_forms_are_refused(kind: str, mask_format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mask(Path("a.png"), kind, mask_format)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.png: got no such file, expected a mask image"):
        read_mask(tmp_path / "a.png", "lane", "binary")
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.png: got a damaged or unreadable file"):
        read_mask(tmp_path / "b.png", "lane", "binary")


@pytest.mark.parametrize("name", ["9981a740", "9cc4a501"])
def test_published_lane_masks(papers_data: Path, name: str) -> None:
    folder = papers_data / "driving_samples/bdd100k_labels"
    path = folder / f"lane_bitmask_fe189115-{name}.png"
    mask = read_mask(path, "lane", "bits")
    assert mask.shape == (720, 1280)
    raw = np.asarray(Image.open(path))
    assert mask.sum() == (raw != 255).sum()
    assert 0 < check_share("lane", "bits", [mask]) < 0.02
    with pytest.raises(ValueError, match="foreground in 1 lane masks"):
        check_share("lane", "binary", [read_mask(path, "lane", "binary")])
