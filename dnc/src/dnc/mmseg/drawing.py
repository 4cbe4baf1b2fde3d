"""Predictions as pictures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Bytes = NDArray[np.uint8]
OPACITY = 0.55
BLACK = (0, 0, 0)


def colours(labels: NDArray[Any], palette: Sequence[Sequence[int]], ignored: int = 255) -> Bytes:
    """(H, W) class numbers -> (H, W, 3); what is ignored is black."""
    table = np.zeros((max(ignored, len(palette)) + 1, 3), np.uint8)
    table[: len(palette)] = np.asarray(palette, np.uint8)
    table[ignored] = BLACK
    found: Bytes = table[labels]
    return found


def overlay(image: Bytes, labels: NDArray[Any], palette: Sequence[Sequence[int]]) -> Bytes:
    """Colours of classes laid over an image (H, W, 3) of the same size; black where ignored."""
    mixed = (1 - OPACITY) * image + OPACITY * colours(labels, palette)
    return mixed.round().astype(np.uint8)


def sheet(
    rows: Sequence[Sequence[Bytes]], titles: Sequence[str], path: Path, side: int = 0
) -> None:
    """Write rows of pictures below titles as PNG.

    Args:
        rows: each of as many pictures (H, W, 3) as there are titles.
        titles: of the columns.
        path: the file.
        side: width that pictures are brought to, pixels (0: their own, at least 128).
    """
    width = side or max(128, *(picture.shape[1] for row in rows for picture in row))
    gap, top = 4, 18
    drawn = [[_resized(picture, width) for picture in row] for row in rows]
    heights = [max(picture.height for picture in row) for row in drawn]
    size = (len(titles) * (width + gap) - gap, top + sum(heights) + gap * len(heights))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        pen.text((column * (width + gap) + 2, 3), title, fill=BLACK)
    y = top
    for row, height in zip(drawn, heights, strict=True):
        for column, picture in enumerate(row):
            canvas.paste(picture, (column * (width + gap), y))
        y += height + gap
    canvas.save(path)


def png(image: Bytes) -> bytes:
    """A picture (H, W, 3) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def read_rgb(path: str | Path, size: tuple[int, int] | None = None) -> Bytes:
    """An image file as (H, W, 3), brought to `size` (H, W)."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(image)


def _resized(picture: Bytes, width: int) -> Image.Image:
    height = round(picture.shape[0] * width / picture.shape[1])
    return Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
