"""BDD100K's label files of both years, and the folders they lie in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from yolop_mtl.bdd100k import CATEGORIES, load_records, read_scenes
from yolop_mtl.lanes import draw_areas, draw_lines, pair_edges
from yolop_mtl.records import ALL_BDD_CLASSES, VEHICLE_CLASS, Classes, Conditions

from .label_files import BOXES, scene_2018, scene_2020, write_image, write_json

SIZE = (720, 1280)
VEHICLE = Classes(VEHICLE_CLASS, known=CATEGORIES)
EVERY = Classes(ALL_BDD_CLASSES, known=CATEGORIES)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write_json(scene_2018(), tmp_path / "2018/a.json")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return write_json([scene_2020()], tmp_path / "2020/det_val.json")


def test_both_years_give_the_same_boxes_and_masks(old: Path, new: Path) -> None:
    (first,), (second,) = read_scenes(old), read_scenes(new)
    assert first.name == second.name == "a"
    assert first.boxes_xyxy == second.boxes_xyxy == list(BOXES.values())
    numbers = [
        [EVERY.number(category, "here") for category in scene.categories]
        for scene in (first, second)
    ]
    assert numbers[0] == numbers[1] == [2, 3, 0, 4]
    for scene in (first, second):
        assert [area.is_alternative for area in scene.areas] == [False, True]
        assert [line.kind for line in scene.lines] == [("single white", "parallel", "solid")] * 2
    for kind in ("merged", "direct_only", "three"):
        areas = [draw_areas(scene.areas, SIZE, classes=kind) for scene in (first, second)]
        assert np.array_equal(*areas)
        assert areas[0].any()
    lanes = [draw_lines(pair_edges(scene.lines), SIZE, width=8) for scene in (first, second)]
    assert np.array_equal(*lanes)
    # One line between the edges at x 500 and 530, 560 and 575.
    row = np.flatnonzero(lanes[0][690])
    assert abs(row.mean() - 516.5) < 3
    assert 6 <= len(row) <= 11


def test_the_list_of_a_whole_export_is_read_too(tmp_path: Path) -> None:
    path = write_json({"frames": [scene_2020()], "config": {}}, tmp_path / "a.json")
    assert [scene.name for scene in read_scenes(path)] == ["a"]


def test_combined_files_name_lanes_by_an_attribute(tmp_path: Path) -> None:
    scene = scene_2020()
    for label in scene["labels"]:
        if label["category"] == "single white":
            label["category"] = "lane"
            label["attributes"]["laneTypes"] = "single white"
    (found,) = read_scenes(write_json([scene], tmp_path / "a.json"))
    assert [line.kind for line in found.lines] == [("single white", "parallel", "solid")] * 2


def test_an_image_without_labels_has_none(tmp_path: Path) -> None:
    path = write_json([{"name": "a.jpg", "labels": None}, {"name": "b.jpg"}], tmp_path / "a.json")
    assert [len(scene.boxes_xyxy) for scene in read_scenes(path)] == [0, 0]


def test_a_published_file_is_read(papers_data: Path) -> None:
    path = papers_data / "driving_samples/bdd100k_labels/example_annotation.json"
    (scene,) = read_scenes(path)
    # Instance segmentation: cars as polygons, without boxes; none of them is a lane or an area.
    assert scene.name == "b1c81faa-3df17267-0000001"
    assert (scene.boxes_xyxy, scene.areas, scene.lines) == ([], [], [])


# ---- folders --------------------------------------------------------------------------------


def yolop_tree(root: Path) -> None:
    for name in ("a", "b"):
        write_image(root / f"images/val/{name}.jpg")
    write_json(scene_2018("a"), root / "det_annotations/val/a.json")
    write_image(root / "da_seg_annotations/val/a.png")
    write_image(root / "ll_seg_annotations/val/b.png")


def official_tree(root: Path) -> None:
    for name in ("a", "b"):
        write_image(root / f"images/100k/val/{name}.jpg")
    write_json([scene_2020("a")], root / "labels/det_20/det_val.json")
    write_image(root / "labels/drivable/masks/val/a.png")
    write_image(root / "labels/lane/masks/val/b.png")


@pytest.mark.parametrize("tree", [yolop_tree, official_tree])
def test_both_trees_are_read(tree: Callable[[Path], None], tmp_path: Path) -> None:
    tree(tmp_path)
    first, second = load_records(tmp_path, "val", VEHICLE)
    assert (first.image.name, second.image.name) == ("a.jpg", "b.jpg")
    # Car, truck, bus; the bus is clipped at the edge; the person is dropped.
    assert first.boxes_xyxy.tolist() == [BOXES["car"], BOXES["truck"], [1200, 300, 1280, 400]]
    assert (first.boxes_xyxy.dtype, first.labels.dtype) == (np.float32, np.int64)
    assert first.labels.tolist() == [0, 0, 0]
    assert second.boxes_xyxy is None
    assert second.labels is None
    assert (first.drivable.name, first.lane) == ("a.png", None)
    assert (second.drivable, second.lane.name) == (None, "b.png")
    assert load_records(tmp_path, "val", EVERY)[0].labels.tolist() == [2, 3, 0, 4]


def test_images_alone_are_unlabelled(tmp_path: Path) -> None:
    write_image(tmp_path / "images/val/a.jpg")
    (record,) = load_records(tmp_path, "val", VEHICLE)
    assert record[1:] == (None, None, None, None, Conditions())


@pytest.mark.parametrize("tree", [yolop_tree, official_tree])
def test_conditions_of_both_years(tree: Callable[[Path], None], tmp_path: Path) -> None:
    tree(tmp_path)
    labelled, bare = load_records(tmp_path, "val", VEHICLE)
    assert labelled.conditions == Conditions("rainy", "city street", "night")
    assert bare.conditions == Conditions("", "", "")


def test_a_condition_that_is_not_said_is_empty(tmp_path: Path) -> None:
    scene = scene_2020() | {"attributes": {"weather": "clear"}}
    (read,) = read_scenes(write_json([scene], tmp_path / "some.json"))
    assert read.conditions == Conditions("clear", "", "")
    del scene["attributes"]
    (read,) = read_scenes(write_json([scene], tmp_path / "none.json"))
    assert read.conditions == Conditions()
    scene["attributes"] = ["clear"]
    with pytest.raises(ValueError, match=r"entry 0: got AttributeError .*BDD100K's form"):
        list(read_scenes(write_json([scene], tmp_path / "wrong.json")))


def _change(root: Path, change: str) -> None:
    yolop_tree(root)
    label = root / "det_annotations/val/a.json"
    if change == "broken":
        label.write_text('{"name": "a",\n "frames": [}')
    elif change == "entry":
        write_json({"name": "a", "frames": [{"objects": [{"id": 1}]}]}, label)
    elif change == "no label":
        label.unlink()
    elif change == "no image":
        write_json(scene_2018("c"), root / "det_annotations/val/c.json")
    elif change == "twice":
        write_json(scene_2018("a"), root / "det_annotations/val/c.json")
    elif change == "mask":
        write_image(root / "da_seg_annotations/val/c.png")
    else:
        scene = scene_2018()
        label_2018 = scene["frames"][0]["objects"]
        if change == "category":
            label_2018[0]["category"] = "cart"
        elif change == "area":
            label_2018[4]["category"] = "area/parking"
        elif change == "inverted":
            label_2018[0]["box2d"] |= {"x1": 500.0}
        elif change == "outside":
            label_2018[0]["box2d"] |= {"x1": 1290.0, "x2": 1300.0}
        elif change == "vertex":
            label_2018[6]["poly2d"][0][0] = float("nan")
        write_json(scene, label)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("broken", r"a\.json: got no JSON at line 2, column 13 .*, expected a BDD100K label file;"),
        (
            "entry",
            r"a\.json: entry 0: got KeyError 'category', expected an entry in BDD100K's form",
        ),
        ("no label", r"val: got no label, expected one or more; remove the folder if"),
        ("no image", r"val: got labels of 1 images that are not there, first 'c', expected an ima"),
        ("mask", r"val: got labels of 1 images that are not there, first 'c', expected an image"),
        ("twice", r"c\.json: got 'a' twice, expected an image once; keep one of them"),
        (
            "category",
            r"a\.json \(a\): category: got 'cart', expected a known one; did you mean 'ca",
        ),
        ("area", r"\(a\): area: got 'parking', expected drivable, direct, alternative"),
        ("inverted", r"\(a\): box: got \[500.0, .*\], expected x1 < x2 and y1 < y2, all finite"),
        ("outside", r"\(a\): box: got \[1290.0, .*\], expected one that meets the image of 1280 x"),
        ("vertex", r"\(a\): poly2d: got a vertex that is not finite, expected \(x, y\) pixels"),
    ],
)
def test_wrong_labels_are_named(change: str, message: str, tmp_path: Path) -> None:
    _change(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path, "val", VEHICLE)


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    message = "data.root: got '.*' without images/val or images/100k/val, expected them; check the"
    with pytest.raises(FileNotFoundError, match=message):
        load_records(tmp_path, "val", VEHICLE)
    (tmp_path / "images/val").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"val: got no image, expected one or more; check data"):
        load_records(tmp_path, "val", VEHICLE)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "classes: got none, expected one or more; name them"),
        ({"x": ["cars"]}, r"classes: got 'cars', expected a known category; did you mean 'car'\?"),
        ({"x": ["car"], "y": ["car"]}, "classes: got 'car' in two classes, expected in one; name"),
    ],
)
def test_wrong_classes_are_refused(members: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classes(members, known=CATEGORIES)
