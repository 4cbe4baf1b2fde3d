"""YOLOPv2: vehicles, drivable area and lane lines in one network and one pass.

Paper: Han et al., "YOLOPv2: Better, Faster, Stronger for Panoptic Driving Perception", 2022,
arXiv 2208.11434.
"""

from yolop_mtl.model import build_model, fuse

__all__ = ["build_model", "fuse"]
__version__ = "0.0.1"
