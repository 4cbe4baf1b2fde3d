"""Training images drawn at random: mosaic, mixup, affine, flip and colour, for all labels at once.

Paper: YOLOPv2 names mosaic and mixup, and not what becomes of the masks. The rules here:

- Mosaic: four images around a point of a canvas of twice the input's sides, then one affine map.
- Mixup: pixels are averaged, boxes joined, masks united. Known foreground of either stays;
  otherwise what is unknown in either is unknown.
- Nothing is pasted in, which would not fit the masks.

Probabilities and ranges are YOLOv7's, with a smaller shift and scale; see `AugmentConfig`.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from yolop_mtl.augment_config import AugmentConfig
from yolop_mtl.samples import Sample
from yolop_mtl.targets import IGNORE
from yolop_mtl.warp import Matrix, Tile, join, scaled

Pixels = NDArray[np.uint8]
Reader = Callable[[int], Sample]


def draw_sample(
    read: Reader,
    index: int,
    count: int,
    config: AugmentConfig,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    close_mosaic: bool = False,
) -> Sample:
    """A training image.

    Args:
        read: gives the image of a number.
        index: the image that is to be in it.
        count: of images, of which the others are drawn.
        config: probabilities and ranges.
        size: (H, W) of the input.
        rng: all that is random comes from it.
        close_mosaic: go without mosaic and mixup.
    """

    def draw(index: int) -> Sample:
        if not close_mosaic and rng.random() < config.mosaic:
            return draw_mosaic(read, index, count, config, size, rng)
        tile = place_alone(read(index), size)
        return join([tile], draw_matrix(config, size, size, rng), size)

    sample = draw(index)
    if not close_mosaic and rng.random() < config.mixup:
        other = draw(int(rng.integers(count)))
        sample = mixup(sample, other, rng.beta(config.mixup_beta, config.mixup_beta))
    if any(config.hsv):
        gains = 1 + rng.uniform(-1, 1, 3) * config.hsv
        sample = sample._replace(image=change_hsv(sample.image, gains))
    return sample


def draw_mosaic(
    read: Reader,
    index: int,
    count: int,
    config: AugmentConfig,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> Sample:
    """Four images, that of the number and three others, in any order; arguments as above."""
    height, width = size
    centre = (
        float(rng.uniform(width / 2, 1.5 * width)),
        float(rng.uniform(height / 2, 1.5 * height)),
    )
    numbers = rng.permutation([index, *rng.integers(count, size=3)])
    tiles = place_four([read(int(number)) for number in numbers], centre, size)
    return join(tiles, draw_matrix(config, (2 * height, 2 * width), size, rng), size)


def place_alone(sample: Sample, size: tuple[int, int]) -> Tile:
    """An image in the middle of a canvas of the input's size, as large as fits."""
    (height, width), (h, w) = size, sample.image.shape[:2]
    ratio = min(height / h, width / w)
    left, top = (width - ratio * w) / 2, (height - ratio * h) / 2
    window = (left, top, left + ratio * w, top + ratio * h)
    return Tile(sample, scaled(ratio, left, top), window)


def place_four(
    samples: list[Sample], centre: tuple[float, float], size: tuple[int, int]
) -> list[Tile]:
    """Four images around a point: upper left, upper right, lower left, lower right.

    Each is scaled to fit into the input, touches the point with a corner and ends with the canvas.

    Args:
        samples: four.
        centre: (x, y) on the canvas, which is (2 H, 2 W).
        size: (H, W) of the input.
    """
    (height, width), (x, y) = size, centre
    tiles = []
    for number, sample in enumerate(samples):
        h, w = sample.image.shape[:2]
        ratio = min(height / h, width / w)
        is_left, is_upper = number % 2 == 0, number < 2
        left, top = x - ratio * w * is_left, y - ratio * h * is_upper
        # A side at the point is the point's own number, so that neighbours leave no gap.
        window = (
            max(left, 0.0),
            max(top, 0.0),
            x if is_left else min(left + ratio * w, 2.0 * width),
            y if is_upper else min(top + ratio * h, 2.0 * height),
        )
        tiles.append(Tile(sample, scaled(ratio, left, top), window))
    return tiles


