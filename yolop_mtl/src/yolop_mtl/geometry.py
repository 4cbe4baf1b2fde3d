"""Letterboxing: from an image of any size to the network's input and back.

Used by training, validation, prediction and export alike. Sizes are (H, W) pixels, points (x, y).
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from shared_utils.errors import InputError
from yolop_mtl.model import MAX_STRIDE

PADDING = 114  # grey of what is added to an image; masks get 0, known background

Pixels = NDArray[np.uint8]
Boxes = NDArray[np.float64]  # (T, 4)


class Letterbox(NamedTuple):
    """How an image lies in the input: scaled to `inner`, with `top` and `left` pixels before it.

    Attributes:
        size: of the image.
        inner: of the scaled image.
        outer: of the input.
        top: rows of padding above; below are as many or one more.
        left: columns of padding to the left; to the right are as many or one more.
    """

    size: tuple[int, int]
    inner: tuple[int, int]
    outer: tuple[int, int]
    top: int
    left: int

    @property
    def ratio(self) -> tuple[float, float]:
        """Pixels of the input per pixel of the image, down and across; equal up to rounding."""
        return self.inner[0] / self.size[0], self.inner[1] / self.size[1]

    @property
    def rows(self) -> slice:
        """Those of the input that the image fills."""
        return slice(self.top, self.top + self.inner[0])

    @property
    def columns(self) -> slice:
        """Those of the input that the image fills."""
        return slice(self.left, self.left + self.inner[1])

    def image(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) -> the input, bilinear (of averages where it shrinks), grey around."""
        canvas = np.full((*self.outer, 3), PADDING, dtype=np.uint8)
        canvas[self.rows, self.columns] = _resize(pixels, self.inner, is_mask=False)
        return canvas

    def mask(self, values: Pixels) -> Pixels:
        """(H, W) class numbers -> those of the input, nearest, background around."""
        canvas = np.zeros(self.outer, dtype=np.uint8)
        canvas[self.rows, self.columns] = _resize(values, self.inner, is_mask=True)
        return canvas

    def crop(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """(..., H, W) in the input -> without the padding."""
        return values[..., self.rows, self.columns]

    def native_mask(self, values: Pixels) -> Pixels:
        """(H, W) class numbers in the input -> those of the image, at its size, nearest."""
        inner = np.ascontiguousarray(values[self.rows, self.columns])
        return _resize(inner, self.size, is_mask=True)

    def boxes(self, boxes_xyxy: Boxes) -> Boxes:
        """Boxes (T, 4) of the image -> of the input."""
        down, across = self.ratio
        result: Boxes = boxes_xyxy * [across, down, across, down]
        result += [self.left, self.top, self.left, self.top]
        return result

    def native_boxes(self, boxes_xyxy: Boxes) -> Boxes:
        """Boxes (T, 4) of the input -> of the image, clipped to it."""
        down, across = self.ratio
        moved = boxes_xyxy - np.array([self.left, self.top] * 2)
        height, width = self.size
        result: Boxes = (moved / np.array([across, down] * 2)).clip(0, [width, height] * 2)
        return result


def fit(size: tuple[int, int], outer: tuple[int, int]) -> Letterbox:
    """Scale an image to fit into an input of a fixed size, in its middle.

    Raises: InputError where a side of the image is 0, or of the input no multiple of 32.
    """
    if min(size) < 1:
        raise InputError("image", f"{size[0]} x {size[1]} pixels", "1 or more", "leave it out")
    if any(side < MAX_STRIDE or side % MAX_STRIDE for side in outer):
        got, do = f"{outer[0]} x {outer[1]}", "round them"
        raise InputError("img_size", got, f"multiples of {MAX_STRIDE}", do)
    ratio = min(outer[0] / size[0], outer[1] / size[1])
    height, width = (
        min(limit, max(1, round(side * ratio))) for side, limit in zip(size, outer, strict=True)
    )
    return Letterbox(
        size, (height, width), outer, (outer[0] - height) // 2, (outer[1] - width) // 2
    )


def fit_long_side(size: tuple[int, int], long_side: int) -> Letterbox:
    """Scale the longer side to `long_side` and pad the other to the next multiple of 32.

    Raises: as `fit`; also where `long_side` is no multiple of 32.
    """
    longest = max(*size, 1)
    outer = [max(1, -(-round(side * long_side / longest) // MAX_STRIDE)) for side in size]
    outer[int(size[1] >= size[0])] = -(-long_side // MAX_STRIDE)
    if long_side % MAX_STRIDE:
        raise InputError("img_size", long_side, f"a multiple of {MAX_STRIDE}", "round it")
    return fit(size, (outer[0] * MAX_STRIDE, outer[1] * MAX_STRIDE))


def _resize(pixels: Pixels, size: tuple[int, int], *, is_mask: bool) -> Pixels:
    if pixels.shape[:2] == size:
        return pixels
    height, width = size
    if is_mask:
        method = Image.Resampling.NEAREST
        return np.asarray(Image.fromarray(pixels).resize((width, height), method))
    # Averages over the whole area of a new pixel where it shrinks: Pillow's bilinear filter, within
    # one level, in a fifth of the time.
    whole = np.require(pixels, requirements=["C", "W"])  # what torch takes without a warning
    planes = torch.from_numpy(whole).permute(2, 0, 1)[None]
    scaled = F.interpolate(planes, size, mode="bilinear", align_corners=False, antialias=True)
    return np.ascontiguousarray(scaled[0].permute(1, 2, 0).numpy())
