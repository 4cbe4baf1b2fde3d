"""Deep Nearest Centroids (Wang et al., ICLR 2023, arXiv 2209.07383).

Nothing is implemented yet; see README.md.
"""

__version__ = "0.0.1"
