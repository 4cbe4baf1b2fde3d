"""From image files to network input: decoding, the fixed preprocessing, training augmentation.

Training-time evaluation and `e2vpt predict` share one `Preprocessing`, which `model.json` stores.
Shapes: H W the network's input size, h w the size after resizing (squash: the same; crop: larger).
Paper: Sec. 4.1 (VTAB: resized straight; FGVC: short side 256 of 224, random crop and flip).
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from shared_utils import config
from shared_utils.errors import InputError

Augment = Literal["none", "flip", "crop", "crop-flip"]
Resize = Literal["squash", "crop"]

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class UnreadableImage(InputError):
    """An image that cannot be decoded; `name` is its path, `reason` says why. Pickles."""

    def __init__(self, name: str, reason: str) -> None:
        """Word the message; `name` is how the user finds the image."""
        super().__init__(f"image '{name}'", reason, "a whole image file", "restore or remove it")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type["UnreadableImage"], tuple[str, str]]:
        """Rebuild from the two parts; an exception's own way knows the message only."""
        return type(self), (self.name, self.reason)


def decode_image(source: Path | str | bytes, name: str = "") -> Image.Image:
    """Decode a file or its bytes to 8-bit RGB.

    EXIF orientation is applied; of an animated file the first frame is taken. Transparent pixels
    are laid over white. 16-bit grey is scaled, v * 255 / 65535, and rounded, not cut at 255.
    CMYK and palettes are converted by Pillow, colour profiles are not applied.

    Args:
        source: a path, or the bytes of a whole file.
        name: what errors call it (default: the path).

    Raises:
        UnreadableImage: missing, truncated, not an image, or values of unknown range (float).
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise UnreadableImage(name or _name_of(source), _reason(error)) from error


def probe_image(source: Path | str | bytes, name: str = "") -> None:
    """Read an image's header only: much faster than decoding, but blind to a truncated end.

    Raises:
        UnreadableImage: missing, empty, or not an image.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source):
            pass
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise UnreadableImage(name or _name_of(source), _reason(error)) from error


def _name_of(source: Path | str | bytes) -> str:
    return "(bytes)" if isinstance(source, bytes) else str(source)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.size and not (values.min() >= 0 and values.max() <= 65535):
            raise ValueError("grey values outside 0 to 65535")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float grey values, whose range is not known")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocessing:
    """What happens to every image at evaluation and prediction; JSON-able, stored in model.json.

    Calling it maps a PIL image of any size to float32 (3, H, W), normalised.

    Args:
        img_size: (H, W) of the network's input, pixels.
        mean: per channel, on values 0 to 1.
        std: per channel, on values 0 to 1.
        resize: squash resizes straight to (H, W). crop resizes so that the image just covers
            256/224 of (H, W), for a square input its short side to round(size * 256 / 224), and
            takes the centre.
        interpolation: antialiased when it reduces, as Pillow does.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "squash"
    interpolation: Literal["bilinear"] = "bilinear"

    def __post_init__(self) -> None:
        """Check lengths and ranges."""
        if len(list(self.img_size)) != 2 or min(self.img_size) < 1:
            raise InputError(
                "preprocessing.img_size", self.img_size, "(H, W), 1 or more", "correct it"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                "preprocessing.mean and std",
                f"{self.mean} and {self.std}",
                "three numbers each, std above 0",
                "correct them",
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image of any size -> float32 (3, H, W); the argument is unchanged."""
        return self.normalized(self.center_crop(self.resized(image)))

    def resized(self, image: Image.Image) -> Tensor:
        """RGB image of any size -> uint8 (3, h, w)."""
        height, width = self._resized_size(image.height, image.width)
        if (image.width, image.height) != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.ascontiguousarray(np.array(image).transpose(2, 0, 1)))

    def center_crop(self, pixels: Tensor) -> Tensor:
        """(3, h, w) -> (3, H, W), a view."""
        top = round((pixels.shape[1] - self.img_size[0]) / 2)
        left = round((pixels.shape[2] - self.img_size[1]) / 2)
        return self._crop(pixels, top, left)

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) -> float32 of the same shape, (x / 255 - mean) / std."""
        scale, shift = self._scale_and_shift
        return pixels.to(torch.float32).mul_(scale).add_(shift)

    def augmented(self, pixels: Tensor, kind: Augment, rng: np.random.Generator) -> Tensor:
        """Vary a training image: uint8 (3, h, w) -> uint8 (3, H, W), the argument unchanged.

        Args:
            pixels: what `resized` gives.
            kind: none (centre crop only), flip (and mirrored half the time), crop (drawn at
                random), crop-flip (both).
            rng: all randomness comes from it.
        """
        if kind in ("crop", "crop-flip"):
            top = int(rng.integers(pixels.shape[1] - self.img_size[0] + 1))
            left = int(rng.integers(pixels.shape[2] - self.img_size[1] + 1))
            pixels = self._crop(pixels, top, left)
        else:
            pixels = self.center_crop(pixels)
        return pixels.flip(-1) if kind.endswith("flip") and rng.random() < 0.5 else pixels

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return config.to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "preprocessing") -> "Preprocessing":
        """Back from `to_dict`.

        Raises:
            InputError: unknown or missing key, or a value that does not fit; named below `where`.
        """
        return config.from_dict(cls, data, where)

    def _crop(self, pixels: Tensor, top: int, left: int) -> Tensor:
        return pixels[:, top : top + self.img_size[0], left : left + self.img_size[1]]

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if self.resize == "squash":
            return self.img_size
        # The side that is short in proportion decides; the other is cut to whole pixels.
        cover_h, cover_w = (round(side * 256 / 224) for side in self.img_size)
        if cover_h * width >= cover_w * height:
            return cover_h, cover_h * width // height
        return cover_w * height // width, cover_w

    @cached_property
    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (self.mean, self.std)
        )
        return (1 / (255 * std)).float(), (-mean / std).float()
