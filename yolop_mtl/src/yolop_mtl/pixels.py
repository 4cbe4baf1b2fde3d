"""What people have images in, as (h, w, 3) uint8 RGB."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from shared_utils.errors import InputError
from yolop_mtl.geometry import Pixels
from yolop_mtl.samples import read_image

Picture = str | Path | NDArray[np.uint8] | Image.Image | Tensor


def to_rgb(picture: Picture) -> Pixels:
    """An image of any kind as (h, w, 3) uint8 RGB; the input is not changed.

    Args:
        picture: as `Predictor` takes it.

    Raises: InputError for what is no such image; MissingFileError.
    """
    if isinstance(picture, str | Path):
        return read_image(Path(picture))
    if isinstance(picture, Image.Image):
        return _from_pil(picture)
    if isinstance(picture, Tensor):
        return _from_tensor(picture)
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    do = "pass a path, a NumPy array, a PIL image or a tensor"
    raise InputError("image", f"a {type(picture).__name__}", "an image", do)


def _from_pil(image: Image.Image) -> Pixels:
    try:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except OSError as error:  # the file behind it is read only now
        got = f"a PIL image that cannot be read ({error})"
        raise InputError("image", got, "a whole one", "open another file") from error


def _from_array(array: NDArray[np.uint8]) -> Pixels:
    expected = "(h, w, 3) uint8 RGB"
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        do = "convert it, e.g. with cv2.cvtColor"
        if array.ndim == 4:
            do = "pass a list of images"
        raise InputError("image", f"an array of shape {array.shape}", expected, do)
    if array.dtype != np.uint8:
        do = "scale it to 0 to 255 and convert it"
        raise InputError("image", f"an array of {array.dtype}", expected, do)
    return np.ascontiguousarray(array)


def _from_tensor(tensor: Tensor) -> Pixels:
    expected = "(3, h, w) RGB, uint8 or floating point from 0 to 1"
    if tensor.ndim != 3 or tensor.shape[0] != 3 or not tensor.numel():
        do = "pass a list of images" if tensor.ndim == 4 else "convert it"
        raise InputError("image", f"a tensor of shape {tuple(tensor.shape)}", expected, do)
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise InputError("image", f"a tensor of {tensor.dtype}", expected, "convert it")
    pixels = tensor.detach()
    if pixels.is_floating_point():
        low, high = pixels.min().item(), pixels.max().item()
        if not (low >= 0 and high <= 1):  # nan compares as neither
            do = "divide by 255, and undo a mean and deviation"
            raise InputError("image", f"values from {low:g} to {high:g}", expected, do)
        pixels = (pixels.float() * 255).round().byte()
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())
