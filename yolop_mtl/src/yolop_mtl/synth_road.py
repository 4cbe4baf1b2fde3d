"""Generated scenes, first part: a camera on a road with lanes and markings, in metres.

World points are (X right, Y up, Z ahead) with the ground at Y = 0 below the camera. A place on the
road is (s, d): metres along it and metres to the right of the camera's path.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolop_mtl.mask_drawing import NOMINAL

Floats = NDArray[np.float64]
Weather = Literal["clear", "partly cloudy", "overcast", "rainy"]
Time = Literal["daytime", "dawn/dusk", "night"]
Place = Literal["highway", "city street", "residential"]
Role = Literal["own", "same", "oncoming", "parking"]

NEAREST = 1.0  # metres ahead of the camera; nothing is drawn nearer
FARTHEST = 80.0  # metres to which lanes and road are marked and labelled
HORIZON = 260.0  # metres to which the road is drawn


class Camera(NamedTuple):
    """A pinhole above the road: `size` (H, W), `focal`, `centre` and `horizon` in pixels."""

    size: tuple[int, int]
    focal: float
    centre: float
    horizon: float
    height: float  # metres above the ground

    @property
    def scale(self) -> float:
        """Pixels per pixel of a 1280 x 720 image."""
        return min(self.size[0] / NOMINAL[0], self.size[1] / NOMINAL[1])

    def project(self, points: Floats) -> Floats:
        """World points (..., 3) in metres -> pixels (..., 2), x and y."""
        pixels = np.empty((*points.shape[:-1], 2))
        ratio = self.focal / np.maximum(points[..., 2], NEAREST)
        pixels[..., 0] = self.centre + ratio * points[..., 0]
        pixels[..., 1] = self.horizon + ratio * (self.height - points[..., 1])
        return pixels

    @property
    def nearest_road(self) -> float:
        """Metres to a point of the ground a little below the image's lower edge."""
        return 0.85 * self.focal * self.height / (self.size[0] - self.horizon)


class Lane(NamedTuple):
    """A strip of road between two distances `left` and `right` in metres, and what drives on it."""

    left: float
    right: float
    role: Role


class Marking(NamedTuple):
    """A painted line, or two side by side.

    Attributes:
        offset: metres to the right of the camera's path, of its middle.
        category: as BDD100K has it.
        style: of its dashes.
        width: metres, of the paint.
        gap: metres between the two of a double line, 0 for a single one.
    """

    offset: float
    category: Literal["single white", "single yellow", "double yellow"]
    style: Literal["solid", "dashed"]
    width: float
    gap: float = 0.0

    @property
    def edges(self) -> tuple[float, float]:
        """What an annotator traces: both edges of the paint, of a double line the inner ones."""
        half = (self.gap or self.width) / 2
        return self.offset - half, self.offset + half


class Road(NamedTuple):
    """A road.

    Attributes:
        bend: heading at the camera, curvature and its change: X = b0 s + b1 s^2/2 + b2 s^3/6.
        lanes: from left to right.
        markings: from left to right.
        left: edge of the asphalt, metres.
        right: the other edge.
        dash: metres of paint and of a gap, and where the pattern starts.
    """

    bend: tuple[float, float, float]
    lanes: tuple[Lane, ...]
    markings: tuple[Marking, ...]
    left: float
    right: float
    dash: tuple[float, float, float]

    def points(self, s: Floats | float, d: Floats | float, up: Floats | float = 0.0) -> Floats:
        """World points (..., 3) of places on the road, `up` metres above it."""
        first, second, third = self.bend
        along = np.asarray(s, dtype=np.float64)
        slope = first + along * (second + along * (third / 2))
        middle = along * (first + along * (second / 2 + along * (third / 6)))
        # Across the road, at right angles to where it leads.
        x = d / np.sqrt(1 + slope * slope)
        z = along - x * slope
        points = np.empty((*np.broadcast(x, up).shape, 3))
        points[..., 0] = middle + x
        points[..., 1] = up
        points[..., 2] = z
        return points

    def strip(self, left: float, right: float, start: float, end: float, count: int = 48) -> Floats:
        """Outline (2 * count, 3) of the ground between two distances."""
        s = start * (end / start) ** np.linspace(0, 1, count)
        return np.concatenate([self.points(s, left), self.points(s[::-1], right)])

    def paint(self, marking: Marking, start: float, end: float) -> list[Floats]:
        """Outlines (n, 3) of what is painted of a marking: one if solid, one a dash if dashed."""
        low, high = marking.edges
        sides = [(low, high)]
        if marking.gap:
            sides = [(low - marking.width, low), (high, high + marking.width)]
        if marking.style == "solid":
            return [self.strip(left, right, start, end) for left, right in sides]
        length, gap, shift = self.dash
        starts = np.arange(-shift, end, length + gap)
        spans = [(max(first, start), min(first + length, end)) for first in starts]
        return [
            self.strip(left, right, first, last, 4)
            for left, right in sides
            for first, last in spans
            if last > first
        ]