def draw_matrix(
    config: AugmentConfig,
    canvas: tuple[int, int],
    size: tuple[int, int],
    rng: np.random.Generator,
) -> Matrix:
    """From the canvas to the input: scaled, turned, sheared and shifted about its middle, mirrored.

    Args:
        config: ranges.
        canvas: (H, W).
        size: (H, W) of the input.
        rng: source of randomness.
    """
    angle = math.radians(rng.uniform(-config.rotate, config.rotate))
    ratio = rng.uniform(1 - config.scale, 1 + config.scale)
    lean = np.tan(np.radians(rng.uniform(-config.shear, config.shear, 2)))
    shift = rng.uniform(0.5 - config.translate, 0.5 + config.translate, 2)
    is_flipped = rng.random() < config.flip
    cos, sin = ratio * math.cos(angle), ratio * math.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    shear = np.array([[1, lean[0], 0], [lean[1], 1, 0], [0, 0, 1]])
    matrix: Matrix = (
        scaled(1, shift[0] * size[1], shift[1] * size[0])
        @ shear
        @ turn
        @ scaled(1, -canvas[1] / 2, -canvas[0] / 2)
    )
    if is_flipped:
        matrix = np.array([[-1.0, 0, size[1]], [0, 1, 0], [0, 0, 1]]) @ matrix
    return matrix


def mixup(first: Sample, second: Sample, share: float) -> Sample:
    """Lay two images of one size over each other.

    Args:
        first: its classes win where both have foreground of different classes.
        second: the other.
        share: of the first in the pixels, 0 to 1.
    """
    image = cv2.addWeighted(first.image, share, second.image, 1 - share, 0)
    has_boxes = [sample.boxes_xyxy is not None for sample in (first, second)]
    known = None
    if any(has_boxes):
        known = _where_known(first) & _where_known(second)
    boxes = [s.boxes_xyxy for s in (first, second) if s.boxes_xyxy is not None]
    labels = [s.labels for s in (first, second) if s.labels is not None]
    return Sample(
        np.asarray(image, dtype=np.uint8),
        np.concatenate(boxes) if boxes else None,
        np.concatenate(labels) if labels else None,
        unite(first.drivable, second.drivable),
        unite(first.lane, second.lane),
        None if known is None or known.all() else known,
    )


def _where_known(sample: Sample) -> NDArray[np.bool_]:
    if sample.known is not None:
        return sample.known
    return np.full(sample.image.shape[:2], sample.boxes_xyxy is not None)


def unite(first: Pixels | None, second: Pixels | None) -> Pixels | None:
    """The union of masks (H, W) of class numbers and 255; None is 255 everywhere, of both None."""
    if first is None or second is None:
        some = second if first is None else first
        if some is None:
            return None
        return np.where(_is_foreground(some), some, np.uint8(IGNORE))
    # Where neither is foreground they hold 0 or 255.
    rest = np.where(_is_foreground(second), second, np.maximum(first, second))
    return np.where(_is_foreground(first), first, rest)


def _is_foreground(mask: Pixels) -> NDArray[np.bool_]:
    is_foreground: NDArray[np.bool_] = (mask > 0) & (mask != IGNORE)
    return is_foreground


def change_hsv(image: Pixels, gains: NDArray[np.float64]) -> Pixels:
    """Multiply hue (which goes round), saturation and value.

    Args:
        image: (H, W, 3) uint8, RGB; unchanged.
        gains: (3,), factors.
    """
    levels = np.arange(256)
    hue = (levels * gains[0]) % 180  # OpenCV's hue is in steps of 2 degrees
    rest = (levels * gains[1:, None]).clip(0, 255)
    table = np.stack([hue, *rest], 1).astype(np.uint8)[None]  # (1, 256, 3)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8)
