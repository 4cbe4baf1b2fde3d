"""What training does to images: labels stay where the pixels go."""

import numpy as np
import pytest

from yolop_mtl.augment_config import AugmentConfig
from yolop_mtl.mosaic import (
    change_hsv,
    draw_matrix,
    draw_mosaic,
    draw_sample,
    mixup,
    place_alone,
    place_four,
    unite,
)
from yolop_mtl.samples import Sample
from yolop_mtl.warp import join, scaled

from .coloured_scenes import check_labels_are_colours, empty, scene, unlabelled

SIZES = [(384, 640), (640, 640)]
PLAIN = AugmentConfig(mosaic=0, mixup=0, hsv=(0, 0, 0), translate=0, scale=0, flip=0)


def draw(config: AugmentConfig, size: tuple[int, int], seed: int, **options: bool) -> Sample:
    rng = np.random.default_rng(seed)
    return draw_sample(scene, seed % 5, 5, config, size, rng, **options)


# ---- alignment ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_labels_stay_with_their_colours(size: tuple[int, int], seed: int) -> None:
    # Mosaic, affine and flip by the defaults; then a mixup that leaves the first image's pixels.
    rng = np.random.default_rng(seed)
    sample = draw_mosaic(scene, seed, 5, AugmentConfig(), size, rng)
    check_labels_are_colours(sample)
    other = join([place_alone(empty(), size)], np.eye(3), size)
    check_labels_are_colours(mixup(sample, other, 1.0))


@pytest.mark.parametrize("seed", range(3))
def test_labels_stay_with_their_colours_alone(seed: int) -> None:
    sample = draw(AugmentConfig(mosaic=0, mixup=0, hsv=(0, 0, 0)), (384, 640), seed)
    check_labels_are_colours(sample)
    closed = draw(AugmentConfig(mixup=1, hsv=(0, 0, 0)), (384, 640), seed, close_mosaic=True)
    check_labels_are_colours(closed)


@pytest.mark.parametrize("seed", range(3))
def test_masks_stay_with_their_colours_when_turned(seed: int) -> None:
    # Boxes go around the corners of turned ones, which hug turned rectangles.
    config = AugmentConfig(rotate=20, shear=5, mixup=0, hsv=(0, 0, 0), scale=0.2)
    sample = draw(config, (384, 640), seed)
    green, blue = sample.image[..., 1] > 127, sample.image[..., 2] > 127
    assert (green == (sample.drivable == 1)).mean() > 0.998
    assert (blue == (sample.lane == 1)).mean() > 0.998


def test_an_image_alone_and_unchanged_is_the_letterboxed_one() -> None:
    sample = draw(PLAIN, (384, 640), 0)
    truth = scene(0)
    assert np.allclose(sample.boxes_xyxy, truth.boxes_xyxy / 2 + [0, 12, 0, 12])
    assert (sample.image[:12] == 114).all()
    assert (sample.image[372:] == 114).all()
    means = truth.image.reshape(360, 2, 640, 2, 3).mean((1, 3))
    assert np.abs(sample.image[12:372] - means).max() <= 1
    assert not sample.lane[:12].any()


def test_flipped_is_mirrored() -> None:
    config = AugmentConfig(mosaic=0, mixup=0, hsv=(0, 0, 0), translate=0, scale=0, flip=1)
    plain, flipped = draw(PLAIN, (384, 640), 0), draw(config, (384, 640), 0)
    assert (flipped.image == plain.image[:, ::-1]).all()
    assert np.allclose(flipped.boxes_xyxy[:, [0, 2]], 640 - plain.boxes_xyxy[:, [2, 0]], atol=1e-3)
    # A nearest pixel of a half is one or the other neighbour.
    assert (flipped.lane != plain.lane[:, ::-1]).mean() < 0.005


def test_four_tiles_meet_at_the_centre() -> None:
    samples = [Sample(np.full((360, 640, 3), grey, np.uint8)) for grey in (10, 20, 30, 40)]
    tiles = place_four(samples, (500.0, 300.0), (384, 640))
    canvas = join(tiles, np.eye(3), (768, 1280)).image[..., 0]
    # As large as fits (384x640 takes 360x640), cut at the canvas, grey beyond.
    expected = np.full((768, 1280), 114)
    expected[:300, :500], expected[:300, 500:1140] = 10, 20
    expected[300:660, :500], expected[300:660, 500:1140] = 30, 40
    assert (canvas == expected).all()


