"""What training does to its images; spec and parents in `mosaic`."""

import math
from dataclasses import dataclass

from shared_utils.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation: it moves image, boxes and masks together; nothing is pasted in."""

    mosaic: float = 1.0
    """probability that four images are joined to one"""
    close_mosaic: int = 15
    """epochs at the end without mosaic and mixup"""
    mixup: float = 0.15
    """probability that two images, mosaics or not, are laid over each other"""
    mixup_beta: float = 32.0
    """their shares are drawn from Beta(b, b): the larger, the nearer to one half"""
    hsv: tuple[float, float, float] = (0.015, 0.7, 0.4)
    """largest change of hue, saturation and value, each a fraction, 0 to 1"""
    rotate: float = 0.0
    """largest rotation in degrees"""
    translate: float = 0.1
    """largest shift, as a fraction of the sides"""
    scale: float = 0.5
    """sizes are multiplied by 1 - scale to 1 + scale"""
    shear: float = 0.0
    """largest shear in degrees, along either axis"""
    flip: float = 0.5
    """probability that left and right are swapped"""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("mosaic", "mixup", "flip"):
            _check(name, getattr(self, name), 0, 1)
        for change in self.hsv:
            _check("hsv", change, 0, 1)
        _check("rotate", self.rotate, 0, 180)
        _check("translate", self.translate, 0, 1)
        _check("scale", self.scale, 0, 0.95)
        _check("shear", self.shear, 0, 60)
        if not 0 < self.mixup_beta < math.inf:
            raise InputError("augment.mixup_beta", self.mixup_beta, "more than 0", "correct it")
        if self.close_mosaic < 0:
            raise InputError("augment.close_mosaic", self.close_mosaic, "0 or more", "correct it")


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InputError(f"augment.{name}", value, f"{least:g} to {most:g}", "correct it")
