"""Pictures of what a network found: areas, lanes and boxes over the image, and sheets of pictures.

Colours are those of Okabe and Ito, told apart with any kind of colour vision; the area is blue, the
lanes are orange, and boxes take the other ones, with the class's name written on each.
"""

import math
from collections.abc import Sequence

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
    boxes_xyxy: NDArray[np.float32] | None = None,
    labels: NDArray[np.int64] | None = None,
    scores: NDArray[np.float32] | None = None,
    class_names: Sequence[str] = (),
) -> Pixels:
    """Draw over an image; what is None is not drawn.

    Args:
        image_rgb: (H, W, 3) uint8, unchanged.
        drivable: (H, W) bool.
        lane: (H, W) bool, drawn over the area.
        boxes_xyxy: (T, 4) pixels; the best, which come first, are drawn on top.
        labels: (T,) class numbers, for colours and names.
        scores: (T,) 0 to 1, written behind the names.
        class_names: by number; a box whose class has none shows its number.

    Returns: (H, W, 3) uint8.
    """
    pixels = image_rgb.copy()
    for mask, color, share in ((drivable, DRIVABLE, DRIVABLE_SHARE), (lane, LANE, LANE_SHARE)):
        if mask is not None:
            mixed = pixels[mask] * (1 - share) + np.array(color) * share
            pixels[mask] = mixed.round().astype(np.uint8)
    if boxes_xyxy is None or not len(boxes_xyxy):
        return pixels
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    side = max(image.size)
    line = max(1, round(side / 500))
    font = ImageFont.load_default(max(10, round(side / 70)))
    for row in reversed(range(len(boxes_xyxy))):
        number = 0 if labels is None else int(labels[row])
        color = BOXES[number % len(BOXES)]
        x1, y1, x2, y2 = (float(x) for x in boxes_xyxy[row])
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)  # the last pixel inside
        # A dark line outside of the bright one shows on any ground.
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=BLACK, width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=color, width=line)
        text = _caption(row, labels, scores, class_names)
        if text:
            _tag(draw, (x1, y1, y2), text, color, font, image.size)
    return np.asarray(image)


def _caption(
    row: int,
    labels: NDArray[np.int64] | None,
    scores: NDArray[np.float32] | None,
    class_names: Sequence[str],
) -> str:
    words = []
    if labels is not None:
        number = int(labels[row])
        words.append(class_names[number] if number < len(class_names) else str(number))
    if scores is not None:
        words.append(f"{scores[row]:.2f}")
    return " ".join(words)


def _tag(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float, float],
    text: str,
    color: Color,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """The caption above its box, below where there is no room; never outside of the image."""
    x1, y1, y2 = place
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(x1, size[0] - width))
    y = y1 - height if y1 >= height else min(y2, size[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + 2 - left, y + 2 - top), text, fill=BLACK, font=font)


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