def test_what_is_cut_at_the_canvas_is_cut_alike() -> None:
    # All of the canvas is in view, and the upper tiles reach beyond it.
    tiles = place_four([scene(seed) for seed in range(4)], (320.0, 270.0), (384, 640))
    view = scaled(0.45, 32.0, 30.0)
    sample = join(tiles, view, (384, 640))
    check_labels_are_colours(sample)
    assert not (sample.image[:30] != 114).any()
    assert not (sample.image[:, :32] != 114).any()
    assert sample.boxes_xyxy[:, 0].min() >= 32
    assert sample.boxes_xyxy[:, 1].min() >= 30


def test_turned_tiles_own_the_pixels_whose_centre_is_theirs() -> None:
    greys = (10, 20, 30, 40)
    samples = [Sample(np.full((360, 640, 3), grey, np.uint8)) for grey in greys]
    tiles = place_four(samples, (700.0, 300.0), (384, 640))
    config = AugmentConfig(rotate=40, shear=10, scale=0.4)
    for seed in range(4):
        matrix = draw_matrix(config, (768, 1280), (96, 160), np.random.default_rng(seed))
        image = join(tiles, matrix, (96, 160)).image[..., 0]
        back = np.linalg.inv(matrix)
        for y, x in np.random.default_rng(seed).integers((96, 160), size=(400, 2)):
            u, v, _ = back @ [x + 0.5, y + 0.5, 1]
            expected = 114
            for tile, grey in zip(tiles, greys, strict=True):
                x1, y1, x2, y2 = tile.window
                if x1 <= u < x2 and y1 <= v < y2:
                    expected = grey
            assert image[y, x] == expected


def test_the_affine_map_by_hand() -> None:
    config = AugmentConfig(translate=0, scale=0, flip=0)
    rng = np.random.default_rng(0)
    assert np.allclose(draw_matrix(config, (768, 1280), (384, 640), rng), scaled(1, -320.0, -192.0))
    # The middle of the canvas goes to within a tenth of the input's middle.
    for _ in range(50):
        matrix = draw_matrix(AugmentConfig(rotate=30), (768, 1280), (384, 640), rng)
        x, y, _ = matrix @ [640, 384, 1]
        assert abs(x - 320) <= 64
        assert abs(y - 192) <= 38.4
        assert 0.5 <= np.sqrt(abs(np.linalg.det(matrix[:2, :2]))) <= 1.5


# ---- empty and partly labelled --------------------------------------------------------------


def test_a_mosaic_of_empty_tiles() -> None:
    rng = np.random.default_rng(0)
    sample = draw_mosaic(lambda _: empty(), 0, 1, AugmentConfig(), (384, 640), rng)
    assert sample.boxes_xyxy.shape == (0, 4)
    assert sample.labels.shape == (0,)
    assert sample.known is None
    assert not sample.drivable.any()
    assert not sample.lane.any()


def test_what_a_tile_lacks_is_unknown_where_it_is() -> None:
    tiles = [scene(0), unlabelled(scene(1)), scene(2)._replace(lane=None), empty()]
    placed = place_four(tiles, (640.0, 384.0), (384, 640))
    sample = join(placed, np.eye(3), (768, 1280))
    is_upper_right = np.zeros((768, 1280), dtype=bool)
    is_upper_right[24:384, 640:] = True
    is_lower_left = np.zeros((768, 1280), dtype=bool)
    is_lower_left[384:744, :640] = True
    assert ((sample.drivable == 255) == is_upper_right).all()
    assert ((sample.lane == 255) == (is_upper_right | is_lower_left)).all()
    assert (~sample.known == is_upper_right).all()
    assert len(sample.boxes_xyxy) == 4
    # What no tile has is not there at all, the padding included.
    none = join([tile._replace(sample=unlabelled(empty())) for tile in placed], np.eye(3), (64, 64))
    assert none[1:] == (None,) * 5


