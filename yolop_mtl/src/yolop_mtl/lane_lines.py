"""Lane pixels to lines."""

import numpy as np
from numpy.typing import NDArray


def find_lane_lines(
    mask: NDArray[np.bool_], *, bridge_dashes: bool = False
) -> list[NDArray[np.float32]]:
    """Lines of a mask."""
    return []
