"""Letterboxing there and back."""

import numpy as np
import pytest
from PIL import Image

from yolop_mtl.geometry import PADDING, fit, fit_long_side

SIZES = [(720, 1280), (1080, 1920), (333, 500), (1280, 720), (1, 1), (50, 3000)]


@pytest.mark.parametrize(
    ("outer", "inner", "pad"),
    [((384, 640), (360, 640), (12, 0)), ((640, 640), (360, 640), (140, 0))],
)
def test_the_usual_frame(
    outer: tuple[int, int], inner: tuple[int, int], pad: tuple[int, int]
) -> None:
    box = fit((720, 1280), outer)
    assert (box.inner, (box.top, box.left), box.ratio) == (inner, pad, (0.5, 0.5))


def test_the_least_padding() -> None:
    assert fit_long_side((720, 1280), 640).outer == (384, 640)
    assert fit_long_side((1280, 720), 640).outer == (640, 384)
    assert fit_long_side((333, 500), 640).outer == (448, 640)
    assert fit_long_side((100, 100), 640).outer == (640, 640)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("outer", [(384, 640), (640, 640), (96, 32)])
def test_boxes_and_masks_come_back(size: tuple[int, int], outer: tuple[int, int]) -> None:
    box = fit(size, outer)
    height, width = size
    generator = np.random.default_rng(0)
    corners = np.sort(generator.random((20, 2, 2)), axis=1).reshape(20, 4)
    boxes = corners * [width, height, width, height]
    inside = box.boxes(boxes)
    assert np.allclose(box.native_boxes(inside), boxes, atol=1e-3)
    assert (inside >= [box.left, box.top] * 2).all()
    assert (inside <= [box.left + box.inner[1], box.top + box.inner[0]] * 2).all()
    assert box.native_mask(np.zeros(outer, dtype=np.uint8)).shape == size
    assert box.crop(np.zeros((2, *outer))).shape == (2, *box.inner)


def test_boxes_are_clipped_to_the_image() -> None:
    box = fit((720, 1280), (384, 640))
    assert box.native_boxes(np.array([[-9.0, 0, 700, 384]])).tolist() == [[0, 0, 1280, 720]]


def test_an_image_and_its_mask_lie_alike_with_grey_and_background_around() -> None:
    pixels = np.zeros((90, 160, 3), dtype=np.uint8)
    pixels[30:60, 40:80] = 255
    box = fit((90, 160), (96, 128))
    image, mask = box.image(pixels), box.mask((pixels[..., 0] > 0).astype(np.uint8))
    assert (box.inner, box.top, box.left) == ((72, 128), 12, 0)
    assert (image[:12] == PADDING).all()
    assert (image[84:] == PADDING).all()
    assert not mask[:12].any()
    assert ((image[..., 0] > 127)[12:84] == mask[12:84]).mean() > 0.98
    # The bright part is where its box goes.
    x1, y1, x2, y2 = box.boxes(np.array([[40.0, 30, 80, 60]]))[0].round().astype(int)
    assert mask[y1:y2, x1:x2].all()
    assert mask.sum() == (y2 - y1) * (x2 - x1)


def test_unknown_pixels_stay_unknown_and_nothing_is_mixed() -> None:
    mask = np.random.default_rng(0).choice([0, 1, 255], size=(70, 90)).astype(np.uint8)
    assert set(np.unique(fit((70, 90), (64, 64)).mask(mask))) == {0, 1, 255}


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="image: got 0 x 5 pixels, expected 1 or more; leave it"):
        fit((0, 5), (64, 64))
    with pytest.raises(ValueError, match="img_size: got 60 x 64, expected multiples of 32; round"):
        fit((5, 5), (60, 64))
    with pytest.raises(ValueError, match="img_size: got 600, expected a multiple of 32; round it"):
        fit_long_side((5, 5), 600)


@pytest.mark.parametrize("size", [(720, 1280), (333, 500), (31, 17), (1, 1)])
def test_images_are_scaled_as_pillow_does(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    box = fit(size, (96, 160))
    scaled = box.image(pixels)[box.rows, box.columns]
    height, width = box.inner
    expected = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    assert np.abs(scaled.astype(int) - np.asarray(expected)).max() <= 1
    # Views that step backwards through memory are images too.
    turned = box.image(pixels[::-1, ::-1])[box.rows, box.columns][::-1, ::-1]
    assert np.abs(turned.astype(int) - scaled).max() <= 1
