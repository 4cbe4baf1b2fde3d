"""YOLOPv2, panoptic driving perception (Han et al., 2022, arXiv 2208.11434).

Nothing is implemented yet; see README.md.
"""

__version__ = "0.0.1"
