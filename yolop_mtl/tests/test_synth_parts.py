"""Parts of generated scenes: the camera, solids, what hides what, areas."""

import cv2
import numpy as np
import pytest

from yolop_mtl.lanes import Area, draw_areas
from yolop_mtl.synth_labels import Seen, area_labels, box_labels, lane_labels
from yolop_mtl.synth_paint import Canvas, find_light
from yolop_mtl.synth_road import Camera, Lane, Marking, Road
from yolop_mtl.synth_scene import Vehicle
from yolop_mtl.synth_solids import build_vehicle

CAMERA = Camera((720, 1280), focal=1000.0, centre=640.0, horizon=320.0, height=1.5)
OWN = Lane(-1.75, 1.75, "own")
LINE = Marking(-1.75, "single white", "dashed", 0.12)
STRAIGHT = Road((0.0, 0.0, 0.0), (OWN,), (LINE,), -3.0, 3.0, (3.0, 6.0, 0.0))


def test_the_camera_projects_as_a_pinhole() -> None:
    points = np.array([[0.0, 0, 10], [2, 0, 10], [2, 1.5, 20], [-1, 3, 50]])
    expected = [[640, 470], [840, 470], [740, 320], [620, 290]]
    assert np.allclose(CAMERA.project(points), expected)


def test_places_across_a_bend_are_at_right_angles_to_it() -> None:
    road = STRAIGHT._replace(bend=(0.1, 0.005, 0.0))
    s = np.array([5.0, 20, 40])
    left, middle, right = (road.points(s, d) for d in (-3.0, 0.0, 3.0))
    ahead = road.points(s + 1e-5, 0.0) - middle
    assert np.allclose(np.linalg.norm(right - left, axis=1), 6)
    assert np.allclose(((right - left) * ahead).sum(1), 0, atol=1e-6)
    assert np.allclose(middle[:, 0], 0.1 * s + 0.0025 * s**2)


def test_dashes_and_double_lines() -> None:
    dashes = STRAIGHT.paint(LINE, 2.0, 30.0)
    spans = [(dash[:, 2].min(), dash[:, 2].max()) for dash in dashes]
    assert np.allclose(spans, [(2, 3), (9, 12), (18, 21), (27, 30)])
    double = Marking(1.0, "double yellow", "solid", 0.12, 0.1)
    first, second = STRAIGHT.paint(double, 2.0, 30.0)
    assert np.allclose([first[:, 0].min(), first[:, 0].max()], [0.83, 0.95])
    assert np.allclose([second[:, 0].min(), second[:, 0].max()], [1.05, 1.17])
    assert np.allclose(double.edges, [0.95, 1.05])


@pytest.mark.parametrize("kind", ["car", "bus", "truck", "train"])
@pytest.mark.parametrize("is_oncoming", [False, True])
def test_what_is_painted_of_a_vehicle_is_what_is_numbered(kind: str, is_oncoming: bool) -> None:
    canvas = Canvas(CAMERA, find_light("clear", "daytime"))
    model = build_vehicle(kind, np.random.default_rng(0), is_night=False)  # type: ignore[arg-type]
    vehicle = Vehicle(kind, model, 12.0, 2.5, is_oncoming)  # type: ignore[arg-type]
    parts = model.parts if is_oncoming else model.parts[::-1]
    for part in parts:
        canvas.solid(part, vehicle.world(STRAIGHT, part), 7)
    painted, numbered = canvas.image.any(2), canvas.numbers == 7
    for values in (painted, numbered):
        assert values.any()
    # Smooth edges are painted a little further out than they are numbered, most of all corners.
    near_it = cv2.dilate(numbered.view(np.uint8), np.ones((5, 5))).view(bool)
    assert not (painted & ~near_it).any()
    for axis in (0, 1):
        ends = [np.flatnonzero(values.any(axis))[[0, -1]] for values in (painted, numbered)]
        assert np.abs(ends[0] - ends[1]).max() <= 1
    # The near face, at 12 m: as wide and as high as it is in metres.
    rows, columns = (np.flatnonzero(numbered.any(axis)) for axis in (1, 0))
    near = 1000 / 12
    lowest = 320 + near * 1.5
    assert lowest - 20 <= rows[-1] <= lowest + 1
    assert rows[0] == pytest.approx(320 + near * (1.5 - model.height), abs=25)
    assert columns[-1] == pytest.approx(640 + near * (2.5 + model.width / 2), abs=8)


def seen(height: int, hidden: int) -> tuple[np.ndarray, list[Seen]]:
    numbers = np.zeros((720, 1280), dtype=np.uint8)
    numbers[100 : 100 + height, 200:300] = 1
    numbers[100 : 100 + hidden, 200:300] = 2
    return numbers, [Seen(1, "car", height * 100)]


def test_a_box_is_around_what_is_seen_and_says_that_something_hides_it() -> None:
    (label,), kept = box_labels(*seen(100, 60), 1.0)
    assert label["box2d"] == {"x1": 200, "y1": 160, "x2": 300, "y2": 200}
    assert label["attributes"] == {"occluded": True, "truncated": False}
    assert kept == [1]
    (label,), _ = box_labels(*seen(100, 0), 1.0)
    assert label["attributes"]["occluded"] is False


@pytest.mark.parametrize(
    ("height", "hidden", "count"), [(100, 75, 1), (100, 76, 0), (8, 0, 1), (7, 0, 0)]
)
def test_vehicles_that_are_mostly_hidden_or_tiny_are_not_labelled(
    height: int, hidden: int, count: int
) -> None:
    labels, kept = box_labels(*seen(height, hidden), 1.0)
    assert (len(labels), len(kept)) == (count, count)


def test_cut_off_by_the_image() -> None:
    numbers = np.zeros((720, 1280), dtype=np.uint8)
    numbers[300:400, 1200:] = 3
    (label,), _ = box_labels(numbers, [Seen(3, "bus", 8000)], 1.0)
    assert label["attributes"]["truncated"] is True
    assert label["box2d"]["x2"] == 1280


def test_lines_are_labelled_where_nothing_hides_them() -> None:
    numbers = np.zeros((720, 1280), dtype=np.uint8)
    (label,) = lane_labels(numbers, CAMERA, STRAIGHT)
    assert label["category"] == "single white"
    assert label["attributes"] == {"laneDirection": "parallel", "laneStyle": "dashed"}
    left, right = (np.array(polygon["vertices"]) for polygon in label["poly2d"])
    # Both edges are on the straight lines from the vanishing point through the paint's edges.
    for edge, offset in ((left, -1.81), (right, -1.69)):
        assert np.allclose(edge[:, 0], 640 + (edge[:, 1] - 320) * offset / 1.5, atol=0.05)
    assert left[0, 1] == 720
    assert left[-1, 1] == pytest.approx(320 + 1500 / 80, abs=0.02)
    numbers[450:500] = 9
    (label,) = lane_labels(numbers, CAMERA, STRAIGHT)
    assert len(label["poly2d"]) == 4
    rows = np.concatenate([np.array(polygon["vertices"])[:, 1] for polygon in label["poly2d"]])
    assert not ((rows > 452) & (rows < 498)).any()


def test_areas_end_at_vehicles_and_leave_out_what_hides_them() -> None:
    numbers = np.zeros((720, 1280), dtype=np.uint8)
    free = area_mask(numbers, 80.0)
    # At 10 m, row 470, the lane reaches from 465 to 815.
    columns = np.flatnonzero(free[470])
    assert abs(columns[0] - 465) <= 2
    assert abs(columns[-1] - 815) <= 2
    assert not area_mask(numbers, 10.0)[:468].any()
    assert area_labels(numbers, CAMERA, STRAIGHT, [None]) == []
    # A hole, which a polygon cannot have, is cut out all the same.
    numbers[550:600, 600:700] = 4
    holed = area_mask(numbers, 80.0)
    assert not holed[numbers > 0].any()
    assert int(free.sum()) - int(holed.sum()) == pytest.approx(54 * 104, rel=0.05)


def area_mask(numbers: np.ndarray, end: float) -> np.ndarray:
    labels = area_labels(numbers, CAMERA, STRAIGHT, [end])
    areas = [
        Area(np.array(polygon["vertices"]), False)
        for label in labels
        for polygon in label["poly2d"]
    ]
    return draw_areas(areas, (720, 1280))
