"""Mask files in every form that is found, read as class numbers.

The forms cannot be told apart safely by looking: official drivable masks read as YOLOP's come out
inverted. So the form is named, and the share of foreground it gives is checked over a sample.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared_utils.checkpoint import reading
from shared_utils.errors import InputError, near_miss

Kind = Literal["drivable", "lane"]
MaskFormat = Literal["binary", "value", "bits", "color", "index"]
AreaClasses = Literal["merged", "direct_only", "three"]
Mask = NDArray[np.uint8]

LANE_BACKGROUND, LANE_STYLE, LANE_DIRECTION = 8, 16, 32  # bits 3, 4, 5 of an official lane byte
DIRECT_COLOR, ALTERNATIVE_COLOR = (255, 0, 0), (0, 0, 255)
# Share of foreground that a data set may have, by kind.
SHARES: dict[str, tuple[float, float]] = {"drivable": (0.02, 0.60), "lane": (0.0, 0.10)}


class LaneByte(NamedTuple):
    """Official lane masks, pixel by pixel: each (H, W); the last three only where `is_lane`."""

    is_lane: NDArray[np.bool_]
    category: Mask
    style: Mask
    direction: Mask


def decode_lane_byte(values: Mask) -> LaneByte:
    """Take an official lane mask apart; bits 0 to 2 are the category.

    Bit 3 set is background, in 255 too.
    """
    style, direction = (
        ((values & bit) > 0).astype(np.uint8) for bit in (LANE_STYLE, LANE_DIRECTION)
    )
    return LaneByte((values & LANE_BACKGROUND) == 0, values & np.uint8(7), style, direction)


def read_mask(path: Path, kind: Kind, mask_format: str, *, classes: AreaClasses = "merged") -> Mask:
    """A mask file as class numbers, (H, W) uint8: 0 background, 1 and perhaps 2, 255 unknown.

    Args:
        path: PNG file.
        kind: drivable or lane.
        mask_format: `binary` (0 background, all else foreground: YOLOP's downloads), `value`
            (official drivable masks: 0 direct, 1 alternative, 2 background), `bits` (official lane
            masks), `color` (drivable, red direct and blue alternative) or `index` (class numbers
            and 255 as they are).
        classes: what becomes of the alternative area: `merged` (1), `direct_only` (background) or
            `three` (2). Forms that do not know it are unchanged.

    Raises: MissingFileError; InputError for a broken file, or one that cannot be of that form.
    """
    check_format(kind, mask_format)
    with reading(path, "a mask image"), Image.open(path) as image:
        values = np.asarray(image.convert("RGB") if mask_format == "color" else image)
    if mask_format == "color":
        direct, alternative = (
            (values == color).all(2) for color in (DIRECT_COLOR, ALTERNATIVE_COLOR)
        )
        return _areas(direct, alternative, classes)
    if values.ndim != 2:
        got = "x".join(map(str, values.shape))
        do = "say --data.drivable-format color (drivable masks alone), or give masks of one channel"
        raise InputError(f"{path}", f"pixels of {got}", f"one channel for '{mask_format}'", do)
    if mask_format == "binary":
        return (values > 0).astype(np.uint8)
    if mask_format == "bits":
        return decode_lane_byte(values.astype(np.uint8)).is_lane.astype(np.uint8)
    most = 2 if kind == "drivable" else 1
    if mask_format == "value":
        _check_values(path, values, (0, 1, 2), mask_format)
        return _areas(values == 0, values == 1, classes)
    _check_values(path, values, (*range(most + 1), 255), mask_format)
    return values.astype(np.uint8)


def check_format(kind: str, mask_format: str) -> None:
    """Raise InputError unless masks of that kind come in that form."""
    known = get_args(MaskFormat)
    if mask_format not in known:
        do = near_miss(mask_format, known)
        raise InputError("mask_format", f"'{mask_format}'", "a known one", do)
    other = {"value": "drivable", "color": "drivable", "bits": "lane"}.get(mask_format, kind)
    if other != kind:
        do = "take " + ("bits, binary or index" if kind == "lane" else "value, binary or index")
        raise InputError("mask_format", f"'{mask_format}' for {kind} masks", f"{other} masks", do)


def check_share(kind: Kind, mask_format: str, masks: Sequence[Mask]) -> float:
    """The share of foreground over a sample of masks, 0 to 1; 255 does not count.

    Raises: InputError where it cannot be that of a data set: the form is another, most likely.
    """
    known = sum(int((mask != 255).sum()) for mask in masks)
    found = sum(int(((mask > 0) & (mask != 255)).sum()) for mask in masks) / max(known, 1)
    least, most = SHARES[kind]
    if known and not least <= found <= most:
        raise InputError(
            f"mask_format '{mask_format}'",
            f"{found:.1%} foreground in {len(masks)} {kind} masks",
            f"{least:.0%} to {most:.0%}",
            "take the form that the masks have: value (official drivable), bits (official lane), "
            "binary (YOLOP's) or index",
        )
    return found


def _areas(direct: NDArray[np.bool_], alternative: NDArray[np.bool_], classes: AreaClasses) -> Mask:
    number = {"merged": 1, "direct_only": 0, "three": 2}[classes]
    return direct.astype(np.uint8) + alternative.astype(np.uint8) * np.uint8(number)


def _check_values(
    path: Path, values: NDArray[np.generic], allowed: Sequence[int], mask_format: str
) -> None:
    extra = sorted(set(np.unique(values).tolist()) - set(allowed))
    if extra:
        got = f"values {', '.join(map(str, extra[:5]))}"
        wanted = f"only {', '.join(map(str, allowed))} for mask_format '{mask_format}'"
        raise InputError(f"{path}", got, wanted, "name the form that the masks have")
