"""FGVC: the JSON form as others write it, the recipes, the published figures."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from PIL import Image

from e2vpt import fgvc
from e2vpt.cli import main
from e2vpt.config import DataConfig
from e2vpt.data import DataSplits, load_data
from e2vpt.recipes import RECIPES
from shared_utils.errors import InputError, MissingFileError

SHADES = 3  # images of an id in train, one of them also for val and test


def write_set(folder: Path, ids: list[int] | list[str], root: str = "images") -> Path:
    """A set in its form: of each id three training, one validation and one test image."""
    for split, count in (("train", SHADES), ("val", 1), ("test", 1)):
        listed: dict[str, Any] = {}
        for key in reversed(ids):  # the order in the file must not matter
            for number in range(count):
                name = f"{key:03}.bird/{split}_{number}.jpg" if isinstance(key, int) else ""
                name = name or f"{key}/{split}_{number}.jpg"
                listed[name] = key
                path = folder / root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (6, 4), 60 * number).save(path)
        (folder / f"{split}.json").write_text(json.dumps(listed))
    return folder


def load(folder: Path, **options: Any) -> DataSplits:
    cfg = DataConfig(source=str(folder), img_size=8, **options)
    return load_data(cfg, img_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, seed=0)


def rewrite(path: Path, change: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


# ---- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "names"),
    [([5, 17, 2, 110], ["2", "5", "17", "110"]), (["b", "a", "10", "9"], ["10", "9", "a", "b"])],
)
def test_labels_are_the_ids_in_sorted_order(
    tmp_path: Path, ids: list[Any], names: list[str]
) -> None:
    found = load(write_set(tmp_path, ids))
    assert found.class_names == names
    assert found.val is not None
    assert found.test is not None
    sizes = (len(found.train), len(found.val), len(found.test))
    assert sizes == (SHADES * len(ids), len(ids), len(ids))
    for images, split in ((found.train, "train"), (found.val, "val"), (found.test, "test")):
        listed = json.loads((tmp_path / f"{split}.json").read_text())
        assert [found.class_names[label] for label in images.labels] == [
            str(key) for key in listed.values()
        ]
        assert [images.path(i) for i in range(len(images))] == [
            str(tmp_path / "images" / name) for name in listed
        ]
    assert found.train[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize("root", ["images", "Images", ""])
@pytest.mark.parametrize("name", ["any", "dogs"])
def test_the_place_of_the_images(
    tmp_path: Path, name: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = fgvc.FGVCSet("dogs", "", 2, "Images")
    monkeypatch.setitem(fgvc.SET_OF_FOLDER, "dogs", known)
    folder = write_set(tmp_path / name, [1, 2], root)
    (folder / root / json.loads((folder / "train.json").read_text()).popitem()[0]).unlink()
    with pytest.raises(
        MissingFileError, match=rf"1 listed image not there: {re.escape(str(folder / root))}/"
    ):
        load(folder)  # found by the images that are there, so that the missing one is named right
    assert len(load(folder, skip_bad=True).train) == 2 * SHADES - 1


def test_no_image_at_all_names_the_place_that_the_set_has(tmp_path: Path) -> None:
    folder = tmp_path / "cub"
    folder.mkdir()
    listed = {f"{i:03}/{i}.jpg": i for i in range(200)}
    for split in fgvc.SPLITS:
        (folder / f"{split}.json").write_text(json.dumps(listed))
    match = (
        rf"got 600 listed images not there: {re.escape(str(folder / 'images' / '000' / '0.jpg'))}, "
    )
    with pytest.raises(MissingFileError, match=match):
        load(folder)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_missing_list_is_named(tmp_path: Path, split: str) -> None:
    (write_set(tmp_path, [1, 2]) / f"{split}.json").unlink()
    with pytest.raises(MissingFileError, match=rf"got no '.*{split}\.json', expected train\.json"):
        load(tmp_path)


@pytest.mark.parametrize("split", fgvc.SPLITS)
def test_a_missing_image_is_named(tmp_path: Path, split: str) -> None:
    rewrite(write_set(tmp_path, [1, 2]) / f"{split}.json", {"gone.jpg": 1})
    match = r"got 1 listed image not there: .*images/gone\.jpg, expected every image"
    with pytest.raises(MissingFileError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", r"got no readable JSON '.*val\.json' \("),
        (b"\xff\xfe\x00", r"got no readable JSON '.*val\.json' \("),
        (b"[1, 2]", r"got a list in '.*val\.json', expected \{\"image name\": class id"),
        (b"{}", r"got an empty list in '.*val\.json'"),
        (b'{"a.jpg": 1, "b.jpg": "2"}', r"got class id \"2\" of 'b\.jpg' in '.*val\.json'"),
        (b'{"a.jpg": 1, "b.jpg": true}', r"got class id true of 'b\.jpg' in '.*val\.json'"),
        (b'{"a.jpg": 1.5}', r"got class id 1\.5 of 'a\.jpg' in '.*val\.json'"),
        (b'{"a.jpg": [1]}', r"got class id \[1\] of 'a\.jpg' in '.*val\.json'"),
        (b'{"a.jpg": 7}', r"got class id 7 of 'a\.jpg' in '.*val\.json', expected an id of train"),
        (b'{"a.jpg": "1"}', r"got class id \"1\" of 'a\.jpg' in '.*val\.json', expected an id of"),
    ],
)
def test_a_bad_list_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    (write_set(tmp_path, [1, 2]) / "val.json").write_bytes(content)
    with pytest.raises(InputError, match=match):
        load(tmp_path)


def test_a_known_set_has_its_number_of_classes(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "cars", [1, 2, 3], "")
    match = r"got 3 class ids in '.*cars/train\.json', expected 196, those of Stanford Cars; .*name"
    with pytest.raises(InputError, match=match):
        load(folder)
    folder = write_set(tmp_path / "flowers", list(range(1, 103)), "")
    assert load(folder).num_classes == 102


def test_train_on_val_joins_the_two_lists(tmp_path: Path) -> None:
    write_set(tmp_path, [3, 1])
    found = load(tmp_path, train_on_val=True)
    assert found.val is None
    assert len(found.train) == 2 * (SHADES + 1)
    assert found.train.labels == [0] * SHADES + [1] * SHADES + [0, 1]
    assert found.train.path(2 * SHADES).endswith("images/001.bird/val_0.jpg")


# ---- recipes --------------------------------------------------------------------------------


def test_recipes_follow_the_released_code() -> None:
    assert [name for name in RECIPES if name.startswith("fgvc-")] == [
        "fgvc-cub", "fgvc-nabirds", "fgvc-flowers", "fgvc-dogs", "fgvc-cars",
    ]  # fmt: skip
    for found in fgvc.SETS:
        recipe = RECIPES[found.recipe]
        model, data, optim = recipe.model, recipe.data, recipe.optim
        assert (model.num_visual_prompts, model.num_kv_prompts) == (5, 5)
        assert data.source == f"data/fgvc/{found.folder}"
        assert (data.resize, data.augment, data.normalize) == ("crop", "crop-flip", "imagenet")
        assert (optim.optimizer, optim.scale_lr, data.batch_size) == ("sgd", True, 128)
        assert (optim.epochs, optim.warmup_epochs, optim.schedule) == (100, 10, "per-epoch")
        assert not data.train_on_val  # as there: the validation images are never trained on


def test_training_writes_the_run_folder(tmp_path: Path, quick: list[str]) -> None:
    source = write_set(tmp_path / "birds", [4, 8, 15, 16, 23, 42])
    argv = ["train", "fgvc-cub", *quick, "--data.source", str(source), "--data.num-workers", "0"]
    assert main([*argv, "--runs-dir", str(tmp_path), "--name", "x"]) == 0
    folder = tmp_path / "e2vpt" / "x"
    assert {"best.ckpt", "config.json", "model.safetensors", "confusion.png"} <= {
        path.name for path in folder.iterdir()
    }
    result = json.loads((folder / "result.json").read_text())
    assert (result["recipe"], result["normalize"]) == ("fgvc-cub", "imagenet")
    counts = [result["data"][f"{split}_images"] for split in ("train", "val", "test")]
    assert counts == [18, 6, 6]
    assert result["metrics"].keys() == {"val_top1", "val_top5", "test_top1", "test_top5"}
    names = json.loads((folder / "model.json").read_text())["class_names"]
    assert names == ["4", "8", "15", "16", "23", "42"]


# ---- published figures ----------------------------------------------------------------------


def test_sets_and_classes() -> None:
    classes = {found.folder: found.num_classes for found in fgvc.SETS}
    assert classes == {"cub": 200, "nabirds": 555, "flowers": 102, "dogs": 120, "cars": 196}


@pytest.mark.parametrize("row", fgvc.PUBLISHED, ids=lambda row: row.method)
def test_every_row_agrees_with_the_mean_it_prints(row: fgvc.Published) -> None:
    assert row.source.startswith("published")
    if row.top1:
        assert fmean(row.top1.values()) == pytest.approx(row.mean, abs=0.05)


def test_published_rows() -> None:
    row = fgvc.published()
    assert (row.method, row.mean, row.top1["cars"]) == ("E²VPT", 89.22, 82.8)
    assert fmean(row.top1.values()) == pytest.approx(89.22, abs=0.005)
    full, ours = fgvc.published("VPT-Deep").top1, row.top1
    assert sum(ours[name] > full[name] for name in ours) == 4
    with pytest.raises(InputError, match=r"method: got 'Lin', expected a row"):
        fgvc.published("Lin")


def test_the_page_shows_the_figures_of_the_table() -> None:
    page = (Path(__file__).parents[1] / "docs" / "fgvc.md").read_text()
    for row in fgvc.PUBLISHED:
        cells = [f"{row.top1[name]:.1f}" if row.top1 else "" for name in fgvc.SET_OF_FOLDER]
        assert f"| {row.method} | {' | '.join(cells)} | {row.mean:.2f} |" in page
        if row.tuned_percent:
            cells = [f"{row.tuned_percent[name]:.2f}" for name in fgvc.SET_OF_FOLDER]
            assert f"| {row.method}, tuned % | {' | '.join(cells)} | |" in page
