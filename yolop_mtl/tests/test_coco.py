"""One's own data: COCO JSON and masks, each of them optional."""

from pathlib import Path
from typing import Any

import pytest

from yolop_mtl.coco import load_records
from yolop_mtl.records import Classes

from .label_files import write_image, write_json


def coco() -> dict[str, Any]:
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 72, "width": 128},
            {"id": 8, "file_name": "b.jpg"},
        ],
        "categories": [{"id": 5, "name": "van"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "bbox": [10, 20, 30, 40], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [100, 20, 40, 10]},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [0, 0, 128, 10], "iscrowd": 1},
        ],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"images/train/{name}.jpg")
    write_json(coco(), tmp_path / "annotations/train.json")
    write_image(tmp_path / "drivable/train/b.png")
    return tmp_path


def test_boxes_and_masks(root: Path) -> None:
    first, second, third = load_records(root, "train")
    # Classes by id: car 0, van 1; clipped to the image; the crowd is left out.
    assert first.boxes_xyxy.tolist() == [[10, 20, 40, 60], [100, 20, 128, 30]]
    assert first.labels.tolist() == [1, 0]
    assert second.boxes_xyxy.shape == (0, 4)  # listed: none
    assert third.boxes_xyxy is None  # not listed: unlabelled
    assert [r.drivable and r.drivable.name for r in (first, second, third)] == [None, "b.png", None]
    assert [r.lane for r in (first, second, third)] == [None] * 3


def test_the_other_name_of_the_file_and_other_classes(root: Path) -> None:
    (root / "annotations/train.json").rename(root / "annotations/instances_train.json")
    classes = Classes({"vehicle": ["car", "van"]}, known=["car", "van"])
    assert load_records(root, "train", classes)[0].labels.tolist() == [0, 0]
    only = Classes({"car": ["car"]}, known=["car", "van"])
    assert load_records(root, "train", only)[0].boxes_xyxy.tolist() == [[100, 20, 128, 30]]


def test_images_alone_are_unlabelled(root: Path) -> None:
    (root / "annotations/train.json").unlink()
    assert [record.boxes_xyxy for record in load_records(root, "train")] == [None] * 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["annotations", 0, "category_id"], 9, "annotation 1: category_id: got 9, expected a lis"),
        (["annotations", 0, "image_id"], 9, "annotation 1: image_id: got 9, expected a listed im"),
        (
            ["annotations", 0, "bbox"],
            [1, 2, 3],
            "got ValueError .*, expected entries in COCO's form",
        ),
        (
            ["annotations", 0, "bbox"],
            [1, 2, -3, 4],
            r"\(a.jpg\): box: got .*, expected x1 < x2 and",
        ),
        (
            ["annotations", 0, "bbox"],
            [200, 2, 3, 4],
            r"\(a.jpg\): box: got .* the image of 128 x 72",
        ),
        (["images", 0, "file_name"], "d.jpg", "got no file for image 'd.jpg', expected every list"),
        (["images"], None, "got no list 'images', expected images, annotations, categories; write"),
        (
            ["categories", 0],
            {"id": 1},
            "categories: got KeyError 'name', expected an id and a name",
        ),
    ],
)
def test_wrong_labels_are_named(path: list[Any], value: object, message: str, root: Path) -> None:
    data = coco()
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    write_json(data, root / "annotations/train.json")
    with pytest.raises(ValueError, match=message):
        load_records(root, "train")


def test_broken_json_and_missing_images_are_named(root: Path) -> None:
    (root / "annotations/train.json").write_text("{\n")
    with pytest.raises(
        ValueError, match=r"train.json: got no JSON at line 2, column 1 .*COCO file"
    ):
        load_records(root, "train")
    with pytest.raises(FileNotFoundError, match=r"data.root: got no folder '.*val', expected ima"):
        load_records(root, "val")
    (root / "images/val").mkdir()
    with pytest.raises(ValueError, match=r"val: got no image, expected one or more; check data"):
        load_records(root, "val")


def test_masks_of_images_that_are_not_there_are_refused(root: Path) -> None:
    write_image(root / "lane/train/d.png")
    message = r"lane/train: got masks of 1 images that are not there, first 'd', expected an image"
    with pytest.raises(ValueError, match=message):
        load_records(root, "train")
