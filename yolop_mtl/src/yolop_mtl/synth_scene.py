"""Generated scenes: what stands where, and the order in which it is painted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolop_mtl import synth_labels as labels_of
from yolop_mtl.synth_paint import (
    OBSTACLE,
    Canvas,
    find_light,
    finish,
    paint_ground,
    paint_markings,
    paint_shadows,
    paint_sky,
)
from yolop_mtl.synth_road import (
    FARTHEST,
    Lane,
    Place,
    Road,
    Time,
    Weather,
    draw_camera,
    draw_road,
)
from yolop_mtl.synth_solids import (
    Builder,
    Colour,
    Floats,
    Kind,
    Model,
    Polygons,
    build_house,
    build_vehicle,
)

LAST = 72.0  # metres to the last vehicle's rear
MOST = 22  # vehicles
LEAF: tuple[Colour, ...] = ((52, 84, 40), (64, 96, 46), (78, 104, 52), (46, 72, 44), (96, 104, 54))
WEATHERS: tuple[tuple[Weather, float], ...] = (
    ("clear", 0.42), ("partly cloudy", 0.2), ("overcast", 0.2), ("rainy", 0.18),
)  # fmt: skip
TIMES: tuple[tuple[Time, float], ...] = (("daytime", 0.66), ("night", 0.24), ("dawn/dusk", 0.1))
PLACES: tuple[tuple[Place, float], ...] = (
    ("highway", 0.4), ("city street", 0.38), ("residential", 0.22),
)  # fmt: skip


class Scene(NamedTuple):
    """A generated scene.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        labels: as in BDD100K's files of 2020: boxes first, then lanes and areas.
        attributes: weather, scene and timeofday, in BDD100K's words.
        numbers: (H, W) uint8; the number of the labelled box, from 1, whose vehicle is seen at a
            pixel; 255 other things that hide the road, 0 ground and sky.
        drivable: (H, W) uint8; 1 the own lane, 2 others in its direction.
        lane: (H, W) uint8; 1 on lines.
    """

    image: NDArray[np.uint8]
    labels: list[dict[str, Any]]
    attributes: dict[str, str]
    numbers: NDArray[np.uint8]
    drivable: NDArray[np.uint8]
    lane: NDArray[np.uint8]

    @property
    def boxes_xyxy(self) -> NDArray[np.float32]:
        """(T, 4) pixels, around what is visible."""
        sides = [
            [label["box2d"][side] for side in ("x1", "y1", "x2", "y2")] for label in self._boxes
        ]
        return np.array(sides, dtype=np.float32).reshape(-1, 4)

    @property
    def categories(self) -> list[str]:
        """Of the boxes."""
        return [label["category"] for label in self._boxes]

    @property
    def _boxes(self) -> list[dict[str, Any]]:
        return [label for label in self.labels if "box2d" in label]


class Vehicle(NamedTuple):
    """A vehicle on the road: its near end at (s, d), and whether it faces the camera."""

    kind: Kind
    model: Model
    s: float
    d: float
    is_oncoming: bool

    def world(self, road: Road, polygons: Polygons) -> Floats:
        """Corners of polygons of its model, in space; it bends with the road."""
        u, v, t = np.moveaxis(polygons.corners, -1, 0)
        if self.is_oncoming:
            return road.points(self.s + self.model.length - t, self.d - u, v)
        return road.points(self.s + t, self.d + u, v)


Item = tuple[float, Callable[[], None]]  # metres away, and what paints it


def compose(random: Generator, size: tuple[int, int]) -> Scene:
    """A scene of (H, W) pixels; every choice comes from `random`."""
    weather, time, place = (_choose(random, of) for of in (WEATHERS, TIMES, PLACES))
    is_night, is_rainy = time == "night", weather == "rainy"
    camera = draw_camera(random, size)
    road = draw_road(random, place)
    canvas = Canvas(camera, find_light(weather, time))
    paint_sky(canvas, random, weather)
    greens: tuple[Colour, ...] = ((92, 116, 60), (112, 118, 70), (146, 134, 98), (80, 104, 56))
    soil = greens[int(random.integers(len(greens)))]
    grey = random.uniform(82, 120)
    asphalt = (grey, grey * random.uniform(0.98, 1.02), grey * random.uniform(0.97, 1.05))
    paint_ground(canvas, random, road, ground=soil, asphalt=asphalt, is_wet=is_rainy)
    rail_side = 0
    if place != "residential" and random.random() < 0.16:
        rail_side = int(random.choice((-1, 1)))
    _paint_verges(canvas, road, place, rail_side)
    vehicles = _draw_traffic(random, road, is_night=is_night)
    if rail_side:
        vehicles.append(_draw_train(random, road, rail_side, is_night=is_night))
    paint_markings(canvas, road, wear=random.uniform(0, 0.35))
    _paint_shadows(canvas, random, road, vehicles, has_sun=weather == "clear" and time == "daytime")
    items = _place_props(canvas, random, road, place, rail_side)
    seen: list[labels_of.Seen] = []
    for number, vehicle in enumerate(vehicles, 1):
        items.append(_vehicle_item(canvas, road, vehicle, number, seen))
    for _, paint in sorted(items, key=lambda item: -item[0]):
        paint()
    image = finish(
        canvas, random, is_rainy=is_rainy,
        noise=random.uniform(4, 9) if is_night else random.uniform(1.5, 5),
        blur=random.uniform(0.3, 0.9) * camera.scale,
    )  # fmt: skip
    boxes, kept = labels_of.box_labels(canvas.numbers, seen, camera.scale)
    ends = [_free_until(lane, vehicles) for lane in road.lanes]
    labels = (
        boxes
        + labels_of.lane_labels(canvas.numbers, camera, road)
        + labels_of.area_labels(canvas.numbers, camera, road, ends)
    )
    drivable, lane = labels_of.draw_masks(labels, size)
    renumber = np.full(256, OBSTACLE, dtype=np.uint8)
    renumber[0] = 0
    renumber[kept] = np.arange(1, len(kept) + 1)
    numbers = np.asarray(cv2.LUT(canvas.numbers, renumber), dtype=np.uint8)
    for number, label in enumerate(labels):
        label["id"] = str(number)
    attributes = {"weather": weather, "scene": place, "timeofday": time}
    return Scene(image, labels, attributes, numbers, drivable, lane)


def _choose(random: Generator, options: tuple[tuple[Any, float], ...]) -> Any:
    return options[int(random.choice(len(options), p=[share for _, share in options]))][0]


# ---- vehicles -----------------------------------------------------------------------------------


def _draw_traffic(random: Generator, road: Road, *, is_night: bool) -> list[Vehicle]:
    """Vehicles on every lane, near to far, at distances that suit how busy the road is."""
    gap = float(random.choice((7.0, 14.0, 28.0)))
    found: list[Vehicle] = []
    for lane in road.lanes:
        is_parking = lane.role == "parking"
        s = random.uniform(8, 34) if lane.role == "own" else random.uniform(4, 30)
        while s < LAST and len(found) < MOST:
            kind: Kind = "car"
            if not is_parking:
                kind = ("car", "truck", "bus")[int(random.choice(3, p=[0.76, 0.14, 0.10]))]
            model = build_vehicle(kind, random, is_night=is_night and not is_parking)
            middle = (lane.left + lane.right) / 2 + random.normal(0, 0.05 if is_parking else 0.18)
            turned = lane.role == "oncoming" or (is_parking and middle < 0)
            if not is_parking or random.random() < 0.7:
                found.append(Vehicle(kind, model, s, middle, turned))
            s += model.length + (
                random.uniform(1, 3) if is_parking else 3 + random.exponential(gap)
            )
    return found


def _draw_train(random: Generator, road: Road, side: int, *, is_night: bool) -> Vehicle:
    d = road.right + 5.5 if side > 0 else road.left - 5.5
    model = build_vehicle("train", random, is_night=is_night)
    return Vehicle("train", model, random.uniform(12, 40), d, bool(random.random() < 0.5))


def _vehicle_item(
    canvas: Canvas, road: Road, vehicle: Vehicle, number: int, seen: list[labels_of.Seen]
) -> Item:
    def paint() -> None:
        # The part at the far end first.
        parts = vehicle.model.parts if vehicle.is_oncoming else vehicle.model.parts[::-1]
        for part in parts:
            canvas.solid(part, vehicle.world(road, part), number)
        # Only what comes later, and is nearer, can hide it.
        pixels = int(np.count_nonzero(canvas.numbers == number))
        seen.append(labels_of.Seen(number, vehicle.kind, pixels))

    return vehicle.s + vehicle.model.length / 2, paint


def _free_until(lane: Lane, vehicles: list[Vehicle]) -> float | None:
    """Metres to the first vehicle on a lane; None for a lane that is not drivable."""
    if lane.role not in ("own", "same"):
        return None
    ahead = [vehicle.s for vehicle in vehicles if lane.left < vehicle.d < lane.right]
    return min([FARTHEST, *ahead])


def _paint_shadows(
    canvas: Canvas, random: Generator, road: Road, vehicles: list[Vehicle], *, has_sun: bool
) -> None:
    near = canvas.camera.nearest_road
    outlines: list[tuple[Floats, int]] = []
    for lane in road.lanes:
        middle = (lane.left + lane.right) / 2
        for track in (-0.8, 0.8):
            outlines.append(
                (road.strip(middle + track - 0.3, middle + track + 0.3, near, 60.0, 20), 14)
            )
    lean = random.uniform(-1.2, 1.2) if has_sun else 0.0
    if has_sun and random.random() < 0.5:
        for _ in range(int(random.integers(2, 8))):
            s, length = random.uniform(near, 50), random.uniform(1.5, 6)
            d = random.uniform(0, road.right) * random.choice((-1, 1))
            outlines.append(
                (road.strip(d - 4, d + 4, s, s + length, 6), int(random.integers(40, 80)))
            )
    for vehicle in vehicles:
        half, end = vehicle.model.width / 2, vehicle.s + vehicle.model.length
        low, high = vehicle.d - half, vehicle.d + half
        if has_sun:
            reach = lean * vehicle.model.height
            wide = road.strip(low + min(0, reach), high + max(0, reach), vehicle.s, end + 0.3, 6)
            outlines.append((wide, 105))
        outlines.append((road.strip(low - 0.12, high + 0.12, vehicle.s - 0.25, end, 8), 165))
    paint_shadows(canvas, outlines)


# ---- beside the road ----------------------------------------------------------------------------


def _paint_verges(canvas: Canvas, road: Road, place: Place, rail_side: int) -> None:
    """Kerbs and pavements in towns, guard rails on highways, a bed of stones for a railway."""
    near = canvas.camera.nearest_road
    spans = [(near, 9.0), (9.0, 18.0), (18.0, 40.0), (40.0, 120.0)]
    for side, edge in ((-1, road.left), (1, road.right)):
        for start, end in reversed(spans):
            if side == rail_side:
                middle = edge + side * 5.5
                canvas.ground([road.strip(middle - 2.2, middle + 2.2, start, end)], (120, 112, 104))
                rails = [middle - 0.72, middle + 0.72]
                canvas.ground(
                    [road.strip(at - 0.05, at + 0.05, start, end) for at in rails], (70, 62, 58)
                )
            if place == "highway":
                rail = edge + side * 0.6
                s = np.geomspace(start, end, 24)
                board = np.concatenate(
                    [road.points(s, rail, 0.42), road.points(s[::-1], rail, 0.78)]
                )
                posts = [
                    road.points(
                        np.array([at, at, at + 0.12, at + 0.12]), rail, np.array([0, 0.5, 0.5, 0])
                    )
                    for at in np.arange(np.ceil(start / 4) * 4, min(end, 60.0), 4.0)
                ]
                canvas.ground(posts, (88, 88, 90), is_flat=False)
                canvas.ground([board], (158, 161, 164), is_flat=False)
            else:
                left, right = sorted((edge, edge + side * 0.18))
                canvas.ground([road.strip(left, right, start, end)], (176, 174, 168))
                left, right = sorted((edge + side * 0.18, edge + side * 2.8))
                canvas.ground([road.strip(left, right, start, end)], (150, 146, 140))


def _place_props(
    canvas: Canvas, random: Generator, road: Road, place: Place, rail_side: int
) -> list[Item]:
    """Houses, trees, lamps and signs on both sides."""
    items: list[Item] = []
    is_night = canvas.light.is_night
    for side, edge in ((-1, road.left), (1, road.right)):
        beyond = 10.0 if side == rail_side else 0.0
        if place != "highway":
            s = random.uniform(6, 16)
            while s < 150:
                house = build_house(
                    random, side=side, is_tall=place == "city street", is_night=is_night
                )
                setback = random.uniform(4, 7) if place == "city street" else random.uniform(6, 11)
                d = edge + side * (setback + beyond + house.width / 2)
                items.append(_solid_item(canvas, road, house, s, d, OBSTACLE))
                s += house.length + random.exponential(3 if place == "city street" else 12)
        trees = {"highway": 20, "city street": 4, "residential": 12}[place]
        for _ in range(int(random.integers(trees // 2, trees + 1))):
            s = random.uniform(12, 190)
            d = edge + side * (
                random.uniform(5, 40) if place == "highway" else random.uniform(2.2, 4)
            )
            items.append(_tree_item(canvas, random, road, s, d + side * beyond))
        if random.random() < 0.7:
            first, step = random.uniform(8, 25), random.uniform(22, 38)
            for s in np.arange(first, 120, step).tolist():
                lamp = _build_lamp(side, is_night=is_night)
                items.append(_solid_item(canvas, road, lamp, s, edge + side * 1.2, OBSTACLE))
        if random.random() < 0.6:
            sign = _build_sign(random, place, is_night=is_night)
            away = 2.6 if place == "highway" else 0.9
            s = random.uniform(14, 60)
            items.append(_solid_item(canvas, road, sign, s, edge + side * away, OBSTACLE))
    return items


def _solid_item(canvas: Canvas, road: Road, model: Model, s: float, d: float, number: int) -> Item:
    def paint() -> None:
        for part in model.parts:
            u, v, t = np.moveaxis(part.corners, -1, 0)
            canvas.solid(part, road.points(s + t, d + u, v), number)

    return s + model.length / 2, paint


def _tree_item(canvas: Canvas, random: Generator, road: Road, s: float, d: float) -> Item:
    height, seed = random.uniform(4.5, 10), int(random.integers(2**31))

    def paint() -> None:
        own = np.random.default_rng(seed)
        base, crown = road.points(s, d), road.points(s, d, 0.64 * height)
        depth = float(base[2])
        if depth < 3:
            return
        trunk = [road.points(s, np.array([d - 0.14, d + 0.14, d + 0.1, d - 0.1]),
                             np.array([0, 0, 0.5, 0.5]) * height)]  # fmt: skip
        canvas.ground(trunk, (78, 62, 48), is_flat=False)
        radius = 0.36 * height * canvas.camera.focal / depth
        centre = canvas.camera.project(crown)
        red, green, blue = LEAF[int(own.integers(len(LEAF)))]
        for shift, share, tone in ((0.0, 1.0, 0.72), (-0.12, 0.8, 0.9), (-0.24, 0.52, 1.1)):
            middle = centre + radius * np.array([shift * 0.8, shift])
            colour = (red * tone, green * tone, blue * tone)
            canvas.leaves(own, middle, radius * share, colour, depth)

    return s, paint


def _build_lamp(side: int, *, is_night: bool) -> Model:
    built = Builder(is_night=is_night)
    built.box((-0.07, 0.07), (0, 7.5), (0, 0.14), (110, 112, 114))
    arm = sorted((0.0, -side * 1.6))
    built.box((arm[0], arm[1]), (7.3, 7.45), (0, 0.14), (110, 112, 114))
    head = sorted((-side * 1.1, -side * 1.8))
    face = built.box((head[0], head[1]), (7.2, 7.4), (-0.1, 0.2), (170, 170, 165))["rear"]
    built.patch(face, (0, 1), (0, 1), (170, 170, 165), lit=(255, 226, 160))
    return Model((built.done(),), 0.2, 0.2, 7.5)


def _build_sign(random: Generator, place: Place, *, is_night: bool) -> Model:
    built = Builder(is_night=is_night)
    if place == "highway":
        width, low, high = random.uniform(1.6, 2.6), 2.2, random.uniform(3.4, 4.2)
        colour: Colour = (24, 106, 70)
    else:
        width, low, high = 0.7, 2.1, 2.8
        colour = ((196, 40, 40), (232, 190, 40), (236, 236, 232), (40, 80, 160))[
            int(random.integers(4))
        ]
    built.box((-0.04, 0.04), (0, high), (0.02, 0.1), (120, 122, 124))
    face = built.box((-width / 2, width / 2), (low, high), (0, 0.02), (235, 236, 232))["rear"]
    built.patch(face, (0.05, 0.95), (0.07, 0.93), colour)
    for up in (0.3, 0.6):
        right = random.uniform(0.6, 0.85)
        built.patch(face, (0.15, right), (up, up + 0.1), (232, 234, 232))
    return Model((built.done(),), 0.1, width, high)
