"""VTAB-1k: the folder form as others write it, the recipes."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from e2vpt import vtab
from e2vpt.backbones import Backbone, load_backbone
from e2vpt.cli import main
from e2vpt.config import DataConfig
from e2vpt.data import DataSplits, load_data
from e2vpt.recipes import RECIPES
from e2vpt.sources import load_source
from shared_utils.errors import InputError, MissingFileError

NUM_FILES = 10


def write_task(folder: Path, num_classes: int = 100, num_files: int = NUM_FILES) -> Path:
    """A task in its form: full lists, but each list's lines name a few images again and again.

    Image i of a list holds the grey value 20 i, labels count up; every third is a grey JPEG.
    """
    counts = {"train800": 800, "val200": 200, "train800val200": 1000, "test": 60}
    for split, count in counts.items():
        images = folder / "images" / split
        images.mkdir(parents=True)
        names = []
        for i in range(num_files):
            pixels = np.full((12, 10, 3), 20 * i, np.uint8)
            name = f"{i:06d}.{'jpg' if i % 3 else 'png'}"
            kind = Image.fromarray(pixels).convert("L" if i % 3 == 1 else "RGB")
            kind.save(images / name)
            names.append(f"images/{split}/{name}")
        lines = [f"{names[k % num_files]} {k % num_classes}" for k in range(count)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task named cifar, not to be changed."""
    return write_task(tmp_path_factory.mktemp("vtab-1k") / "cifar")


@pytest.fixture
def own(cifar: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(cifar, tmp_path / "cifar"))


def load(folder: Path, **options: object) -> DataSplits:
    cfg = DataConfig(source=str(folder), img_size=8, **options)  # type: ignore[arg-type]
    return load_data(cfg, img_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, seed=0)


def edit(path: Path, number: int, line: str) -> None:
    """Put another line in the place of line `number`."""
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


# ---- reading --------------------------------------------------------------------------------


def test_the_four_lists_become_the_splits(cifar: Path) -> None:
    found = load(cifar)
    assert found.name == "cifar"
    assert found.class_names == [str(label) for label in range(100)]
    assert found.val is not None
    assert found.test is not None
    assert (len(found.train), len(found.val), len(found.test)) == (800, 200, 60)
    for images, split in ((found.train, "train800"), (found.val, "val200"), (found.test, "test")):
        rows = [line.split(" ") for line in (cifar / f"{split}.txt").read_text().splitlines()]
        assert [images.path(i) for i in range(len(images))] == [str(cifar / p) for p, _ in rows]
        assert images.labels == [int(label) for _, label in rows]


def test_the_final_training_takes_the_list_of_1000(cifar: Path) -> None:
    found = load(cifar, train_on_val=True)
    assert found.val is None
    assert found.test is not None
    assert (len(found.train), len(found.test)) == (1000, 60)
    assert {Path(found.train.path(i)).parent.name for i in range(1000)} == {"train800val200"}
    assert found.summary()["train_images"] == 1000


def test_png_and_grey_jpeg_become_rgb(cifar: Path) -> None:
    train = load(cifar, normalize="none").train
    for i in range(NUM_FILES):
        image, _ = train[i]
        assert image.shape == (3, 8, 8)
        assert image.mul(255).sub(20 * i).abs().max() < 3, i  # JPEG is not exact


def test_images_are_not_opened_before_they_are_used(own: Path) -> None:
    for path in (own / "images").rglob("*.*"):
        path.write_bytes(b"no image")
    source = load_source(str(own))
    assert [len(pool or []) for pool in (source.train, source.val, source.test)] == [800, 200, 60]
    with pytest.raises(InputError, match=r"unreadable image.*images/train800/000000\.png"):
        load(own)


def test_a_folder_of_another_name_has_as_many_classes_as_its_labels_say(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "my own task", num_classes=7)
    assert load(folder).class_names == list("0123456")
    task = write_task(tmp_path / "cifar", num_classes=7)
    assert load(task).num_classes == 100  # as all that is published about it


def test_forms_that_editors_and_other_systems_leave(own: Path) -> None:
    for path in own.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    spaced = own / "images" / "train800" / "a b.png"
    shutil.copy(own / "images" / "train800" / "000000.png", spaced)
    edit(own / "train800.txt", 1, "images/train800/a b.png 42")
    train = load(own).train
    assert (train.path(0), train.labels[0]) == (str(spaced), 42)


@pytest.mark.parametrize("name", vtab.LISTS)
def test_a_missing_list_is_named(own: Path, name: str) -> None:
    (own / f"{name}.txt").unlink()
    with pytest.raises(MissingFileError, match=rf"^data\.source: got no '.*/cifar/{name}\.txt', "):
        load(own)


@pytest.mark.parametrize("split", vtab.LISTS)
def test_missing_images_are_named_or_skipped(own: Path, split: str) -> None:
    gone = own / "images" / split / "000000.png"
    gone.unlink()
    match = rf"got 1 listed image not there: {re.escape(str(gone))}, expected every"
    with pytest.raises(MissingFileError, match=match):
        load(own)
    found = load(own, skip_bad=True)
    assert set(found.skipped) <= {str(gone)}
    assert len(found.train) == (720 if split == "train800" else 800)


