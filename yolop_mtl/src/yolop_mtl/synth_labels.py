"""Generated scenes, last part: labels in BDD100K's form of 2020, and the masks they stand for.

The masks are drawn from the labels' polygons, so that both say the same.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from yolop_mtl.lanes import Area, Line, draw_areas
from yolop_mtl.mask_drawing import lane_mask
from yolop_mtl.synth_road import FARTHEST, Camera, Marking, Road

Mask = NDArray[np.uint8]
Label = dict[str, Any]

LANE_WIDTH = 8.0  # pixels of a lane in the mask at 1280 x 720, in every split
MIN_VISIBLE = 0.25  # share of a vehicle's pixels in the image that must be seen
MIN_SIDE = 8.0  # pixels of a labelled box's shorter side at 1280 x 720
MIN_LINE = 14.0  # pixels of a labelled stretch of a line at 1280 x 720
MIN_AREA = 200.0  # square pixels of a labelled piece of road at 1280 x 720
VERTICES = 14  # of a labelled stretch of an edge, at most
TOUCHING = 2.0  # pixels from the image's border at which a box counts as cut off


class Seen(NamedTuple):
    """What is seen of a vehicle.

    Attributes:
        number: its number in the map.
        category: car, bus, truck or train.
        pixels: of the image that it covers, with what hides it taken away.
    """

    number: int
    category: str
    pixels: int


def box_labels(
    numbers: Mask, vehicles: Sequence[Seen], scale: float
) -> tuple[list[Label], list[int]]:
    """Boxes around the visible pixels of vehicles.

    A vehicle of which less than MIN_VISIBLE is seen, or whose box has a side of less than MIN_SIDE
    at 1280 x 720, is not labelled.

    Args:
        numbers: (H, W), the number of what is seen.
        vehicles: all of them.
        scale: pixels per pixel at 1280 x 720.

    Returns: labels, and the vehicles' numbers.
    """
    height, width = numbers.shape
    labels, kept = [], []
    for vehicle in vehicles:
        left, top, across, down = cv2.boundingRect((numbers == vehicle.number).view(np.uint8))
        if min(across, down) < MIN_SIDE * scale:
            continue
        part = numbers[top : top + down, left : left + across]
        visible = int(np.count_nonzero(part == vehicle.number)) / max(1, vehicle.pixels)
        if visible < MIN_VISIBLE:
            continue
        right, bottom = left + across, top + down
        near = TOUCHING * scale
        is_cut = left <= near or right >= width - near or bottom >= height - near or top <= near
        kept.append(vehicle.number)
        labels.append(
            {
                "category": vehicle.category,
                "attributes": {"occluded": visible < 0.95, "truncated": bool(is_cut)},
                "box2d": {
                    "x1": float(left), "y1": float(top), "x2": float(right), "y2": float(bottom),
                },
            }
        )  # fmt: skip
    return labels, kept


def lane_labels(numbers: Mask, camera: Camera, road: Road) -> list[Label]:
    """Both edges of every marking, in the stretches that nothing hides.

    Gaps between dashes belong to the line, as BDD100K's annotators drew it.
    """
    labels = []
    for marking in road.markings:
        polygons = [
            _polygon(points, is_closed=False)
            for points in _stretches(numbers, camera, road, marking)
        ]
        if polygons:
            attributes = {"laneDirection": "parallel", "laneStyle": marking.style}
            labels.append(
                {"category": marking.category, "attributes": attributes, "poly2d": polygons}
            )
    return labels


def _stretches(
    numbers: Mask, camera: Camera, road: Road, marking: Marking
) -> Iterator[NDArray[np.float64]]:
    height, width = numbers.shape
    s = np.geomspace(camera.nearest_road, FARTHEST, 240)
    middle = camera.project(road.points(s, marking.offset))
    column, row = np.floor(middle).astype(int).T
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    is_seen = np.zeros(len(s), dtype=bool)
    is_seen[inside] = numbers[row[inside], column[inside]] == 0
    turns = np.flatnonzero(np.diff(np.concatenate([[0], is_seen.astype(np.int8), [0]])))
    for first, last in turns.reshape(-1, 2):
        length = np.linalg.norm(np.diff(middle[first:last], axis=0), axis=1).sum()
        if length < MIN_LINE * camera.scale:
            continue
        # One step further where the line leaves the image, so that it reaches the border.
        starts = max(0, first - 1) if first and not inside[first - 1] else first
        ends = min(len(s), last + 1) if last < len(s) and not inside[last] else last
        chosen = np.unique(np.linspace(starts, ends - 1, VERTICES).round().astype(int))
        for edge in marking.edges:
            points = camera.project(road.points(s[chosen], edge))
            points[0] = _cut(points[0], points[1], camera.size)
            points[-1] = _cut(points[-1], points[-2], camera.size)
            yield points.clip((0, 0), (width, height))


def _cut(
    end: NDArray[np.float64], before: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.float64]:
    """The end of a line, moved back along it to the image's border where it lies beyond."""
    limit = np.array(size[::-1], dtype=np.float64)
    beyond = np.maximum(np.maximum(end - limit, -end), 0)
    step = np.maximum(np.abs(end - before), 1e-9)
    back: NDArray[np.float64] = end + (before - end) * min(1.0, float((beyond / step).max()))
    return back


