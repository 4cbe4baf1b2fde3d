"""Images laid on a canvas and carried to the input by one matrix: pixels, masks and boxes alike.

A point is (x, y) in pixels counted from the upper left corner of the upper left pixel, so a pixel's
centre lies at a half. The canvas is never drawn: every image goes from its own pixels straight into
the input, which is quicker, and nothing is interpolated twice.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from yolop_mtl.geometry import PADDING
from yolop_mtl.samples import Sample
from yolop_mtl.targets import IGNORE

Matrix = NDArray[np.float64]  # (3, 3), of points as columns (x, y, 1)
Pixels = NDArray[np.uint8]
Rectangle = tuple[float, float, float, float]  # x1, y1, x2, y2

MIN_SIDE = 2.0  # pixels; a box that is left with less is dropped
MIN_VISIBLE = 0.1  # of a box's area
MAX_ASPECT = 20.0


class Tile(NamedTuple):
    """An image on the canvas.

    Attributes:
        sample: the image and its labels, boxes everywhere labelled or nowhere.
        matrix: from its pixels to the canvas.
        window: the part of the canvas that it may cover; it may reach beyond and is cut there.
    """

    sample: Sample
    matrix: Matrix
    window: Rectangle


class _Place(NamedTuple):
    """Where a tile is in the input.

    Attributes:
        rows: of a rectangle around it.
        columns: of the same.
        is_inside: (rows, columns), which pixels of the rectangle are its own; None: all.
    """

    rows: slice
    columns: slice
    is_inside: NDArray[np.bool_] | None


def scaled(ratio: float, left: float, top: float) -> Matrix:
    """The matrix that multiplies by `ratio` and puts the origin to (left, top)."""
    return np.array([[ratio, 0, left], [0, ratio, top], [0, 0, 1]], dtype=np.float64)


def join(tiles: Sequence[Tile], matrix: Matrix, size: tuple[int, int]) -> Sample:
    """Draw tiles into one sample; around them is grey, and known background.

    What a tile is not labelled with is unknown where the tile is: 255 in masks, False in `known`.
    What no tile is labelled with is None.

    Args:
        tiles: their windows do not overlap.
        matrix: from the canvas to the input; affine.
        size: (H, W) of the input.

    Returns: (H, W) pixels. The image is bilinear, of averages where it shrinks by 2 or more; masks
        are nearest; boxes are those around their corners, cut to window and input. A box is dropped
        that is left with sides of 2 pixels or less, a tenth of its area or less, or 20 times as
        long as wide.
    """
    image = np.full((*size, 3), PADDING, dtype=np.uint8)
    drivable, lane = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    known = np.ones(size, dtype=bool)
    boxes, labels = [np.zeros((0, 4), np.float32)], [np.zeros(0, np.int64)]
    for tile in tiles:
        sample, whole = tile.sample, matrix @ tile.matrix
        if sample.boxes_xyxy is not None and sample.labels is not None:
            moved, is_kept = _move_boxes(tile, matrix, size)
            boxes.append(moved[is_kept])
            labels.append(sample.labels[is_kept])
        place = _place(tile.window, matrix, size)
        if place is None:
            continue
        source, reduced = _reduce(sample.image, whole)
        _paint(image, _warp(source, reduced, place, cv2.INTER_LINEAR), place)
        for canvas, mask in ((drivable, sample.drivable), (lane, sample.lane)):
            if mask is None:
                _paint(canvas, IGNORE, place)
            else:
                _paint(canvas, _warp(mask, whole, place, cv2.INTER_NEAREST), place)
        _paint(known, sample.boxes_xyxy is not None, place)
    has_boxes = any(tile.sample.boxes_xyxy is not None for tile in tiles)
    return Sample(
        image,
        np.concatenate(boxes) if has_boxes else None,
        np.concatenate(labels) if has_boxes else None,
        drivable if any(tile.sample.drivable is not None for tile in tiles) else None,
        lane if any(tile.sample.lane is not None for tile in tiles) else None,
        None if known.all() or not has_boxes else known,
    )


def _place(window: Rectangle, matrix: Matrix, size: tuple[int, int]) -> _Place | None:
    """The pixels whose centre comes from inside the window; None if there are none."""
    x1, y1, x2, y2 = window
    if not (x1 < x2 and y1 < y2):
        return None
    corners = matrix[:2] @ _corners(np.array([window]))[0]  # (2, 4)
    height, width = size
    low = np.ceil(corners.min(1) - 0.5).clip(0, [width, height]).astype(int)
    high = np.ceil(corners.max(1) - 0.5).clip(0, [width, height]).astype(int)
    if not (low < high).all():
        return None
    columns, rows = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    if matrix[0, 1] == 0 and matrix[1, 0] == 0:
        return _Place(rows, columns, None)
    back = np.linalg.inv(matrix)
    x = np.arange(low[0], high[0]) + 0.5
    y = np.arange(low[1], high[1])[:, None] + 0.5
    u = back[0, 0] * x + (back[0, 1] * y + back[0, 2])
    v = back[1, 0] * x + (back[1, 1] * y + back[1, 2])
    return _Place(rows, columns, (x1 <= u) & (u < x2) & (y1 <= v) & (v < y2))


def _reduce(image: Pixels, matrix: Matrix) -> tuple[Pixels, Matrix]:
    """Average an image that shrinks by 2, 4 or 8, and the matrix from what comes out."""
    shrinking = 1 / math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    factor = 2 ** min(3, max(0, math.floor(math.log2(shrinking) + 1e-6)))
    if factor == 1:
        return image, matrix
    height, width = image.shape[:2]
    reduced = cv2.resize(
        image, (-(-width // factor), -(-height // factor)), interpolation=cv2.INTER_AREA
    )
    # To the bit where sides are no multiples, too: the image is stretched by what was rounded.
    stretch = [width / reduced.shape[1], height / reduced.shape[0], 1.0]
    return np.asarray(reduced, dtype=np.uint8), matrix @ np.diag(stretch)


def _warp(source: Pixels, matrix: Matrix, place: _Place, method: int) -> Pixels:
    """The pixels of the rectangle of a place."""
    columns, rows = place.columns, place.rows
    # OpenCV counts from the centre of the upper left pixel.
    matrix = scaled(1, -columns.start - 0.5, -rows.start - 0.5) @ matrix @ scaled(1, 0.5, 0.5)
    size = columns.stop - columns.start, rows.stop - rows.start
    # The edge goes on, so that no grey is mixed into it; what lies beyond is not painted.
    warped = cv2.warpAffine(source, matrix[:2], size, flags=method, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(warped, dtype=np.uint8)


def _paint(canvas: NDArray[Any], value: NDArray[Any] | int, place: _Place) -> None:
    """Write pixels, or a number, where the tile is."""
    part = canvas[place.rows, place.columns]
    if place.is_inside is None:
        part[...] = value
    else:
        is_inside = place.is_inside if canvas.ndim == 2 else place.is_inside[..., None]
        np.copyto(part, value, where=is_inside)


def _move_boxes(
    tile: Tile, matrix: Matrix, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes (T, 4) in the input, cut to what is visible, and which of them remain."""
    boxes = np.asarray(tile.sample.boxes_xyxy, dtype=np.float64)
    on_canvas = _around(tile.matrix, boxes)
    whole = _around(matrix, on_canvas)
    x1, y1, x2, y2 = tile.window
    visible = _around(matrix, on_canvas.clip([x1, y1, x1, y1], [x2, y2, x2, y2]))
    height, width = size
    visible = visible.clip(0, [width, height, width, height])
    sides, whole_sides = (box[:, 2:] - box[:, :2] for box in (visible, whole))
    share = sides.prod(1) / np.maximum(whole_sides.prod(1), 1e-12)
    aspect = sides.max(1, initial=0) / np.maximum(sides.min(1, initial=math.inf), 1e-12)
    is_kept = (sides > MIN_SIDE).all(1) & (share > MIN_VISIBLE) & (aspect < MAX_ASPECT)
    return visible.astype(np.float32), is_kept


def _corners(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T, 4) -> (T, 3, 4), corners as columns (x, y, 1)."""
    x, y = boxes[:, [0, 2, 2, 0]], boxes[:, [1, 1, 3, 3]]
    return np.stack([x, y, np.ones_like(x)], 1)


def _around(matrix: Matrix, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes (T, 4) around the corners of moved ones."""
    points = matrix[:2] @ _corners(boxes)  # (T, 2, 4)
    return np.concatenate([points.min(2), points.max(2)], 1)
