"""Pictures within a page: what is decoded from them, and how large they are."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dnc.inline import TINY, Picture, inline

from .page_data import png


def pixels(picture: Picture) -> np.ndarray:
    kind, _, data = picture.uri.partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.format, image.size) == ("PNG", (picture.width, picture.height))
        return np.asarray(image)


def of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_what_is_small_enough_stays_to_the_byte() -> None:
    given = png(3, width=40, height=20)
    picture = inline(given, 40)
    assert base64.b64decode(picture.uri.partition(",")[2]) == given
    assert (picture.width, picture.height) == (40, 20)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((80, 40), 40, (40, 20)), ((40, 80), 20, (10, 20)), ((300, 2), 100, (100, 1))],
)
def test_what_is_larger_is_reduced_in_its_proportions(
    size: tuple[int, int], side: int, expected: tuple[int, int]
) -> None:
    picture = inline(png(0, *size), side)
    assert (picture.width, picture.height) == expected
    assert pixels(picture).shape == (*expected[::-1], 3)


def test_what_is_reduced_shows_the_same() -> None:
    """Four quarters of one colour each."""
    colours = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [99, 99, 99]]], dtype=np.uint8)
    found = pixels(inline(of(colours.repeat(64, 0).repeat(64, 1)), 32)).astype(int)
    for y in range(2):
        for x in range(2):
            middle = found[16 * y + 5 : 16 * y + 11, 16 * x + 5 : 16 * x + 11]
            assert np.abs(middle - colours[y, x]).max() <= 2


@pytest.mark.parametrize(("width", "is_tiny"), [(8, True), (TINY, True), (TINY + 1, False)])
def test_only_tiny_ones_keep_sharp_pixels(width: int, is_tiny: bool) -> None:
    assert inline(png(0, width, 8), 96).is_tiny is is_tiny


@pytest.mark.parametrize("given", [b"", b"JFIF", b"\x89PNG\r\n\x1a\n"])
def test_nothing_else_than_a_png(given: bytes) -> None:
    with pytest.raises(ValueError, match=rf"^image: got {len(given)} bytes that are no PNG, expec"):
        inline(given, 8)
