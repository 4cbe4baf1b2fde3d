"""Deep Nearest Centroids: a classifier without parameters, whose decisions name training images.

Paper: Wang et al., "Visual Recognition with Deep Nearest Centroids", ICLR 2023, arXiv 2209.07383.
"""

from dnc.assignment import sinkhorn
from dnc.classifier import NearestCentroidHead
from dnc.fit import fit

__all__ = ["NearestCentroidHead", "fit", "sinkhorn"]
__version__ = "0.0.1"