def area_labels(
    numbers: Mask, camera: Camera, road: Road, ends: Sequence[float | None]
) -> list[Label]:
    """Drivable pieces of the lanes in the camera's direction: its own direct, others alternative.

    A lane is drivable up to the next vehicle on it, and never where something hides the road; a
    rim of 2 pixels around what hides it is left out.

    Args:
        numbers: (H, W), the number of what is seen.
        camera: projects.
        road: its lanes.
        ends: metres to which each lane is free; None for a lane that is not drivable.
    """
    rim = np.ones((5, 5), dtype=np.uint8)
    is_free = np.asarray(cv2.erode((numbers == 0).view(np.uint8), rim), dtype=np.uint8)
    labels = []
    for lane, end in zip(road.lanes, ends, strict=True):
        if end is None or end <= camera.nearest_road:
            continue
        outline = camera.project(road.strip(lane.left, lane.right, camera.nearest_road, end))
        limit = 4.0 * max(camera.size)
        corners = np.round(8 * (outline.clip(-limit, limit) - 0.5)).astype(np.int32)
        region = np.zeros_like(numbers)
        cv2.fillPoly(region, [corners], 1, cv2.LINE_8, 3)
        polygons = [
            _polygon(points, is_closed=True) for points in _outlines(region & is_free, camera.scale)
        ]
        if polygons:
            kind = "direct" if lane.role == "own" else "alternative"
            attributes = {"areaType": kind}
            labels.append(
                {"category": "drivable area", "attributes": attributes, "poly2d": polygons}
            )
    return labels


def _outlines(region: Mask, scale: float) -> Iterator[NDArray[np.float64]]:
    """Outlines (n, 2) of the pieces of a mask; a piece with a hole is cut into two."""
    contours, tree = cv2.findContours(region, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for number, contour in enumerate(contours):
        _, _, child, parent = tree[0][number]
        if parent >= 0 or cv2.contourArea(contour) < MIN_AREA * scale**2:
            continue
        while child >= 0 and cv2.contourArea(contours[child]) < MIN_AREA * scale**2 / 10:
            child = tree[0][child][0]
        if child >= 0:
            x = int(contours[child][:, 0, 0].mean())
            own = np.zeros_like(region)
            cv2.drawContours(own, contours, number, 1, -1, hierarchy=tree, maxLevel=1)
            own &= region
            for columns in (slice(0, x), slice(x, None)):
                half = np.zeros_like(region)
                half[:, columns] = own[:, columns]
                yield from _outlines(half, scale)
            continue
        simple = np.asarray(cv2.approxPolyDP(contour, 1.0, True)[:, 0], dtype=np.float64)
        if len(simple) > 2:
            yield simple + 0.5  # from the centre of a pixel to coordinates of the image


def _polygon(points: NDArray[np.float64], *, is_closed: bool) -> dict[str, Any]:
    vertices = points.round(2).tolist()
    return {"vertices": vertices, "types": "L" * len(vertices), "closed": is_closed}


def draw_masks(labels: Sequence[Label], size: tuple[int, int]) -> tuple[Mask, Mask]:
    """The masks that labels stand for, of (H, W) pixels.

    Returns: drivable (H, W) with 1 direct and 2 alternative, and lane (H, W) with 1.
    """
    areas, lines = [], []
    for label in labels:
        attributes = label["attributes"]
        for polygon in label.get("poly2d", ()):
            points = np.array(polygon["vertices"])
            if "areaType" in attributes:
                areas.append(Area(points, attributes["areaType"] == "alternative"))
            else:
                kind = (label["category"], attributes["laneDirection"], attributes["laneStyle"])
                lines.append(Line(points, kind))
    lane = lane_mask(lines, size, width=LANE_WIDTH)
    return draw_areas(areas, size, classes="three"), lane
