"""`prepare` on folders of every form: what it counts, writes, keeps and refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from yolop_mtl.bdd100k import CATEGORIES, load_records
from yolop_mtl.masks import decode_lane_byte, read_mask
from yolop_mtl.prepare import PrepareConfig, prepare
from yolop_mtl.records import VEHICLE_CLASS, Classes
from yolop_mtl.synth import SynthConfig, generate

from .label_files import scene_2018, scene_2020, write_image, write_json

VEHICLE = Classes(VEHICLE_CLASS, known=CATEGORIES)
MASKS = ("da_seg_annotations", "ll_seg_annotations")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepare") / "set"
    generate(SynthConfig(out=folder, num_train=3, num_val=2, size=(360, 640)))
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


def masks(root: Path) -> dict[str, np.ndarray]:
    found = {}
    for folder in MASKS:
        for path in sorted((root / folder).rglob("*.png")):
            found[str(path.relative_to(root))] = np.array(Image.open(path)) > 0
    return found


def test_counts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = prepare(PrepareConfig(root=root))
    records = load_records(root, "train", VEHICLE)
    boxes = [record.boxes_xyxy for record in records]
    assert train.num_images == 3
    assert train.num_boxes == sum(len(own) for own in boxes if own is not None)
    assert train.labelled == {"boxes": 3, "drivable": 3, "lane": 3}
    assert (train.sizes, train.missing, val.num_images) == ([(360, 640)], [], 2)
    share = np.mean(
        [values.mean() for name, values in masks(root).items() if "ll_" in name and "train" in name]
    )
    assert train.shares["lane"] == pytest.approx(share)
    said = capsys.readouterr().out
    assert f"{train.shares['lane']:.2%}" in said
    assert "car" in said


def test_what_is_missing_is_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "ll_seg_annotations/train/train-000001.png").unlink()
    shutil.rmtree(root / "da_seg_annotations/val")
    train, val = prepare(PrepareConfig(root=root))
    assert train.missing == ["no lane mask for 1 of 3 images, first train-000001.jpg"]
    assert val.missing == ["no drivable mask for any image: that task is not labelled"]
    assert val.labelled == {"boxes": 2, "drivable": 0, "lane": 2}
    assert "drivable" not in val.shares
    assert "train: no lane mask for 1 of 3 images" in capsys.readouterr().out


def test_masks_drawn_again_are_the_same(root: Path) -> None:
    before = masks(root)
    for folder in MASKS:
        shutil.rmtree(root / folder)
    wide = {"lane_width": 8.0, "val_lane_width": 8.0}
    prepare(PrepareConfig(root=root, draw_lane=True, draw_drivable=True, **wide))
    after = masks(root)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    # The readers of training find them.
    assert all(r.drivable and r.lane for r in load_records(root, "train", VEHICLE))
    assert not list(root.rglob("*.tmp"))


def test_lanes_of_validation_are_thinner(root: Path) -> None:
    (wide,) = prepare(PrepareConfig(root=root, splits=("train",)))
    config = PrepareConfig(root=root, splits=("train",), draw_lane=True, overwrite=True)
    (again,) = prepare(config)
    assert again.shares == wide.shares
    (thin,) = prepare(replace(config, val_split="train"))
    # 8 and 2 pixels; wide lines meet each other in the distance.
    assert 3 < wide.shares["lane"] / thin.shares["lane"] < 4.5


def test_masks_that_are_there_stay_unless_told(root: Path) -> None:
    mine = root / "ll_seg_annotations/train/train-000000.png"
    (root / "ll_seg_annotations/train/train-000002.png").unlink()
    write_image(mine, 0, (360, 640))
    before = mine.read_bytes()
    prepare(PrepareConfig(root=root, splits=("train",), draw_lane=True))
    assert mine.read_bytes() == before
    assert (root / "ll_seg_annotations/train/train-000002.png").is_file()
    prepare(PrepareConfig(root=root, splits=("train",), draw_lane=True, overwrite=True))
    assert mine.read_bytes() != before


def official(root: Path) -> dict[str, np.ndarray]:
    """Turn masks into the official ones; returns what they mean."""
    before = masks(root)
    for split in ("train", "val"):
        for path in sorted((root / f"da_seg_annotations/{split}").iterdir()):
            values = np.array([2, 1, 0], np.uint8)[np.searchsorted([0, 127, 255], Image.open(path))]
            write_image(root / f"labels/drivable/masks/{split}/{path.name}", values, values.shape)
        for path in sorted((root / f"ll_seg_annotations/{split}").iterdir()):
            lane = np.array(Image.open(path)) > 0
            values = np.where(lane, 6 + 16, 255).astype(np.uint8)
            write_image(root / f"labels/lane/masks/{split}/{path.name}", values, values.shape)
    for folder in MASKS:
        shutil.rmtree(root / folder)
    return before


FORMS: dict[str, Any] = {"drivable_format": "value", "lane_format": "bits"}


def test_official_masks_are_checked_and_converted(root: Path, tmp_path: Path) -> None:
    before = official(root)
    (first, _) = prepare(PrepareConfig(root=root, **FORMS))
    assert 0.02 < first.shares["drivable"] < 0.6
    prepare(PrepareConfig(root=root, convert=True, **FORMS))
    after = masks(root)
    assert all(np.array_equal(after[name], values) for name, values in before.items())
    # Into another folder, which readers take as it is; three classes keep their numbers.
    out = tmp_path / "out"
    prepare(PrepareConfig(root=root, out=out, convert=True, area_classes="three", **FORMS))
    records = load_records(out, "train", VEHICLE)
    for record in records:
        assert record.drivable == out / f"da_seg_annotations/train/{record.image.stem}.png"
        values = read_mask(record.drivable, "drivable", "index", classes="three")
        official_values = Image.open(root / f"labels/drivable/masks/train/{record.drivable.name}")
        assert np.array_equal(values, np.array([1, 2, 0])[np.array(official_values)])


def test_masks_are_not_converted_onto_themselves(root: Path) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*.png")}
    prepare(PrepareConfig(root=root, convert=True, overwrite=True))
    message = "got masks that would replace themselves, expected others; give --out, or move them"
    with pytest.raises(ValueError, match=message):
        prepare(PrepareConfig(root=root, convert=True, overwrite=True, lane_format="index"))
    assert {path: path.read_bytes() for path in root.rglob("*.png")} == before


@pytest.mark.parametrize("convert", [False, True])
def test_the_wrong_form_is_refused_with_its_share(root: Path, convert: bool) -> None:
    official(root)
    message = r"mask_format 'binary': got \d\d\.\d% foreground in \d drivable masks, expected 2%"
    with pytest.raises(ValueError, match=message):
        prepare(PrepareConfig(root=root, convert=convert, lane_format="bits"))
    assert not (root / "da_seg_annotations").exists()


def test_labels_of_2018_and_2020_give_the_same_masks(tmp_path: Path) -> None:
    drawn = []
    for name in ("old", "new"):
        root = tmp_path / name
        write_image(root / "images/100k/val/a.jpg", 90, (720, 1280))
        if name == "old":
            write_json(scene_2018(), root / "labels/100k/val/a.json")
        else:
            scene = scene_2020()
            parts: dict[str, list[Any]] = {"det": [], "drivable": [], "lane": []}
            for label in scene["labels"]:
                part = "drivable" if label["category"] == "drivable area" else "lane"
                parts["det" if "box2d" in label else part].append(label)
            for part, path in (
                ("det", "det_20/det_val"), ("drivable", "drivable/polygons/drivable_val"),
                ("lane", "lane/polygons/lane_val"),
            ):  # fmt: skip
                write_json([{"name": "a.jpg", "labels": parts[part]}], root / f"labels/{path}.json")
        (report,) = prepare(
            PrepareConfig(root=root, splits=("val",), draw_lane=True, draw_drivable=True)
        )
        assert report.boxes == {"pedestrian": 1, "car": 1, "bus": 1, "truck": 1}
        drawn.append(masks(root))
    assert drawn[0].keys() == drawn[1].keys()
    assert all(np.array_equal(drawn[0][key], drawn[1][key]) for key in drawn[0])
    assert all(values.any() for values in drawn[0].values())


def test_own_data_in_cocos_form(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "own"
    shutil.copytree(made / "images/val", root / "images/val")
    shutil.copytree(made / "ll_seg_annotations/val", root / "lane/val")
    images = [{"id": 1, "file_name": "val-000000.jpg", "height": 360, "width": 640}]
    annotation = {"id": 1, "image_id": 1, "category_id": 4, "bbox": [10, 10, 50, 40]}
    data = {"images": images, "annotations": [annotation], "categories": [{"id": 4, "name": "van"}]}
    write_json(data, root / "annotations/val.json")
    (report,) = prepare(PrepareConfig(root=root, source="coco", splits=("val",)))
    assert report.boxes == {"van": 1}
    assert report.labelled == {"boxes": 1, "drivable": 0, "lane": 2}


# ---- published files ----------------------------------------------------------------------------


def test_published_lane_masks_are_converted(papers_data: Path, tmp_path: Path) -> None:
    files = sorted((papers_data / "driving_samples/bdd100k_labels").glob("lane_bitmask_*.png"))
    assert files
    for file in files:
        write_image(tmp_path / f"images/val/{file.stem}.jpg", 90, (720, 1280))
        (tmp_path / "labels/lane/masks/val").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "labels/lane/masks/val")
    with pytest.raises(
        ValueError, match=r"mask_format 'binary': got .* foreground in 2 lane masks"
    ):
        prepare(PrepareConfig(root=tmp_path, splits=("val",)))
    config = PrepareConfig(root=tmp_path, splits=("val",), lane_format="bits", convert=True)
    (report,) = prepare(config)
    shares = []
    for file in files:
        is_lane = decode_lane_byte(np.array(Image.open(file))).is_lane
        written = np.array(Image.open(tmp_path / f"ll_seg_annotations/val/{file.name}"))
        assert np.array_equal(written, np.where(is_lane, 255, 0))
        shares.append(is_lane.mean())
    assert report.shares["lane"] == pytest.approx(np.mean(shares))


def test_published_labels_without_lanes_are_refused_by_name(
    papers_data: Path, tmp_path: Path
) -> None:
    source = papers_data / "driving_samples/bdd100k_labels/example_annotation.json"
    write_image(tmp_path / "images/val/b1c81faa-3df17267-0000001.jpg", 90, (720, 1280))
    (tmp_path / "labels/det_20").mkdir(parents=True)
    shutil.copy(source, tmp_path / "labels/det_20/det_val.json")
    (report,) = prepare(PrepareConfig(root=tmp_path, splits=("val",)))
    assert (report.labelled["boxes"], report.num_boxes) == (1, 0)
    with pytest.raises(ValueError, match="got no lane polygon, expected one or more; download"):
        prepare(PrepareConfig(root=tmp_path, splits=("val",), draw_lane=True))


# ---- wrong input --------------------------------------------------------------------------------


def break_image(root: Path) -> None:
    path = root / "images/train/train-000001.jpg"
    path.write_bytes(path.read_bytes()[:2000])


def break_json(root: Path) -> None:
    (root / "labels/det_20/det_train.json").write_text('[{"name": "a.jpg",\n "labels": [}]')


def shrink_mask(root: Path) -> None:
    write_image(root / "ll_seg_annotations/train/train-000001.png", 0, (72, 128))


def move_box(root: Path) -> None:
    path = root / "labels/det_20/det_train.json"
    frames = json.loads(path.read_text())
    box = {"x1": 700.0, "y1": 10.0, "x2": 720.0, "y2": 20.0}
    frames[0]["labels"].append({"category": "car", "box2d": box})
    path.write_text(json.dumps(frames))


def empty(root: Path) -> None:
    for path in (root / "images/train").iterdir():
        path.unlink()


def lose_images(root: Path) -> None:
    shutil.rmtree(root / "images/train")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_image, r"train-000001\.jpg: got a damaged or unreadable file"),
        (break_json, r"det_train\.json: got no JSON at line 2, column 13"),
        (shrink_mask, r"train-000001\.png: got 128 x 72 pixels, expected 640 x 360, as train-0000"),
        (move_box, r"box: got \[700.0, 10.0, 720.0, 20.0\], expected one that meets the image of"),
        (empty, r"images.train: got no image, expected one or more"),
        (lose_images, r"data\.root: got .* without images/train or images/100k/train"),
    ],
)
def test_damage_is_named(root: Path, damage: Any, message: str) -> None:
    damage(root)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(PrepareConfig(root=root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"splits": ()}, "splits: got none"),
        ({"sample": -1}, "sample: got -1"),
        ({"lane_width": 0}, "lane_width: got 0, expected more than 0"),
        ({"source": "coco", "draw_lane": True}, "source: got coco, expected bdd100k where"),
        ({"convert": True, "draw_lane": True}, "convert: got it beside draw_lane"),
        ({"out": Path("x")}, "out: got 'x' with nothing to write"),
        ({"lane_format": "value"}, "mask_format: got 'value' for lane masks"),
    ],
)
def test_wrong_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**fields)


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root: got '.*none', which is no folder"):
        prepare(PrepareConfig(root=tmp_path / "none"))
    write_image(tmp_path / "images/val/a.jpg")
    with pytest.raises(FileNotFoundError, match=r"without labels/lane/polygons/lane_val\.json or"):
        prepare(PrepareConfig(root=tmp_path, splits=("val",), draw_lane=True))
