"""Pictures of what a network found: areas, lanes and boxes over the image, and sheets of pictures.

Colours are those of Okabe and Ito, told apart with any kind of colour vision; the area is blue, the
lanes are orange, and boxes take the other ones, with the class's name written on each.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
Color = tuple[int, int, int]

DRIVABLE: Color = (0, 114, 178)  # blue
LANE: Color = (230, 159, 0)  # orange
BOXES: tuple[Color, ...] = (
    (240, 228, 66),  # yellow
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # purple
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # green
)
DRIVABLE_SHARE, LANE_SHARE = 0.45, 0.85  # of the colour in the pixel
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
GAP = 4  # pixels between the pictures of a sheet


def overlay(
    image_rgb: Pixels,
    *,
    drivable: NDArray[np.bool_] | None = None,
    lane: NDArray[np.bool_] | None = None,
    lane_lines: Sequence[NDArray[np.float32]] = (),
    boxes_xyxy: NDArray[np.float32] | None = None,
    labels: NDArray[np.int64] | None = None,
    scores: NDArray[np.float32] | None = None,
    track_ids: NDArray[np.int64] | None = None,
    class_names: Sequence[str] = (),
    is_explained: bool = False,
) -> Pixels:
    """Draw over an image; what is None is not drawn.

    Args:
        image_rgb: (H, W, 3) uint8, unchanged.
        drivable: (H, W) bool.
        lane: (H, W) bool, drawn over the area.
        lane_lines: (m, 2) points x, y in pixels each, drawn over the lanes.
        boxes_xyxy: (T, 4) pixels; the best, which come first, are drawn on top.
        labels: (T,) class numbers, for colours and names.
        scores: (T,) 0 to 1, written behind the names.
        track_ids: (T,) numbers from 1, written behind the names; 0 is none.
        class_names: by number; a box whose class has none shows its number.
        is_explained: name the colours of the masks in the upper left corner.

    Returns: (H, W, 3) uint8.
    """
    pixels = np.array(image_rgb, order="C")
    for mask, color, share in ((drivable, DRIVABLE, DRIVABLE_SHARE), (lane, LANE, LANE_SHARE)):
        if mask is not None:
            _tint(pixels, mask, color, share)
    side = max(pixels.shape[:2])
    line = max(1, round(side / 500))
    for points in lane_lines:
        # In sixteenths of a pixel, whose centres are the whole numbers.
        corners = [(points * 16).round().astype(np.int32)]
        for color, width in ((BLACK, line + 2), (WHITE, line)):
            cv2.polylines(pixels, corners, False, color, width, cv2.LINE_AA, 4)
    size = max(10, round(side / 70))
    if boxes_xyxy is not None:
        for row in reversed(range(len(boxes_xyxy))):
            number = 0 if labels is None else int(labels[row])
            color = BOXES[number % len(BOXES)]
            x1, y1, x2, y2 = (round(float(x)) for x in boxes_xyxy[row])
            x2, y2 = max(x1 + 1, x2), max(y1 + 1, y2)
            # A dark line outside of the bright one shows on any ground.
            _frame(pixels, (x1 - 1, y1 - 1, x2 + 1, y2 + 1), BLACK, line + 2)
            _frame(pixels, (x1, y1, x2, y2), color, line)
            if text := _caption(row, labels, scores, track_ids, class_names):
                _tag(pixels, (x1, y1, y2), _label(text, color, size))
    if is_explained:
        top = 0
        for text, mask, color in (("drivable area", drivable, DRIVABLE), ("lane", lane, LANE)):
            if mask is not None:
                label = _label(text, color, size)
                _paste(pixels, (0, top), label)
                top += label.shape[0]
    return pixels


def _tint(pixels: Pixels, mask: NDArray[np.bool_], color: Color, share: float) -> None:
    """Mix a colour into the pixels of a mask, in place."""
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return
    part = pixels[rows[0] : rows[-1] + 1]
    where = np.ascontiguousarray(mask[rows[0] : rows[-1] + 1]).view(np.uint8)
    plain = np.empty_like(part)
    plain[:] = np.tile(np.array(color, dtype=np.uint8), (part.shape[1], 1))  # whole rows are fast
    # To mix all and copy what is wanted takes a tenth of the time of picking pixels by the mask.
    cv2.copyTo(cv2.addWeighted(part, 1 - share, plain, share, 0), where, part)


def _frame(pixels: Pixels, box: tuple[int, int, int, int], color: Color, width: int) -> None:
    """A line inside of a box x1, y1, x2, y2, whose ends are excluded; in place."""
    height, breadth = pixels.shape[:2]
    x1, y1, x2, y2 = (max(0, min(n, m)) for n, m in zip(box, (breadth, height) * 2, strict=True))
    inner = (box[0] + width, box[1] + width, box[2] - width, box[3] - width)
    left, top, right, bottom = (
        max(low, min(n, high))
        for n, low, high in zip(inner, (x1, y1) * 2, (x2, y2) * 2, strict=True)
    )
    pixels[y1:top, x1:x2] = pixels[bottom:y2, x1:x2] = color
    pixels[y1:y2, x1:left] = pixels[y1:y2, right:x2] = color


@lru_cache(maxsize=1024)
def _label(text: str, color: Color, size: int) -> Pixels:
    """A text on a ground of its colour; kept, since those of a video come again and again."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGB", (math.ceil(right - left) + 5, math.ceil(bottom - top) + 5), color)
    ImageDraw.Draw(image).text((2 - left, 2 - top), text, fill=BLACK, font=font)
    return np.asarray(image)


def _caption(
    row: int,
    labels: NDArray[np.int64] | None,
    scores: NDArray[np.float32] | None,
    track_ids: NDArray[np.int64] | None,
    class_names: Sequence[str],
) -> str:
    words = []
    if labels is not None:
        number = int(labels[row])
        words.append(class_names[number] if number < len(class_names) else str(number))
    if track_ids is not None and track_ids[row] > 0:
        words.append(f"#{track_ids[row]}")
    if scores is not None:
        words.append(f"{scores[row]:.2f}")
    return " ".join(words)


def _tag(pixels: Pixels, place: tuple[int, int, int], label: Pixels) -> None:
    """The caption above its box, below where there is no room; never outside of the image."""
    x1, y1, y2 = place
    height, width = label.shape[:2]
    x = max(0, min(x1, pixels.shape[1] - width))
    y = max(0, y1 - height if y1 >= height else min(y2, pixels.shape[0] - height))
    _paste(pixels, (x, y), label)


def _paste(pixels: Pixels, place: tuple[int, int], label: Pixels) -> None:
    """A label with its upper left corner at x, y, in place; what does not fit is cut off."""
    x, y = place
    target = pixels[y : y + label.shape[0], x : x + label.shape[1]]
    target[:] = label[: target.shape[0], : target.shape[1]]


def sheet(images: Sequence[Pixels], columns: int) -> Pixels:
    """Pictures side by side, row after row, on white.

    Args:
        images: (H, W, 3) uint8 each, one or more; smaller ones lie in the middle of their place.
        columns: pictures in a row.

    Raises: ValueError for no picture, or no column.
    """
    if not images or columns < 1:
        raise ValueError(f"images: got {len(images)} in {columns} columns, expected 1 or more")
    columns = min(columns, len(images))
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    rows = math.ceil(len(images) / columns)
    size = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    canvas = np.full(size, WHITE[0], dtype=np.uint8)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        top = row * (height + GAP) + (height - image.shape[0]) // 2
        left = column * (width + GAP) + (width - image.shape[1]) // 2
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas
