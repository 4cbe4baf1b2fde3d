"""Lines of lane pixels: as many as there are, along them, and nowhere else."""

from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from yolop_mtl.lane_lines import TOLERANCE, find_lane_lines
from yolop_mtl.synth import draw_scene

SIZE = (360, 640)
Curve = Sequence[tuple[float, float]]


def draw(*curves: Curve, width: int = 6, size: tuple[int, int] = SIZE) -> NDArray[np.bool_]:
    mask = np.zeros(size, dtype=np.uint8)
    for curve in curves:
        points = (np.array(curve) * 16).round().astype(np.int32)
        cv2.polylines(mask, [points], False, 1, width, cv2.LINE_8, 4)
    return mask.astype(bool)


def distances(
    points: NDArray[np.float32], curve: Curve, longer: float = 6.0
) -> NDArray[np.float64]:
    """Of points from a curve, by points of it a tenth of a pixel apart; drawn ones are longer."""
    corners = np.array(curve, dtype=np.float64)
    for end, before in ((0, 1), (-1, -2)):
        way = corners[end] - corners[before]
        corners[end] += way / np.hypot(*way) * longer
    along = np.concatenate([[0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    steps = np.arange(0, along[-1], 0.1)
    dense = np.stack([np.interp(steps, along, x) for x in corners.T], 1)
    return np.hypot(*(points[:, None] - dense[None]).transpose(2, 0, 1)).min(1)


def length(line: NDArray[np.float32]) -> float:
    return float(np.hypot(*np.diff(line, axis=0).T).sum())


def arc(*, bend: float = 0.9) -> Curve:
    """From the lower left up and to the right, ever flatter."""
    turn = np.linspace(0, bend * np.pi / 2, 60)
    return [(120 + 300 * (1 - np.cos(t)), 350 - 300 * np.sin(t)) for t in turn]


def farthest(line: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """Of the points of a line, every pixel, from the mask."""
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    along = np.concatenate([[0], np.hypot(*np.diff(line, axis=0).T).cumsum()])
    steps = np.arange(0, along[-1], 1.0)
    x, y = (np.interp(steps, along, column).round().astype(int) for column in line.T)
    height, width = mask.shape
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (x < width).all()
    assert (y < height).all()
    return float(away[y, x].max())


@pytest.mark.parametrize(
    "curve",
    [
        [(100, 340), (300, 60)],
        [(320, 340), (320, 20)],
        [(320, 340), (350, 20)],
        [(20, 340), (330, 30)],  # 45 degrees
        [(20, 200), (620, 170)],
        [(20, 200), (620, 200)],
        arc(),
        arc(bend=1.0),
    ],
)
@pytest.mark.parametrize("width", [2, 6, 12])
def test_one_line_is_found_whole_and_in_its_middle(curve: Curve, width: int) -> None:
    lines = find_lane_lines(draw(curve, width=width))
    assert len(lines) == 1
    line = lines[0]
    assert (line.dtype, line.shape[1:]) == (np.float32, (2,))
    assert distances(line, curve).max() < 1.5
    corners = np.array(curve)
    whole = np.hypot(*np.diff(corners, axis=0).T).sum()
    assert length(line) > whole - 2 * width - 4
    assert length(line) < whole + width + 4


def test_order_and_direction() -> None:
    flat = [(250.0, 300), (630, 320)]
    lines = find_lane_lines(draw([(100, 350), (200, 100)], flat, [(10, 20), (60, 340)]))
    starts = [tuple((line[0] / 20).round().astype(int)) for line in lines]
    assert starts == [(3, 17), (5, 18), (12, 15)]
    assert all(line[0, 1] > line[-1, 1] for line in lines[:2])  # steep ones lead away
    assert lines[2][0, 0] < lines[2][-1, 0]


def test_lines_that_run_close_together_stay_two() -> None:
    one, other = [(300.0, 340), (330, 40)], [(312.0, 340), (342, 40)]
    lines = find_lane_lines(draw(one, other, width=5))
    assert len(lines) == 2
    assert distances(lines[0], one).max() < 1.5
    assert distances(lines[1], other).max() < 1.5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([(150.0, 340), (450, 40)], [(450.0, 340), (150, 40)]),
        ([(250.0, 340), (350, 40)], [(350.0, 340), (250, 40)]),
        ([(320.0, 340), (320, 40)], [(100.0, 190), (600, 200)]),  # a stop line across a lane
    ],
)
def test_lines_that_cross_stay_two(one: Curve, other: Curve) -> None:
    lines = find_lane_lines(draw(one, other))
    assert len(lines) == 2
    for curve in (one, other):
        nearest = min(lines, key=lambda line: distances(line, curve).max())
        assert distances(nearest, curve).max() < 3
        assert length(nearest) > 0.95 * np.hypot(*np.subtract(curve[1], curve[0]))


def test_lines_that_meet_far_away_are_told_apart() -> None:
    one, other = [(60.0, 350), (320, 60)], [(580.0, 350), (320, 60)]
    lines = find_lane_lines(draw(one, other))
    assert len(lines) == 2
    assert distances(lines[0], one).max() < 2.5
    assert distances(lines[1], other).max() < 2.5


def dashes() -> tuple[NDArray[np.bool_], Curve]:
    whole = [(200.0, 350), (320, 50)]
    start, way = np.array(whole[0]), np.subtract(whole[1], whole[0])
    parts = [(start + way * a, start + way * (a + 0.14)) for a in (0.0, 0.22, 0.44, 0.66, 0.86)]
    return draw(*[[tuple(a), tuple(b)] for a, b in parts]), whole


def test_dashes_are_lines_of_their_own_unless_bridged() -> None:
    mask, whole = dashes()
    apart = find_lane_lines(mask)
    assert len(apart) == 5
    assert all(farthest(line, mask) <= TOLERANCE + 1 for line in apart)
    bridged = find_lane_lines(mask, bridge_dashes=True)
    assert len(bridged) == 1
    assert distances(bridged[0], whole).max() < 1.5
    assert length(bridged[0]) > 310
    # Not over to another lane, however near, and not over the whole image.
    beside = find_lane_lines(
        draw([(200, 350), (240, 250)], [(285, 240), (325, 140)], width=4), bridge_dashes=True
    )
    assert len(beside) == 2
    far = find_lane_lines(
        draw([(320, 350), (320, 300)], [(320, 90), (320, 40)]), bridge_dashes=True
    )
    assert len(far) == 2


def test_a_hole_or_a_notch_does_not_break_a_line() -> None:
    curve = arc()
    mask = draw(curve, width=8)
    rng = np.random.default_rng(0)
    for row, column in rng.permutation(np.argwhere(mask))[:60]:
        mask[row : row + 2, column : column + 2] = False
    lines = find_lane_lines(mask)
    assert len(lines) == 1
    assert distances(lines[0], curve).max() < 2


def test_nothing_and_noise_and_blobs_are_no_lines() -> None:
    assert find_lane_lines(np.zeros(SIZE, dtype=bool)) == []
    assert find_lane_lines(np.zeros((1, 1), dtype=bool)) == []
    assert find_lane_lines(np.ones((1, 1), dtype=bool)) == []
    noise = np.random.default_rng(0).random(SIZE) < 0.02
    assert find_lane_lines(noise) == []
    blob = np.zeros(SIZE, dtype=bool)
    blob[100:160, 200:270] = True
    assert find_lane_lines(blob) == []
    assert find_lane_lines(np.ones(SIZE, dtype=bool)) == []
    # Noise beside a line does not keep it from being found.
    curve = [(100.0, 340), (300, 60)]
    lines = find_lane_lines(draw(curve) | noise)
    assert len(lines) >= 1
    assert sum(length(line) for line in lines if distances(line, curve).max() < 3) > 300


@pytest.mark.parametrize("seed", range(6))
def test_no_line_where_no_lane_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    curves = []
    for _ in range(6):
        turn = np.linspace(0, 1, 40)[:, None]
        a, b, c = rng.random((3, 2)) * SIZE[::-1]
        curves.append((1 - turn) ** 2 * a + 2 * turn * (1 - turn) * b + turn**2 * c)
    mask = draw(*curves, width=int(rng.integers(2, 10)))
    mask &= rng.random(SIZE) < 0.97
    lines = find_lane_lines(mask)
    assert lines
    assert max(farthest(line, mask) for line in lines) <= TOLERANCE + 1


@pytest.mark.parametrize("index", range(3))
def test_generated_scenes(index: int) -> None:
    mask = np.asarray(draw_scene(0, index, SIZE).lane) == 1
    before = mask.copy()
    lines = find_lane_lines(mask)
    assert (mask == before).all()
    assert 2 <= len(lines) <= 8
    assert max(farthest(line, mask) for line in lines) <= TOLERANCE + 1
    # Most of the lanes' pixels lie beside a line.
    drawn = np.zeros(SIZE, dtype=np.uint8)
    for line in lines:
        cv2.polylines(drawn, [(line * 16).round().astype(np.int32)], False, 1, 7, cv2.LINE_8, 4)
    assert (drawn[mask] == 1).mean() > 0.85