@pytest.mark.parametrize(
    ("split", "extra", "expected"),
    [("train800", -1, 800), ("val200", 1, 200), ("train800val200", -200, 1000)],
)
def test_wrong_counts_are_named(own: Path, split: str, extra: int, expected: int) -> None:
    path = own / f"{split}.txt"
    lines = path.read_text().splitlines()
    lines = lines[:extra] if extra < 0 else lines + lines[:extra]
    path.write_text("\n".join(lines))
    match = rf"got {expected + extra} images in '.*{split}\.txt', expected {expected}; "
    with pytest.raises(InputError, match=match):
        load(own)


def test_an_empty_list_is_an_error(own: Path) -> None:
    (own / "test.txt").write_text("\n")
    with pytest.raises(InputError, match=r"got 0 images in '.*test\.txt', expected some; "):
        load(own)


@pytest.mark.parametrize(
    "line",
    ["images/val200/000000.png", "images/val200/000000.png -1", "images/val200/000000.png 1.0",
     "images/val200/000000.png\t1", " 3", "images/val200/000000.png cat",
     "images/val200/000000.png ²"],
)  # fmt: skip
def test_a_bad_line_is_named_by_file_and_number(own: Path, line: str) -> None:
    edit(own / "val200.txt", 17, line)
    match = r"got '.*' in '.*/val200\.txt' line 17, expected a path, a space and a label"
    with pytest.raises(InputError, match=match):
        load(own)


def test_a_label_out_of_range_is_named(own: Path) -> None:
    edit(own / "test.txt", 5, "images/test/000000.png 100")
    match = r"got label 100 in '.*test\.txt' line 5, expected 0 to 99, as cifar has 100 classes"
    with pytest.raises(InputError, match=match):
        load(own)


