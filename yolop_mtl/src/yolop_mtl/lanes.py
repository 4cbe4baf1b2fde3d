"""Masks of lanes and of the drivable area, drawn from BDD100K's polygons.

BDD100K annotates both edges of a painted line. The masks that YOLOP published show one line in the
middle, 8 pixels wide for training and 2 for validation at 1280x720, and no generator came with
them; the rule here follows their text. Points are (x, y) pixels, a pixel's centre at half a pixel.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from shared_utils.errors import InputError

Points = NDArray[np.float64]  # (n, 2)
Mask = NDArray[np.uint8]  # (H, W)

SAMPLES = 64  # points of a line when edges are compared and averaged
MAX_GAP = 40.0  # pixels at 1280 x 720 between the edges of one painted line, on average
PIXELS_PER_STEP = 4.0  # of a curve
LONGEST_STEP = 32.0  # pixels of a line that are drawn at once


class Line(NamedTuple):
    """An edge of a painted line: `points`, and `kind`, which both edges have in common."""

    points: Points
    kind: tuple[str, ...]


class Area(NamedTuple):
    """A polygon of road: `points`, and whether it is the alternative to the car's own lane."""

    points: Points
    is_alternative: bool


def flatten_poly(
    vertices: Sequence[Sequence[float]], types: str, *, is_closed: bool = False
) -> Points:
    """Vertices with curves between them as a polyline.

    A vertex of type C is the first of two control points of a cubic Bézier curve from the vertex
    before; the vertex after both is its end, of whatever type, in a closed polygon perhaps the
    first. C without enough vertices after it counts as L.

    Args:
        vertices: (x, y) pixels.
        types: a letter L or C for each.
        is_closed: the last vertex joins the first.

    Returns: (n, 2); the first point is not repeated at the end.

    Raises: InputError for other letters, or another number of them.
    """
    if len(types) != len(vertices) or set(types) - set("LC"):
        got, do = f"'{types}' for {len(vertices)} vertices", "correct the label file"
        raise InputError("poly2d.types", got, "a letter L or C for each vertex", do)
    points = np.array(vertices, dtype=np.float64).reshape(-1, 2)
    ring = np.concatenate([points, points[:1]]) if is_closed else points
    result = [points[:1]]
    at = 1
    while at < len(points):
        if types[at] == "C" and at + 2 < len(ring):
            result.append(_bezier(ring[at - 1 : at + 3]))
            at += 3
        else:
            result.append(points[at : at + 1])
            at += 1
    flat = np.concatenate(result)
    wraps = is_closed and len(flat) > 1 and bool((flat[-1] == flat[0]).all())
    return flat[:-1] if wraps else flat


def _bezier(controls: Points) -> Points:
    """Points of a cubic curve, without its start."""
    length = np.linalg.norm(np.diff(controls, axis=0), axis=1).sum()
    count = int(np.clip(math.ceil(length / PIXELS_PER_STEP), 4, 256))
    t = np.linspace(0, 1, count + 1)[1:, None]
    a, b, c, d = controls
    curve: Points = (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c
    curve += t**3 * d
    return curve


def resample(points: Points, count: int = SAMPLES) -> Points:
    """So many points at equal distances along a polyline, both ends included."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0, along[-1], count)
    return np.stack([np.interp(wanted, along, points[:, axis]) for axis in (0, 1)], 1)


def pair_edges(lines: Sequence[Line], *, max_gap: float = MAX_GAP) -> list[Points]:
    """Centre lines: edges of one kind that lie side by side are joined, others stay as they are.

    Pairs are made from the closest on. Distance is the mean over points at equal shares of both
    lengths, in the direction that makes it smaller.

    Args:
        lines: edges; those of less than two points, or of no length, are dropped.
        max_gap: pixels that the edges of one painted line are apart at most.
    """
    usable = [line for line in lines if len(line.points) > 1 and np.ptp(line.points, axis=0).any()]
    sampled = [resample(line.points) for line in usable]
    pairs = []
    for first in range(len(usable)):
        for second in range(first + 1, len(usable)):
            if usable[first].kind != usable[second].kind:
                continue
            other = _same_direction(sampled[first], sampled[second])
            gap = float(np.linalg.norm(sampled[first] - other, axis=1).mean())
            if gap <= max_gap:
                pairs.append((gap, first, second))
    centres: dict[int, Points] = {}
    used: set[int] = set()
    for _, first, second in sorted(pairs):
        if not used & {first, second}:
            used |= {first, second}
            other = _same_direction(sampled[first], sampled[second])
            centres[first] = (sampled[first] + other) / 2
    rest = {number: line.points for number, line in enumerate(usable) if number not in used}
    return [points for _, points in sorted((centres | rest).items())]


def _same_direction(points: Points, other: Points) -> Points:
    straight, turned = (
        np.linalg.norm(points - candidate, axis=1).mean() for candidate in (other, other[::-1])
    )
    return other if straight <= turned else other[::-1]


def draw_lines(lines: Sequence[Points], size: tuple[int, int], *, width: float) -> Mask:
    """Draw polylines as 1 on 0: the pixels whose centre is less than half the width away.

    Args:
        lines: (n, 2) each.
        size: (H, W).
        width: pixels.
    """
    mask = np.zeros(size, dtype=np.uint8)
    for points in lines:
        # In steps, so that the rectangle around each is small.
        steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
        for start, end, length in zip(points[:-1], points[1:], steps, strict=True):
            ends = np.linspace(start, end, 1 + max(1, math.ceil(length / LONGEST_STEP)))
            for first, second in pairwise(ends):
                _draw_step(mask, first, second, width / 2)
    return mask


def _draw_step(mask: Mask, start: Points, end: Points, radius: float) -> None:
    limits = np.array(mask.shape[::-1])
    low = np.clip(np.floor(np.minimum(start, end) - radius), 0, limits).astype(int)
    high = np.clip(np.ceil(np.maximum(start, end) + radius), 0, limits).astype(int)
    x = np.arange(low[0], high[0]) + 0.5 - start[0]
    y = np.arange(low[1], high[1])[:, None] + 0.5 - start[1]
    dx, dy = end - start
    along = ((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12)).clip(0, 1)
    near = (x - along * dx) ** 2 + (y - along * dy) ** 2 < radius**2
    mask[low[1] : high[1], low[0] : high[0]] |= near


def draw_areas(areas: Sequence[Area], size: tuple[int, int], *, classes: str = "merged") -> Mask:
    """Fill polygons of road; the car's own lane is drawn last.

    Args:
        areas: polygons.
        size: (H, W).
        classes: `merged` (both kinds are 1), `direct_only` (the alternative is background) or
            `three` (1 direct, 2 alternative).
    """
    alternative = {"merged": 1, "direct_only": 0, "three": 2}[classes]
    height, width = size
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    for area in sorted(areas, key=lambda area: not area.is_alternative):
        if len(area.points) > 2:
            # Pillow counts from the centre of a pixel.
            corners = [(float(x), float(y)) for x, y in area.points - 0.5]
            draw.polygon(corners, fill=alternative if area.is_alternative else 1)
    return np.array(image)
