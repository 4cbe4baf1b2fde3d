"""Generated scenes, second part: vehicles and buildings as coloured polygons in space.

A solid has its own frame, in metres: u to the right, v up, t from its rear to its front. A polygon
lists its corners so that they run lower left, lower right, upper right, upper left for someone who
looks at it from outside; seen from behind it is not drawn.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Colour = tuple[float, float, float]  # RGB, 0 to 255
Kind = Literal["car", "bus", "truck", "train"]
Face = Literal["rear", "front", "left", "right", "top"]

CORNERS = 10  # of a polygon; those with fewer repeat the last one
REPEATED = [0, 1, 2] + [3] * (CORNERS - 3)
ANGLES = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
SINE, COSINE = np.sin(ANGLES), np.cos(ANGLES)
NOTHING = [(0.0, 0.0, 0.0)] * 4
GLASS, TYRE, DARK, HUB = (38, 46, 56), (22, 22, 24), (34, 34, 36), (150, 152, 155)
TAIL, HEAD, PLATE = (170, 22, 18), (232, 232, 222), (226, 224, 205)
TAIL_LIT, HEAD_LIT, WINDOW_LIT = (255, 46, 30), (255, 250, 228), (255, 214, 140)
PAINTS: Sequence[Colour] = (
    (226, 227, 228), (238, 238, 236), (172, 175, 178), (120, 124, 129), (60, 62, 66), (30, 31, 34),
    (142, 26, 28), (28, 58, 112), (44, 84, 128), (42, 66, 52), (164, 152, 128), (116, 42, 36),
)  # fmt: skip
BUS_PAINTS: Sequence[Colour] = (
    (232, 232, 230), (214, 160, 30), (172, 36, 34), (40, 88, 150), (58, 120, 76),
)  # fmt: skip
CARGO_PAINTS: Sequence[Colour] = (
    (236, 236, 234), (222, 222, 218), (196, 170, 110), (60, 92, 140), (150, 44, 40), (98, 112, 98),
)  # fmt: skip
WALLS: Sequence[Colour] = (
    (156, 116, 96), (178, 168, 152), (132, 130, 128), (190, 176, 148), (112, 92, 84),
    (148, 156, 164),
)  # fmt: skip
SIDES: tuple[Face, Face] = ("left", "right")
ENDS: tuple[Face, Face] = ("rear", "front")
# Light that each face gets, as a share.
SHADES: dict[Face, float] = {"rear": 0.86, "front": 0.86, "left": 0.72, "right": 1.0, "top": 1.12}


class Polygons(NamedTuple):
    """Polygons of a solid, in the order in which they are painted.

    Attributes:
        corners: (n, CORNERS, 3).
        colours: (n, 3) RGB, 0 to 255, shaded.
        is_lit: (n,) bool; such polygons are bright at night.
    """

    corners: Floats
    colours: Floats
    is_lit: NDArray[np.bool_]


Corners = Floats | Sequence[tuple[float, float, float]]  # (4, 3)
WHOLE = (0.0, 1.0, 0.0, 1.0)


class Builder:
    """Collects the polygons of a solid.

    Attributes:
        is_night: lamps and some windows are lit.
    """

    def __init__(self, *, is_night: bool) -> None:
        self.is_night = is_night
        self._faces: list[Corners] = []
        self._parts: list[tuple[float, float, float, float]] = []
        self._rings: dict[int, Floats] = {}
        self._colours: list[Colour] = []
        self._is_lit: list[bool] = []

    def add(
        self,
        face: Corners,
        colour: Colour,
        *,
        part: tuple[float, float, float, float] = WHOLE,
        lit: Colour | None = None,
    ) -> None:
        """Add a part of a face: shares from its left, and from its lower side.

        At night it has the colour `lit`, if given.
        """
        is_lit = self.is_night and lit is not None
        self._faces.append(face)
        self._parts.append(part)
        self._colours.append(lit if is_lit and lit is not None else colour)
        self._is_lit.append(is_lit)

    def box(
        self,
        u: tuple[float, float],
        v: tuple[float, float],
        t: tuple[float, float],
        colour: Colour,
        inset: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> dict[Face, Corners]:
        """Add a box whose top is smaller by `inset`: at the sides, the rear and the front.

        Returns: the corners (4, 3) of each face.
        """
        side, rear, front = inset
        low = [(u[0], v[0], t[0]), (u[1], v[0], t[0]), (u[1], v[0], t[1]), (u[0], v[0], t[1])]
        a, b = u[0] + side, u[1] - side
        c, d = t[0] + rear, t[1] - front
        high = [(a, v[1], c), (b, v[1], c), (b, v[1], d), (a, v[1], d)]
        faces: dict[Face, Corners] = {
            "top": high,
            "front": [low[2], low[3], high[3], high[2]],
            "left": [low[3], low[0], high[0], high[3]],
            "right": [low[1], low[2], high[2], high[1]],
            "rear": [low[0], low[1], high[1], high[0]],
        }
        red, green, blue = colour
        for face, corners in faces.items():
            share = SHADES[face]
            self.add(corners, (red * share, green * share, blue * share))
        return faces

    def patch(
        self,
        face: Corners,
        across: tuple[float, float],
        up: tuple[float, float],
        colour: Colour,
        *,
        lit: Colour | None = None,
    ) -> None:
        """Add a part of a face; shares from its left, and from its lower side."""
        self.add(face, colour, part=(*across, *up), lit=lit)

    def wheels(self, half: float, places: Sequence[float], radius: float) -> None:
        """Add wheels on both sides at distances from the rear."""
        for t in places:
            for side in (-1.0, 1.0):
                for share, colour in ((1.0, TYRE), (0.55, HUB)):
                    ring = np.empty((CORNERS, 3))
                    # Seen from the right the circle runs forward first, from the left backward.
                    ring[:, 0] = side * (half + 0.01)
                    ring[:, 1] = radius * (1 - share * COSINE)
                    ring[:, 2] = t + share * radius * side * SINE
                    self._rings[len(self._faces)] = ring
                    self.add(NOTHING, colour)

    def under(self, half: float, length: float, up: float) -> None:
        """Add the dark below a body and its tyres, as seen from behind and from ahead."""
        for t, order in ((0.5, 1), (length - 0.5, -1)):
            for left, right, low, colour in (
                (-half * 0.95, half * 0.95, 0.4 * up, DARK),
                (-half * 0.98, -half * 0.70, 0.0, TYRE),
                (half * 0.70, half * 0.98, 0.0, TYRE),
            ):
                x = (left, right)[::order]
                self.add([(x[0], low, t), (x[1], low, t), (x[1], up, t), (x[0], up, t)], colour)

    def windows(
        self, random: Generator, face: Corners, *, columns: int, rows: int, low: float, high: float
    ) -> None:
        """Add a grid of windows to a face, between two shares of its height."""
        step = (high - low) / rows
        tones = random.uniform(0.8, 1.7, (rows, columns)).tolist()
        lamps = (random.random((rows, columns)) < 0.35).tolist()
        for row in range(rows):
            up = low + (row + 0.22) * step, low + (row + 0.8) * step
            for column in range(columns):
                across = (column + 0.25) / columns, (column + 0.75) / columns
                tone, lit = tones[row][column], WINDOW_LIT if lamps[row][column] else None
                colour = (GLASS[0] * tone, GLASS[1] * tone, GLASS[2] * tone)
                self.add(face, colour, part=(*across, *up), lit=lit)

    def done(self) -> Polygons:
        """What was added."""
        faces = np.array(self._faces, dtype=np.float64)  # (n, 4, 3)
        parts = np.array(self._parts)
        across = parts[:, [0, 1, 1, 0], None]
        up = parts[:, [2, 2, 3, 3], None]
        low = faces[:, None, 0] + across * (faces[:, None, 1] - faces[:, None, 0])
        high = faces[:, None, 3] + across * (faces[:, None, 2] - faces[:, None, 3])
        corners = (low + up * (high - low))[:, REPEATED]
        for row, ring in self._rings.items():
            corners[row] = ring
        return Polygons(corners, np.array(self._colours), np.array(self._is_lit, dtype=bool))


class Model(NamedTuple):
    """A vehicle in its own frame: its parts from rear to front, and its size in metres."""

    parts: tuple[Polygons, ...]
    length: float
    width: float
    height: float


def build_vehicle(kind: Kind, random: Generator, *, is_night: bool) -> Model:
    """A vehicle of a kind, in a size, shape and colour of its own."""
    return {"car": _car, "bus": _bus, "truck": _truck, "train": _train}[kind](random, is_night)


def _pick(random: Generator, paints: Sequence[Colour]) -> Colour:
    red, green, blue = paints[int(random.integers(len(paints)))]
    tone = random.uniform(0.9, 1.05)
    return min(255.0, red * tone), min(255.0, green * tone), min(255.0, blue * tone)


def _car(random: Generator, is_night: bool) -> Model:
    style = ("sedan", "hatch", "suv", "van")[int(random.choice(4, p=[0.4, 0.22, 0.26, 0.12]))]
    length, width, height = {
        "sedan": (4.6, 1.82, 1.46), "hatch": (4.1, 1.78, 1.5), "suv": (4.7, 1.92, 1.75),
        "van": (5.0, 1.95, 1.98),
    }[style]  # fmt: skip
    length, width, height = (side * random.uniform(0.96, 1.05) for side in (length, width, height))
    half, waist = width / 2, 0.6 * height
    paint = _pick(random, PAINTS)
    built = Builder(is_night=is_night)
    built.under(half, length, 0.36)
    body = built.box((-half, half), (0.26, waist), (0, length), paint, (0.05, 0.06, 0.1))
    for face in ENDS:
        built.patch(body[face], (0, 1), (0, 0.24), tuple(0.45 * c for c in paint))  # type: ignore[arg-type]
        built.patch(body[face], (0.36, 0.64), (0.3, 0.5), PLATE)
    for left, right in ((0.02, 0.2), (0.8, 0.98)):
        built.patch(body["rear"], (left, right), (0.58, 0.86), TAIL, lit=TAIL_LIT)
        built.patch(body["front"], (left, right), (0.58, 0.82), HEAD, lit=HEAD_LIT)
    built.patch(body["front"], (0.24, 0.76), (0.55, 0.8), DARK)
    for face in SIDES:
        built.patch(body[face], (0, 1), (0, 0.12), DARK)
        built.patch(body[face], (0.5, 0.51), (0.12, 0.95), DARK)
    built.wheels(half, (0.85, length - 0.85), 0.33)
    rear, slope = {
        "sedan": (0.5, 0.55), "hatch": (0.05, 0.4), "suv": (0.05, 0.22), "van": (0.03, 0.08)
    }[style]  # fmt: skip
    ahead = length - (0.7 if style == "van" else 1.15)
    cabin = built.box(
        (0.05 - half, half - 0.05), (waist, height), (rear, ahead), paint, (0.17, slope, 0.75)
    )
    built.patch(cabin["rear"], (0.08, 0.92), (0.14, 0.86), GLASS)
    built.patch(cabin["rear"], (0.08, 0.92), (0.62, 0.86), (86, 98, 110))
    built.patch(cabin["front"], (0.05, 0.95), (0.08, 0.9), GLASS)
    for face in SIDES:
        for across in ((0.1, 0.47), (0.52, 0.9)):
            built.patch(cabin[face], across, (0.12, 0.85), GLASS)
    return Model((built.done(),), length, width, height)


def _bus(random: Generator, is_night: bool) -> Model:
    length, width, height = random.uniform(9, 12.5), 2.5, random.uniform(2.9, 3.3)
    half, paint, other = width / 2, _pick(random, BUS_PAINTS), _pick(random, BUS_PAINTS)
    built = Builder(is_night=is_night)
    built.under(half, length, 0.5)
    body = built.box((-half, half), (0.35, height), (0, length), paint, (0.06, 0.05, 0.1))
    built.patch(body["rear"], (0.1, 0.9), (0.56, 0.84), GLASS, lit=(120, 112, 88))
    built.patch(body["rear"], (0.2, 0.8), (0.1, 0.34), DARK)
    built.patch(body["front"], (0.05, 0.95), (0.36, 0.8), GLASS, lit=(120, 112, 88))
    built.patch(body["front"], (0.2, 0.8), (0.84, 0.94), DARK, lit=(255, 170, 40))
    for left, right in ((0.03, 0.13), (0.87, 0.97)):
        built.patch(body["rear"], (left, right), (0.14, 0.36), TAIL, lit=TAIL_LIT)
        built.patch(body["front"], (left, right), (0.1, 0.2), HEAD, lit=HEAD_LIT)
    for face in SIDES:
        built.patch(body[face], (0, 1), (0.24, 0.34), other)
        for number in range(7):
            across = (0.03 + number * 0.137, 0.03 + number * 0.137 + 0.118)
            built.patch(body[face], across, (0.46, 0.84), GLASS, lit=(210, 196, 150))
    built.wheels(half, (2.2, length - 2.6), 0.48)
    return Model((built.done(),), length, width, height)


def _truck(random: Generator, is_night: bool) -> Model:
    length, width, height = random.uniform(6.5, 13.5), 2.45, random.uniform(3.0, 3.9)
    half, cab = width / 2, 2.2
    cargo = Builder(is_night=is_night)
    cargo.under(half, length - cab, 0.6)
    cargo.box((-half, half), (0.55, 0.95), (0, length - cab), DARK)
    paint = _pick(random, CARGO_PAINTS)
    body = cargo.box((-half, half), (0.95, height), (0, length - cab - 0.3), paint)
    seam: Colour = (paint[0] * 0.55, paint[1] * 0.55, paint[2] * 0.55)
    cargo.patch(body["rear"], (0.492, 0.508), (0.02, 0.98), seam)
    for up in ((0, 0.035), (0.965, 1)):
        cargo.patch(body["rear"], (0, 1), up, seam)
    for across in ((0.25, 0.28), (0.72, 0.75)):
        cargo.patch(body["rear"], across, (0.05, 0.95), seam)
    band = _pick(random, PAINTS)
    for face in SIDES:
        cargo.patch(body[face], (0.2, 0.8), (0.4, 0.65), band)
    y = (0.55, 0.55, 0.85, 0.85)
    for left, right in ((-half, -half + 0.4), (half - 0.4, half)):
        x = (left, right, right, left)
        lamp = [(x[corner], y[corner], -0.01) for corner in range(4)]
        cargo.add(lamp, TAIL, lit=TAIL_LIT)
    cargo.wheels(half, (1.2, 2.3, length - cab - 1.0), 0.5)
    ahead = Builder(is_night=is_night)
    ahead.under(half, length, 0.6)
    front = ahead.box(
        (0.05 - half, half - 0.05), (0.5, min(height - 0.3, 2.8)), (length - cab, length),
        _pick(random, PAINTS), (0.08, 0, 0.3),
    )  # fmt: skip
    ahead.patch(front["front"], (0.06, 0.94), (0.5, 0.9), GLASS)
    ahead.patch(front["front"], (0.25, 0.75), (0.12, 0.4), DARK)
    for left, right in ((0.03, 0.18), (0.82, 0.97)):
        ahead.patch(front["front"], (left, right), (0.06, 0.2), HEAD, lit=HEAD_LIT)
    for face in SIDES:
        ahead.patch(front[face], (0.3, 0.9) if face == "right" else (0.1, 0.7), (0.52, 0.88), GLASS)
    ahead.wheels(half, (length - 1.0,), 0.5)
    return Model((cargo.done(), ahead.done()), length, width, height)


def _train(random: Generator, is_night: bool) -> Model:
    width, height, each = 2.65, random.uniform(3.4, 3.9), random.uniform(14, 19)
    half, paint, band = width / 2, _pick(random, BUS_PAINTS), _pick(random, PAINTS)
    count = int(random.integers(2, 4))
    parts = []
    for number in range(count):
        built = Builder(is_night=is_night)
        start, end = number * each, (number + 1) * each - 0.5
        built.box((0.2 - half, half - 0.2), (0.05, 0.7), (start + 1, end - 1), DARK)
        body = built.box((-half, half), (0.6, height), (start, end), paint, (0.1, 0.15, 0.15))
        for face, lamp, lit in zip(ENDS, (TAIL, HEAD), (TAIL_LIT, HEAD_LIT), strict=True):
            built.patch(body[face], (0.1, 0.9), (0.5, 0.86), GLASS)
            for across in ((0.08, 0.2), (0.8, 0.92)):
                built.patch(body[face], across, (0.16, 0.26), lamp, lit=lit)
        for face in SIDES:
            built.patch(body[face], (0, 1), (0.08, 0.24), band)
            for column in range(8):
                across = (0.03 + column * 0.12, 0.03 + column * 0.12 + 0.09)
                if column in (2, 5):
                    built.patch(body[face], across, (0.08, 0.84), DARK)
                built.patch(body[face], across, (0.48, 0.8), GLASS, lit=(214, 200, 152))
        parts.append(built.done())
    return Model(tuple(parts), count * each - 0.5, width, height)


def build_house(random: Generator, *, side: int, is_tall: bool, is_night: bool) -> Model:
    """A building left (`side` -1) or right (1) of the road, with windows where one sees them."""
    length, width = random.uniform(9, 22), random.uniform(7, 14)
    height = random.uniform(9, 30) if is_tall else random.uniform(4, 7)
    half, paint = width / 2, _pick(random, WALLS)
    built = Builder(is_night=is_night)
    wall_top = height if is_tall else 0.6 * height
    body = built.box((-half, half), (0, wall_top), (0, length), paint)
    rows = max(1, round(wall_top / 3.2))
    facing: Face = "left" if side > 0 else "right"
    for face, columns in ((ENDS[0], 3), (facing, 5)):
        built.windows(random, body[face], columns=columns, rows=rows, low=0.04, high=0.96)
    if is_tall:
        for face in (ENDS[0], facing):
            built.patch(body[face], (0, 1), (0.965, 1), tuple(0.6 * c for c in paint))  # type: ignore[arg-type]
    else:
        roof = _pick(random, ((112, 62, 48), (84, 80, 78), (96, 70, 56)))
        built.box((-half - 0.4, half + 0.4), (wall_top, height), (-0.4, length + 0.4), roof,
                  (0.9 * half, 0.3, 0.3))  # fmt: skip
    return Model((built.done(),), length, width, height)
