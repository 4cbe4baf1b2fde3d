"""The generated scenes and the check of data folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image
from sklearn.datasets import load_digits

from dnc.mmseg.folders import check_data
from dnc.mmseg.scenes import CARD, CLASSES, PALETTE, DigitScenes, Scenes, compose, write_scenes
from shared_utils.errors import InputError, MissingFileError

FEW = Scenes(num_train=6, num_val=2, num_test=3, size=48, digits=(2, 3), sides=(16, 24))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "made"
    write_scenes(folder, FEW)
    return folder


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def test_the_folders_are_those_of_ade20k(root: Path) -> None:
    for part, count in (("training", 6), ("validation", 2), ("test", 3)):
        images = sorted((root / "images" / part).iterdir())
        labels = sorted((root / "annotations" / part).iterdir())
        assert [p.stem for p in images] == [p.stem for p in labels]
        assert len(images) == count
        assert all(pixels(path).shape == (48, 48, 3) for path in images)
        found = np.unique(np.stack([pixels(path) for path in labels]))
        assert found.min() == 0 < 1 < found.max() <= len(CLASSES)
    assert len(CLASSES) == len(PALETTE) == 11
    assert not list(root.parent.glob(".*"))


def test_the_same_seed_makes_the_same_scenes_and_another_does_not(
    root: Path, tmp_path: Path
) -> None:
    write_scenes(tmp_path / "again", FEW)
    write_scenes(tmp_path / "other", Scenes(**{**FEW.__dict__, "seed": 1}))
    name = Path("images/training/00003.jpg")
    assert (root / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert (root / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_scenes_that_are_there_are_left_alone(root: Path) -> None:
    path = root / "images" / "training" / "00000.jpg"
    before = path.stat().st_mtime_ns
    write_scenes(root, FEW)
    assert path.stat().st_mtime_ns == before
    told = rf"data_root: got {root} with size 48, expected 64; remove that folder"
    with pytest.raises(InputError, match=told):
        write_scenes(root, Scenes(**{**FEW.__dict__, "size": 64}))


def test_another_folder_is_not_taken_for_scenes(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(MissingFileError, match=rf"{CARD}: got no such file"):
        write_scenes(tmp_path / "mine", FEW)


def test_an_interrupted_generation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dnc.mmseg.scenes.compose", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_scenes(tmp_path / "made", FEW)
    assert not (tmp_path / "made").exists()


def test_a_digit_is_in_training_validation_or_test_scenes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[set[bytes]] = []

    def watched(random: Any, images: Any, labels: Any, photographs: Any, scenes: Scenes) -> Any:
        seen.append({image.tobytes() for image in images})
        widths.append({photograph.shape[1] for photograph in photographs})
        return compose(random, images, labels, photographs, scenes)

    widths: list[set[int]] = []
    monkeypatch.setattr("dnc.mmseg.scenes.compose", watched)
    write_scenes(tmp_path / "made", FEW)
    train, val, test = seen[0], seen[6], seen[-1]
    digits = {image.tobytes() for image in load_digits().data}
    assert train | val | test == digits
    # Of the 1797 digits a few are drawn alike to the pixel.
    assert len(train & test) + len(train & val) + len(val & test) <= 1797 - len(digits)
    assert min(len(train), 4 * len(val), 4 * len(test)) > 1100
    assert (widths[0], widths[6], widths[-1]) == ({427}, {213}, {213})


def test_a_scene_by_hand() -> None:
    digit = np.full((1, 64), 16.0)
    photograph = np.zeros((40, 40, 3), np.uint8)
    scenes = Scenes(size=40, digits=(1, 1), sides=(20, 20))
    scene = compose(np.random.default_rng(0), digit, np.array([7]), [photograph], scenes)
    picture, labels = scene.image, scene.annotation
    inside = labels == 9
    assert 0.3 * 400 < inside.sum() < 400  # a full square, but for its margin
    assert picture[labels == 1].max() < 40
    assert picture[inside].mean() > 160 * 0.9
    assert set(np.unique(labels)) == {0, 1, 9}
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    assert scene.boxes.tolist() == [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]
    assert scene.digits.tolist() == [7]


def test_boxes_in_cocos_form_are_those_of_the_labels(root: Path) -> None:
    for part in ("training", "validation", "test"):
        found = json.loads((root / "boxes" / f"{part}.json").read_text())
        assert [c["name"] for c in found["categories"]] == list("0123456789")
        names = {image["id"]: image["file_name"] for image in found["images"]}
        assert sorted(names.values()) == sorted(p.name for p in (root / "images" / part).iterdir())
        for box in found["annotations"]:
            name = Path(names[box["image_id"]]).with_suffix(".png")
            x, y, w, h = box["bbox"]
            inside = pixels(root / "annotations" / part / name)[y : y + h, x : x + w]
            assert (inside == box["category_id"] + 2).mean() > 0.15
            assert box["area"] == w * h


def test_mmseg_reads_them_with_the_rim_ignored(root: Path) -> None:
    init_default_scope("mmseg")
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="PackSegInputs"),
    ]
    options = dict(num_train=6, num_val=2, num_test=3, size=48, digits=[2, 3], sides=[16, 24])
    prefix = dict(img_path="images/training", seg_map_path="annotations/training")
    dataset = DigitScenes(
        data_root=str(root), scenes=options, data_prefix=prefix, pipeline=pipeline
    )
    assert len(dataset) == 6
    labels = dataset[0]["data_samples"].gt_sem_seg.data
    raw = pixels(root / "annotations" / "training" / "00000.png").astype(int)
    assert np.array_equal(labels[0].numpy(), np.where(raw == 0, 255, raw - 1))


# ---- folders ---------------------------------------------------------------------------------


def config(root: Path, num_classes: int = 11) -> Any:
    part = dict(
        type="BaseSegDataset",
        data_root=str(root),
        metainfo=dict(classes=list(CLASSES)),
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=[],
    )
    head = dict(type="DNCFCNHead", num_classes=num_classes)
    init_default_scope("mmseg")
    return Config(dict(model=dict(decode_head=head), train_dataloader=dict(dataset=part)))


def test_data_that_is_there_passes(root: Path) -> None:
    check_data(config(root))


def test_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (copy / "annotations" / "training" / "00002.png").unlink()
    told = r"train_dataloader seg_map_path: got 1 of 6 missing, first .*00002\.png, expected"
    with pytest.raises(InputError, match=told):
        check_data(config(copy))
    shutil.rmtree(copy / "annotations")
    told = r"train_dataloader seg_map_path: got no folder .*annotations/training, expected images"
    with pytest.raises(MissingFileError, match=told):
        check_data(config(copy))
    shutil.rmtree(copy / "images")
    (copy / "images" / "training").mkdir(parents=True)
    (copy / "annotations" / "training").mkdir(parents=True)
    with pytest.raises(InputError, match=r"img_path: got .* without \*\.jpg, expected images"):
        check_data(config(copy))


def test_the_counts_of_classes_are_compared(root: Path) -> None:
    told = r"model\.decode_head\.num_classes: got 5, expected 11, the classes of BaseSegDataset"
    with pytest.raises(InputError, match=told):
        check_data(config(root, num_classes=5))


def test_the_card_says_how_they_were_made(root: Path) -> None:
    assert json.loads((root / CARD).read_text())["sides"] == [16, 24]
