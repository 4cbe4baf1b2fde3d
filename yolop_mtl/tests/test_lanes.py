"""Masks from polygons: curves, pairs of edges, widths."""

import json
from pathlib import Path

import numpy as np
import pytest

from yolop_mtl.lanes import Area, Line, draw_areas, draw_lines, flatten_poly, pair_edges, resample

KIND = ("single white", "parallel", "solid")


def line(*points: tuple[float, float], kind: tuple[str, ...] = KIND) -> Line:
    return Line(np.array(points, dtype=np.float64), kind)


def test_straight_polygons_stay_as_they_are() -> None:
    vertices = [[0.0, 0.0], [4.0, 0.0], [4.0, 3.0]]
    assert flatten_poly(vertices, "LLL").tolist() == vertices
    assert flatten_poly(vertices, "LLL", is_closed=True).tolist() == vertices


@pytest.mark.parametrize("types", ["LCCC", "LCCL"])
def test_collinear_control_points_give_the_straight_line(types: str) -> None:
    points = flatten_poly([[0.0, 0.0], [10.0, 5.0], [20.0, 10.0], [30.0, 15.0]], types)
    assert len(points) > 4
    assert np.allclose(points[:, 1], points[:, 0] / 2)
    assert points[0].tolist() == [0, 0]
    assert points[-1].tolist() == [30, 15]
    assert (np.diff(points[:, 0]) > 0).all()
    # Its mask is that of the straight line.
    size = (40, 60)
    straight = np.array([[0.0, 0.0], [30.0, 15.0]])
    masks = [draw_lines([p + 10], size, width=4) for p in (points, straight)]
    assert np.array_equal(*masks)


def test_a_curve_is_that_of_bezier() -> None:
    controls = np.array([[0.0, 0.0], [0.0, 30.0], [30.0, 30.0], [30.0, 0.0]])
    points = flatten_poly(controls.tolist(), "LCCL")
    # De Casteljau at the middle.
    level = controls
    while len(level) > 1:
        level = (level[1:] + level[:-1]) / 2
    assert np.linalg.norm(points - level[0], axis=1).min() < 1
    assert level[0].tolist() == [15.0, 22.5]
    assert points[-1].tolist() == [30.0, 0.0]


def test_a_curve_may_end_at_the_first_vertex_of_a_closed_polygon() -> None:
    vertices = [[0.0, 0.0], [10.0, 0.0], [10.0, 10.0], [0.0, 10.0]]
    points = flatten_poly(vertices, "LLCC", is_closed=True)
    assert points[:2].tolist() == vertices[:2]
    assert len(points) > 4
    assert not (points[1:] == points[0]).all(1).any()
    # Open, the same has no vertex to end at.
    assert flatten_poly(vertices, "LLCC").tolist() == vertices


@pytest.mark.parametrize("types", ["LL", "LLX"])
def test_wrong_types_are_refused(types: str) -> None:
    with pytest.raises(
        ValueError, match=r"poly2d.types: got 'L.*' for 3 vertices, expected a lett"
    ):
        flatten_poly([[0, 0], [1, 0], [1, 1]], types)


def test_points_at_equal_distances() -> None:
    points = resample(np.array([[0.0, 0], [3, 0], [3, 9]]), 5)
    assert points.tolist() == [[0, 0], [3, 0], [3, 3], [3, 6], [3, 9]]


@pytest.mark.parametrize("width", [2, 8])
def test_a_line_covers_as_many_rows_as_it_is_wide(width: int) -> None:
    mask = draw_lines([np.array([[10.0, 40.0], [90.0, 40.0]])], (80, 100), width=width)
    rows = mask[:, 20:80].any(1)
    assert abs(rows.sum() - width) <= 1
    assert abs(np.flatnonzero(rows).mean() + 0.5 - 40) <= 1
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}


def test_both_edges_become_their_middle() -> None:
    # Drawn in opposite directions, 12 pixels apart.
    centres = pair_edges([line((10, 20), (90, 20)), line((90, 32), (10, 32))])
    assert len(centres) == 1
    assert np.allclose(centres[0][:, 1], 26)
    assert (centres[0][:, 0].min(), centres[0][:, 0].max()) == (10, 90)


def test_what_has_no_partner_is_drawn_as_it_is() -> None:
    far, other = line((10, 200), (90, 200)), line((10, 30), (90, 30), kind=("road curb", "", ""))
    edges = [line((10, 20), (90, 20)), far, other]
    assert [points.tolist() for points in pair_edges(edges)] == [e.points.tolist() for e in edges]
    assert pair_edges([]) == []
    assert pair_edges([line((1, 1)), line((2, 2), (2, 2))]) == []


def test_the_closest_edges_are_paired_first() -> None:
    # Four edges of two lines: 20, 28 and 52, 60; 28 and 52 are near enough as well.
    centres = pair_edges([line((0, y), (99, y)) for y in (28.0, 52.0, 20.0, 60.0)])
    assert sorted(points[0, 1] for points in centres) == [24, 56]


def test_areas_are_merged_left_out_or_told_apart() -> None:
    square = np.array([[0.0, 0], [20, 0], [20, 20], [0, 20]])
    areas = [Area(square + np.array([10, 0]), False), Area(square, True)]
    rows = {
        kind: draw_areas(areas, (30, 40), classes=kind)[10, [5, 15, 25, 35]].tolist()
        for kind in ("merged", "direct_only", "three")
    }
    assert rows["merged"] == [1, 1, 1, 0]
    # Where both lie, the car's own lane counts.
    assert rows["direct_only"] == [0, 1, 1, 0]
    assert rows["three"] == [2, 1, 1, 0]


def test_published_polygons_with_curves(papers_data: Path) -> None:
    path = papers_data / "driving_samples/bdd100k_labels/example_annotation.json"
    polygons = [
        polygon
        for frame in json.loads(path.read_text())
        for label in frame["labels"]
        for polygon in label["poly2d"]
    ]
    assert any("C" in polygon["types"] for polygon in polygons)
    for polygon in polygons:
        points = flatten_poly(polygon["vertices"], polygon["types"], is_closed=polygon["closed"])
        vertices = np.array(polygon["vertices"])
        assert np.isfinite(points).all()
        assert len(points) >= len(vertices) - 2
        # A curve stays within the hull of its control points.
        assert (points >= vertices.min(0) - 1e-9).all()
        assert (points <= vertices.max(0) + 1e-9).all()