def test_masks_hold_class_numbers_only() -> None:
    def read(index: int) -> Sample:
        sample = scene(index)
        return sample if index % 2 else sample._replace(drivable=None)

    config = AugmentConfig(mixup=1, rotate=10, shear=2)
    for seed in range(4):
        sample = draw_sample(read, seed, 4, config, (192, 320), np.random.default_rng(seed))
        assert set(np.unique(sample.drivable)) <= {0, 1, 255}
        assert set(np.unique(sample.lane)) <= {0, 1}
        assert (sample.boxes_xyxy[:, 2:] - sample.boxes_xyxy[:, :2] > 2).all()
        assert (sample.boxes_xyxy >= 0).all()
        assert (sample.boxes_xyxy <= [320, 192, 320, 192]).all()
        assert len(sample.labels) == len(sample.boxes_xyxy)


# ---- mixup ----------------------------------------------------------------------------------


def test_masks_are_united() -> None:
    first = np.array([0, 0, 0, 1, 1, 1, 255, 255, 255, 2], dtype=np.uint8)
    second = np.array([0, 1, 255, 0, 1, 255, 0, 1, 255, 1], dtype=np.uint8)
    expected = [0, 1, 255, 1, 1, 1, 255, 1, 255, 2]
    assert unite(first, second).tolist() == expected
    # Without one, known foreground stays and all else is unknown.
    assert unite(first, None).tolist() == [255] * 3 + [1] * 3 + [255] * 3 + [2]
    assert unite(None, first).tolist() == unite(first, None).tolist()
    assert unite(None, None) is None


def test_mixup_joins_boxes_and_averages_pixels() -> None:
    first, second = scene(0, (360, 640)), scene(1, (360, 640), num_boxes=3)
    mixed = mixup(first, second, 0.25)
    assert len(mixed.boxes_xyxy) == 5
    assert mixed.labels.tolist() == [0, 1, 0, 1, 0]
    assert mixed.known is None
    expected = 0.25 * first.image + 0.75 * second.image
    assert np.abs(mixed.image - expected).max() <= 0.5
    assert ((mixed.lane == 1) == ((first.lane == 1) | (second.lane == 1))).all()


def test_boxes_are_known_where_both_are() -> None:
    first, second = scene(0, (360, 640)), scene(1, (360, 640))
    half = np.zeros((360, 640), dtype=bool)
    half[:, :100] = True
    assert (mixup(first, second._replace(known=half), 0.5).known == half).all()
    mixed = mixup(first, unlabelled(second), 0.5)
    assert len(mixed.boxes_xyxy) == 2
    assert not mixed.known.any()
    assert mixup(unlabelled(first), unlabelled(second), 0.5).known is None


# ---- colour, seeds, ranges ------------------------------------------------------------------


def test_hue_turns_and_brightness_scales() -> None:
    pixels = np.array([[[200, 0, 0], [0, 200, 0], [100, 100, 100]]], dtype=np.uint8)
    assert (change_hsv(pixels, np.ones(3)) == pixels).all()
    darker = change_hsv(pixels, np.array([1, 1, 0.5]))
    assert darker.tolist() == [[[100, 0, 0], [0, 100, 0], [50, 50, 50]]]
    # Red is at hue 0 and stays; green at 120 degrees goes to 60, yellow: RGB, not BGR.
    turned = change_hsv(pixels, np.array([0.5, 1, 1]))
    assert turned.tolist() == [[[200, 0, 0], [200, 200, 0], [100, 100, 100]]]
    assert (change_hsv(pixels, np.array([1.0, 0, 1]))[0, 0] == 200).all()


def test_the_same_numbers_give_the_same_image() -> None:
    first, again, other = (draw(AugmentConfig(mixup=1), (192, 320), seed) for seed in (1, 1, 2))
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one, two)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mosaic", 1.5, r"augment\.mosaic: got 1\.5, expected 0 to 1; correct it"),
        ("hsv", (0, 2, 0), r"augment\.hsv: got 2, expected 0 to 1"),
        ("scale", 1, r"augment\.scale: got 1, expected 0 to 0\.95"),
        ("rotate", float("nan"), r"augment\.rotate: got nan, expected 0 to 180"),
        ("mixup_beta", 0, r"augment\.mixup_beta: got 0, expected more than 0"),
        ("close_mosaic", -1, r"augment\.close_mosaic: got -1, expected 0 or more"),
    ],
)
def test_ranges_are_checked(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**{field: value})
