"""Lane masks from labelled edges, for images of any size, and mask files written whole."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from yolop_mtl.lanes import MAX_GAP, Line, draw_lines, pair_edges

NOMINAL = (720, 1280)  # (H, W) of the images in whose pixels widths and gaps are given


def lane_mask(lines: Sequence[Line], size: tuple[int, int], *, width: float) -> NDArray[np.uint8]:
    """Draw lanes as 1 on 0 along the middle of both edges; edges without a partner as they are.

    Args:
        lines: edges, in pixels of the image.
        size: (H, W) of the image.
        width: pixels at 1280 x 720; it is scaled with the image.
    """
    ratios = [side / nominal for side, nominal in zip(size, NOMINAL, strict=True)]
    centres = pair_edges(lines, max_gap=MAX_GAP * max(ratios))
    return draw_lines(centres, size, width=width * min(ratios))


def write_mask(path: Path, values: NDArray[np.uint8]) -> None:
    """Write a mask (H, W) as a PNG file, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", compress_level=1)
    # A fixed name: what a kill leaves behind is written over next time.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
