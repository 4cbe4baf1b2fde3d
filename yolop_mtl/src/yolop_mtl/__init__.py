"""YOLOPv2: vehicles, drivable area and lane lines in one network and one pass.

Paper: Han et al., "YOLOPv2: Better, Faster, Stronger for Panoptic Driving Perception", 2022,
arXiv 2208.11434.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from yolop_mtl.model import build_model, fuse

if TYPE_CHECKING:
    from yolop_mtl.predictor import Predictor, Result, load

__all__ = ["Predictor", "Result", "build_model", "fuse", "load"]
__version__ = "0.0.1"


def __getattr__(name: str) -> Any:
    """What prediction needs is imported when it is asked for: OpenCV alone takes a while."""
    if name in ("Predictor", "Result", "load"):
        return getattr(import_module("yolop_mtl.predictor"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
