"""Generated scenes: what is labelled is what is seen, and a seed decides everything."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from yolop_mtl.bdd100k import CATEGORIES, load_records, read_scenes
from yolop_mtl.lanes import draw_areas, draw_lines, pair_edges
from yolop_mtl.masks import check_share, read_mask
from yolop_mtl.records import ALL_BDD_CLASSES, VEHICLE_CLASS, VEHICLES, Classes
from yolop_mtl.synth import Scene, SynthConfig, draw_scene, generate

SIZE = (360, 640)
EVERY = Classes(ALL_BDD_CLASSES, known=CATEGORIES)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(0, index, SIZE) for index in range(10)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "a set"
    generate(SynthConfig(out=folder, num_train=3, num_val=2, num_workers=2))
    return folder


def same(first: Scene, second: Scene) -> bool:
    arrays = all(
        np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("image", "numbers", "drivable", "lane")
    )
    return arrays and first.labels == second.labels and first.attributes == second.attributes


def test_a_scene_depends_on_seed_split_and_number_alone(scenes: list[Scene]) -> None:
    assert same(scenes[3], draw_scene(0, 3, SIZE))
    others = [draw_scene(1, 3, SIZE), draw_scene(0, 3, SIZE, split="val"), scenes[4]]
    assert not any(np.array_equal(scenes[3].image, other.image) for other in others)


def test_shapes_and_values(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert (scene.image.shape, scene.image.dtype) == ((*SIZE, 3), np.uint8)
        for name, allowed in (("drivable", {0, 1, 2}), ("lane", {0, 1})):
            mask = getattr(scene, name)
            assert (mask.shape, mask.dtype) == (SIZE, np.uint8)
            assert set(np.unique(mask)) <= allowed
        assert scene.boxes_xyxy.shape == (len(scene.categories), 4)
        assert (scene.boxes_xyxy[:, :2] < scene.boxes_xyxy[:, 2:]).all()
        assert (scene.boxes_xyxy <= [640, 360, 640, 360]).all()
        assert (scene.boxes_xyxy >= 0).all()


def test_boxes_hug_what_is_seen_of_their_vehicles(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert set(np.unique(scene.numbers)) - {255} == set(range(len(scene.categories) + 1))
        for number, box in enumerate(scene.boxes_xyxy.tolist(), 1):
            rows, columns = np.nonzero(scene.numbers == number)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == edges


def test_no_vehicle_stands_on_what_is_drivable(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert not (scene.drivable[scene.numbers > 0] > 0).any()
    # Every scene has some of its own lane, right before the camera.
    assert all((scene.drivable[-40:] == 1).any() for scene in scenes)


def test_shares_are_those_of_a_data_set(scenes: list[Scene]) -> None:
    assert 0.05 < check_share("drivable", "binary", [scene.drivable for scene in scenes]) < 0.4
    assert 0.005 < check_share("lane", "binary", [scene.lane for scene in scenes]) < 0.06


def test_there_is_variety() -> None:
    scenes = [draw_scene(2, index, (180, 320)) for index in range(60)]
    kinds = Counter(name for scene in scenes for name in scene.categories)
    assert set(kinds) == set(VEHICLES)
    assert kinds["car"] > sum(kinds.values()) / 2
    found = {
        key: {scene.attributes[key] for scene in scenes}
        for key in ("weather", "scene", "timeofday")
    }
    assert found == {
        "weather": {"clear", "partly cloudy", "overcast", "rainy"},
        "scene": {"highway", "city street", "residential"},
        "timeofday": {"daytime", "night", "dawn/dusk"},
    }
    brightness = {
        time: np.mean([s.image.mean() for s in scenes if s.attributes["timeofday"] == time])
        for time in ("daytime", "night")
    }
    assert brightness["night"] < brightness["daytime"] / 2
    labels = [label for scene in scenes for label in scene.labels]
    styles = Counter(
        label["attributes"]["laneStyle"] for label in labels if "laneStyle" in label["attributes"]
    )
    assert min(styles["solid"], styles["dashed"]) > 30
    colours = {label["category"] for label in labels} & {"single white", "single yellow"}
    assert len(colours) == 2
    assert any(label["attributes"].get("occluded") for label in labels)


# ---- files --------------------------------------------------------------------------------------


def test_masks_are_those_of_the_polygons(root: Path) -> None:
    for split in ("train", "val"):
        for scene in read_scenes(root / f"labels/det_20/det_{split}.json"):
            lane = draw_lines(pair_edges(scene.lines), (720, 1280), width=8)
            written = read_mask(
                root / f"ll_seg_annotations/{split}/{scene.name}.png", "lane", "binary"
            )
            assert np.array_equal(written, lane)
            areas = np.array(Image.open(root / f"da_seg_annotations/{split}/{scene.name}.png"))
            numbers = draw_areas(scene.areas, (720, 1280), classes="three")
            assert np.array_equal(areas, np.array([0, 255, 127])[numbers])


def test_lanes_are_eight_pixels_wide_and_both_edges_are_paired() -> None:
    scene = draw_scene(0, 0)
    lines = [label for label in scene.labels if "laneStyle" in label["attributes"]]
    stretches = sum(len(label["poly2d"]) for label in lines) // 2
    assert stretches > 2
    # A column of the image meets flat lines, a row steep ones: the thinnest run of either is 8.
    rows = [np.diff(np.flatnonzero(np.diff(np.pad(row, 1)))) for row in scene.lane.astype(int)]
    runs = np.concatenate([row[::2] for row in rows if len(row)])
    assert 7 <= np.percentile(runs, 5) <= 12


def test_files_are_read_as_they_were_drawn(root: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        records = load_records(root, split, EVERY)
        assert len(records) == count
        for index, record in enumerate(records):
            scene = draw_scene(0, index, split=split)
            assert record.boxes_xyxy is not None
            assert record.labels is not None
            assert np.array_equal(record.boxes_xyxy, scene.boxes_xyxy)
            assert [EVERY.names[number] for number in record.labels] == scene.categories
            assert record.drivable is not None
            drivable = read_mask(record.drivable, "drivable", "binary")
            assert np.array_equal(drivable, scene.drivable > 0)
            image = np.asarray(Image.open(record.image).convert("RGB"), dtype=float)
            assert image.shape == (720, 1280, 3)
            # JPEG, and in the right order of colours.
            assert np.abs(image - scene.image).mean() < 6
    vehicles = load_records(root, "val", Classes(VEHICLE_CLASS, known=CATEGORIES))
    assert [len(v.boxes_xyxy) for v in vehicles] == [len(r.boxes_xyxy) for r in records]  # type: ignore[arg-type]
    frames = json.loads((root / "labels/det_20/det_val.json").read_text())
    assert {"weather", "scene", "timeofday"} == set(frames[0]["attributes"])


def test_workers_change_nothing_and_what_is_there_stays(root: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    config = SynthConfig(out=again, num_train=3, num_val=2, num_workers=1)
    generate(config)
    files = {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()} == files
    marked = next(again.rglob("*.jpg"))
    marked.write_bytes(b"mine")
    generate(config)
    assert marked.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_other_scenes_are_not_replaced_unless_told(tmp_path: Path) -> None:
    small = {"num_val": 0, "size": (180, 320)}
    generate(SynthConfig(out=tmp_path / "a", num_train=1, **small))
    with pytest.raises(ValueError, match=r"out: got .*a with seed 0, expected 7; say --overwrite"):
        generate(SynthConfig(out=tmp_path / "a", num_train=1, seed=7, **small))
    generate(SynthConfig(out=tmp_path / "a", num_train=2, overwrite=True, **small))
    assert len(list((tmp_path / "a/images/train").iterdir())) == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"synth\.json: got no such file"):
        generate(SynthConfig(out=tmp_path / "b", num_train=1, overwrite=True, **small))
    assert (tmp_path / "b/thesis.txt").is_file()


def test_nothing_is_left_of_what_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("yolop_mtl.synth.compose", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(SynthConfig(out=tmp_path / "a", num_train=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_train": -1}, "num_train: got -1, expected 0 or more"),
        ({"num_train": 0, "num_val": 0}, "num_train and num_val: got 0, expected 1 or more"),
        ({"num_workers": 0}, "num_workers: got 0, expected 1 or more"),
        ({"size": (100, 640)}, "size: got 100 x 640, expected 120 x 160 pixels or more"),
    ],
)
def test_wrong_options(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthConfig(**fields)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: got .*, expected a folder that can be written"):
        generate(SynthConfig(out=tmp_path / "file/a", num_train=1, size=(180, 320)))