def test_a_list_that_is_no_text(own: Path) -> None:
    (own / "val200.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"got no readable list '.*val200\.txt' \("):
        load(own)


def test_counts_of_a_split_cannot_be_chosen(cifar: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.num_train: got 100, expected 0, as .*own"):
        load(cifar, num_train=100)


# ---- training on validation images too, of any source ---------------------------------------


def test_train_on_val_with_digits_is_both_splits_in_order() -> None:
    plain, both = load(Path("digits")), load(Path("digits"), train_on_val=True)
    assert plain.val is not None
    assert both.val is None
    names = [images.path(i) for images in (plain.train, plain.val) for i in range(len(images))]
    assert [both.train.path(i) for i in range(1000)] == names
    assert both.train.labels == plain.train.labels + plain.val.labels
    image, label = both.train[801]
    assert (image.equal(plain.val[1][0]), label) == (True, plain.val[1][1])
    assert both.test is not None
    assert plain.test is not None
    assert both.test.labels == plain.test.labels


def write_pictures(folder: Path, names: Sequence[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
    return folder


def as_csv(folder: Path) -> list[str]:
    names = ["t/a.png", "t/b.png", "t/c.png", "v/a.png", "v/b.png"]
    write_pictures(folder, names)
    for split, rows in (("train", names[:3]), ("val", names[3:])):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", "label"], *([name, name[2]] for name in rows)])
    return names


def as_split_folders(folder: Path) -> list[str]:
    names = [f"{split}/{name}/1.png" for split in ("train", "val") for name in ("cat", "dog")]
    write_pictures(folder, names)
    return names


@pytest.mark.parametrize("write", [as_csv, as_split_folders])
def test_train_on_val_joins_lists_and_folders(
    tmp_path: Path, write: Callable[[Path], list[str]]
) -> None:
    names = write(tmp_path)
    found = load(tmp_path, train_on_val=True, normalize="none")
    assert found.val is None
    assert [found.train.path(i) for i in range(len(names))] == [str(tmp_path / n) for n in names]
    reds = [round(float(found.train[i][0][0].mean()) * 255) for i in range(len(names))]
    assert reds == list(range(len(names)))


def test_train_on_val_joins_what_was_drawn_from_a_pool(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)])
    plain, both = load(tmp_path), load(tmp_path, train_on_val=True)
    assert plain.val is not None

    def paths(*sets: object) -> list[str]:
        return sorted(s.path(i) for s in sets for i in range(len(s)))  # type: ignore[attr-defined, arg-type]

    assert paths(both.train) == paths(plain.train, plain.val)
    assert len(both.train) == 16
    assert paths(both.test) == paths(plain.test)


def test_unreadable_images_of_joined_splits_are_left_out(tmp_path: Path) -> None:
    names = as_split_folders(tmp_path)
    (tmp_path / names[2]).write_bytes(b"no image")
    found = load(tmp_path, train_on_val=True, skip_bad=True)
    assert found.skipped == [str(tmp_path / names[2])]
    assert [found.train.path(i) for i in range(3)] == [
        str(tmp_path / name) for name in (*names[:2], names[3])
    ]


# ---- recipes --------------------------------------------------------------------------------


def test_recipes_follow_the_released_commands() -> None:
    lengths = {
        "caltech101": (32, 5), "cifar": (5, 5), "oxford_flowers102": (1, 1),
        "patch_camelyon": (10, 10), "dsprites_loc": (5, 5), "dsprites_ori": (5, 5),
    }  # fmt: skip
    for task in vtab.TASKS:
        recipe = RECIPES["vtab-" + task.folder.replace("_", "-")]
        model, data, optim = recipe.model, recipe.data, recipe.optim
        assert (model.num_visual_prompts, model.num_kv_prompts) == lengths.get(task.folder, (10, 5))
        assert data.source == f"data/vtab-1k/{task.folder}"
        assert (data.resize, data.augment, data.normalize) == ("squash", "none", "imagenet")
        assert (optim.optimizer, optim.scale_lr, data.batch_size) == ("sgd", True, 64)
        assert (optim.epochs, optim.warmup_epochs, optim.schedule) == (100, 10, "per-epoch")
        assert model.parity_head
        assert recipe.run.precision == "32-true"


RUN_FILES = {
    "config.json", "metrics.jsonl", "last.ckpt", "last.ckpt.prev", "model.safetensors",
    "model.json", "result.json", "curves.png", "confusion.png", "predictions.png", "tensorboard",
    "initial.safetensors", "prompts.png", "prompts.json",
}  # fmt: skip


@pytest.mark.parametrize("final", [False, True])
def test_training_writes_the_run_folder(
    cifar: Path,
    tmp_path: Path,
    quick: list[str],
    final: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["train", "vtab-cifar", *quick, "--data.source", str(cifar), "--data.num-workers", "0"]
    argv += ["--runs-dir", str(tmp_path), "--name", "x"]
    assert main([*argv, *(["--data.train-on-val"] if final else [])]) == 0
    folder = tmp_path / "e2vpt" / "x"
    found = {path.name for path in folder.iterdir()} - {"best.ckpt.prev"}
    assert found == RUN_FILES | (set() if final else {"best.ckpt"})
    result = json.loads((folder / "result.json").read_text())
    assert result["recipe"] == "vtab-cifar"
    assert result["normalize"] == "imagenet"
    assert result["data"]["name"] == "cifar"
    counts = [result["data"][f"{split}_images"] for split in ("train", "val", "test")]
    assert counts == [40, 0 if final else 40, 40]  # of --data.limit
    split = {"test_top1", "test_top5"}
    assert result["metrics"].keys() == (split if final else split | {"val_top1", "val_top5"})
    card = json.loads((folder / "model.json").read_text())
    assert len(card["class_names"]) == 100
    assert card["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    capsys.readouterr()
    assert main(["evaluate", str(folder)]) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(told["test_top1"]) == pytest.approx(result["metrics"]["test_top1"], abs=1e-4)
    if final:
        assert main(["evaluate", str(folder), "--split", "val"]) == 2
        assert "split: got 'val', which" in capsys.readouterr().err
        assert main(["evaluate", str(folder), "--which", "best"]) == 2
        assert "best.ckpt: got no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("normalize", "mean", "std"),
    [
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("checkpoint", [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
        ("none", [0.0] * 3, [1.0] * 3),
    ],
)
def test_the_normalisation_is_recorded(
    cifar: Path,
    tmp_path: Path,
    quick: list[str],
    normalize: str,
    mean: list[float],
    std: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_statistics(*args: Any, **kwargs: Any) -> Backbone:
        return replace(load_backbone(*args, **kwargs), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))

    monkeypatch.setattr("e2vpt.train.load_backbone", with_statistics)
    argv = ["train", "vtab-cifar", *quick, "--data.source", str(cifar), "--data.num-workers", "0"]
    argv += ["--data.normalize", normalize, "--optim.epochs", "1", "--data.limit", "10"]
    assert main([*argv, "--runs-dir", str(tmp_path), "--name", "x"]) == 0
    folder = tmp_path / "e2vpt" / "x"
    result = json.loads((folder / "result.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    used = json.loads((folder / "model.json").read_text())["preprocessing"]
    assert result["normalize"] == config["data"]["normalize"] == normalize
    assert (used["mean"], used["std"]) == (mean, std)


def test_training_on_everything_without_a_test_measures_nothing(
    tmp_path: Path, quick: list[str]
) -> None:
    as_split_folders(tmp_path / "data")
    argv = ["train", "images-micro", *quick, "--data.source", str(tmp_path / "data")]
    argv += ["--data.train-on-val", "--optim.epochs", "1"]
    assert main([*argv, "--runs-dir", str(tmp_path), "--name", "x"]) == 0
    result = json.loads((tmp_path / "e2vpt" / "x" / "result.json").read_text())
    assert result["metrics"] == {}
    assert result["data"]["train_images"] == 4
    assert (tmp_path / "e2vpt" / "x" / "model.safetensors").is_file()


def test_missing_data_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["train", "vtab-kitti", *quick]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.source: got 'data/vtab-1k/kitti', which is not there")
    assert "train800.txt (VTAB-1k)" in error