def draw_camera(random: Generator, size: tuple[int, int]) -> Camera:
    """A camera behind a windscreen, somewhat differently mounted every time."""
    height, width = size
    return Camera(
        size,
        focal=width * random.uniform(0.78, 0.95),
        centre=width * random.uniform(0.47, 0.53),
        horizon=height * random.uniform(0.42, 0.50),
        height=random.uniform(1.35, 1.6),
    )


def draw_road(random: Generator, place: Place) -> Road:
    """A road of a kind of place: its bend, its lanes and its markings."""
    width = random.uniform(3.2, 3.75)
    bend = random.normal(0, 0.0035 if place == "highway" else 0.0025)
    if random.random() < 0.3:
        bend = 0.0
    bends = (random.normal(0, 0.012), float(np.clip(bend, -0.007, 0.007)), random.normal(0, 2e-5))
    if place == "highway":
        num_same, num_oncoming = int(random.integers(2, 5)), 0
        own = int(random.integers(num_same))
    else:
        most = 3 if place == "city street" else 2
        num_same, num_oncoming = (int(random.integers(1, most)) for _ in range(2))
        own = int(random.integers(num_same))
    # The camera is near the middle of its lane.
    first = -(own + 0.5) * width + random.normal(0, 0.15)
    roles: list[Role] = [*["oncoming"] * num_oncoming, *["same"] * num_same]  # type: ignore[list-item]
    roles[num_oncoming + own] = "own"
    start = first - num_oncoming * width
    lanes = [
        Lane(start + number * width, start + (number + 1) * width, role)
        for number, role in enumerate(roles)
    ]
    markings = _draw_markings(random, place, lanes, num_oncoming)
    shoulder = random.uniform(1.5, 3.0) if place == "highway" else random.uniform(0.3, 0.9)
    left, right = lanes[0].left - shoulder, lanes[-1].right + shoulder
    if place != "highway" and random.random() < 0.5:
        lanes.append(Lane(lanes[-1].right + 0.2, lanes[-1].right + 2.5, "parking"))
        right = lanes[-1].right + 0.2
    if place != "highway" and random.random() < 0.3:
        lanes.insert(0, Lane(lanes[0].left - 2.5, lanes[0].left - 0.2, "parking"))
        left = lanes[0].left - 0.2
    length = random.uniform(2.5, 4.0)
    dash = (length, length * random.uniform(1.5, 2.5), random.uniform(0, 3 * length))
    return Road(bends, tuple(lanes), tuple(markings), left, right, dash)


def _draw_markings(
    random: Generator, place: Place, lanes: list[Lane], num_oncoming: int
) -> list[Marking]:
    """Edges of the road, lines between lanes, and one in the middle of two directions."""
    wide = random.uniform(0.10, 0.125)
    has_edges = place == "highway" or random.random() < 0.75
    markings = []
    if has_edges:
        category: Literal["single yellow", "single white"] = (
            "single yellow" if place == "highway" else "single white"
        )
        markings.append(Marking(lanes[0].left, category, "solid", wide))
    for number, lane in enumerate(lanes[1:], 1):
        if number != num_oncoming:
            markings.append(Marking(lane.left, "single white", "dashed", wide))
        elif random.random() < 0.6:
            markings.append(Marking(lane.left, "double yellow", "solid", wide, 0.1))
        else:
            style: Literal["solid", "dashed"] = "dashed" if random.random() < 0.6 else "solid"
            markings.append(Marking(lane.left, "single yellow", style, wide))
    if has_edges:
        markings.append(Marking(lanes[-1].right, "single white", "solid", wide))
    return markings
