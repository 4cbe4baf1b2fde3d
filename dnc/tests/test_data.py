"""Sources, splits, transforms and loaders: what a run sees of its images."""

import io
import json
import pickle
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dnc.config import DataConfig
from dnc.data import ImageSet, build_loader, eval_transform, load_data, split_pools
from dnc.sources import load_pools, to_rgb
from shared_utils.errors import InputError, MissingFileError

SMALL = DataConfig(img_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=4)


def write_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (10, 8)) -> Path:
    """A folder per class; image i of a class is grey, of value 20 i + 100 c."""
    for c, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", size, (20 * i + 100 * c,) * 3)
            image.save(folder / name / f"{i:02d}.png")
    return folder


def packed(path: Path, count: int = 30) -> Path:
    files = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (8 * i, 0, 0)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(files), np.uint8),
        offsets=offsets,
        label=np.arange(count) % 3,
        classes=np.array(["x", "y", "z"]),
    )
    return path


# ---- sources ---------------------------------------------------------------------------------


def test_digits_are_split_as_everywhere() -> None:
    pools = load_pools("digits", Path())
    assert [len(pools[name]) for name in ("train", "val", "test")] == [800, 200, 797]
    assert [pools["train"].name(i) for i in range(4)] == [
        "digits[1081]", "digits[1707]", "digits[927]", "digits[713]",
    ]  # fmt: skip
    assert pools["val"].class_names == [str(i) for i in range(10)]
    assert pools["test"].image(0).size == (8, 8)


def test_a_folder_is_drawn_from(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pets", {"cat": 6, "dog": 8, "owl": 6})
    cfg = replace(SMALL, source=str(folder), num_train=10, num_val=4)
    splits = load_data(cfg, seed=0)
    assert splits.class_names == ["cat", "dog", "owl"]
    sets = (splits.train, splits.val, splits.test)
    assert [len(s) for s in sets if s is not None] == [10, 4, 6]
    paths = [s.path(i) for s in sets if s is not None for i in range(len(s))]
    assert len(set(paths)) == 20
    assert all(Path(path).parent.parent == folder for path in paths)
    assert splits.summary() == {
        "name": "pets", "train_images": 10, "val_images": 4, "test_images": 6, "skipped": 0,
    }  # fmt: skip


def test_folders_of_splits_stay(tmp_path: Path) -> None:
    for name, count in (("train", 5), ("val", 2), ("test", 3)):
        write_images(tmp_path / "x" / name, {"a": count, "b": count})
    splits = load_data(replace(SMALL, source=str(tmp_path / "x")), seed=0)
    assert (len(splits.train), len(splits.val or ()), len(splits.test or ())) == (10, 4, 6)


def test_a_packed_file(tmp_path: Path) -> None:
    path = packed(tmp_path / "images.npz")
    pools = split_pools(load_pools(str(path), Path()), replace(SMALL, num_val=5, num_test=5))
    assert {name: len(pool) for name, pool in pools.items()} == {"train": 20, "val": 5, "test": 5}
    pool = pools["train"]
    place = int(pool.name(0).split("[")[1][:-1])
    assert pool.labels[0] == place % 3
    assert abs(int(np.asarray(pool.image(0))[0, 0, 0]) - 8 * place) < 8


def cifar(root: Path, name: str) -> Path:
    """Files of torchvision's form, a few images in each batch."""
    rng = np.random.default_rng(0)

    def batch(count: int) -> dict[str, Any]:
        data = rng.integers(0, 255, (count, 3072), dtype=np.uint8)
        key = "labels" if name == "cifar10" else "fine_labels"
        return {"data": data, key: [i % 10 for i in range(count)]}

    folder = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    folder.mkdir(parents=True)
    if name == "cifar10":
        files = {f"data_batch_{i}": batch(20) for i in range(1, 6)} | {"test_batch": batch(10)}
        meta = ("batches.meta", {"label_names": [f"c{i}" for i in range(10)]})
    else:
        files = {"train": batch(100), "test": batch(10)}
        meta = ("meta", {"fine_label_names": [f"c{i}" for i in range(10)]})
    for file, content in [*files.items(), meta]:
        (folder / file).write_bytes(pickle.dumps(content))
    return root


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvisions_cifar_files(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar(tmp_path, name)
    with pytest.raises(MissingFileError, match=r"^data\.root: got .*, without an intact cifar-10"):
        load_pools(name, tmp_path)  # these are not the real files: their hashes differ
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    pools = load_pools(name, tmp_path)
    assert (len(pools["train"]), len(pools["test"])) == (100, 10)
    assert pools["train"].class_names[:2] == ["c0", "c1"]
    assert pools["train"].name(3) == f"{name}/train[3]"
    found = split_pools(pools, replace(SMALL, source=name))
    assert {split: len(pool) for split, pool in found.items()} == {
        "train": 90, "val": 10, "test": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("L", (4, 4), 90), (90, 90, 90)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 257 * 90, np.uint16)), (90, 90, 90)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
    ],
    ids=["grey", "clear", "16 bits", "one bit"],
)
def test_modes_become_rgb(image: Image.Image, pixel: tuple[int, int, int]) -> None:
    found = to_rgb(image)
    assert (found.mode, found.getpixel((0, 0))) == ("RGB", pixel)


# ---- groups ----------------------------------------------------------------------------------


def test_groups_are_trained_and_classes_kept(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pets", {"cat": 6, "dog": 8, "owl": 6})
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({"cat": "fur", "dog": "fur", "owl": "feathers"}))
    splits = load_data(replace(SMALL, source=str(folder), num_val=5, groups=groups), seed=0)
    assert splits.class_names == ["feathers", "fur"]
    assert splits.fine_names == ["cat", "dog", "owl"]
    for i in range(len(splits.train)):
        name = Path(splits.train.path(i)).parent.name
        assert splits.fine_names[splits.fine["train"][i]] == name
        assert splits.train.labels[i] == (0 if name == "owl" else 1)
    groups.write_text(json.dumps({"cat": "fur"}))
    with pytest.raises(InputError, match=r"^data\.groups: got no group for dog \(2 of 3 classes\)"):
        load_data(replace(SMALL, source=str(folder), groups=groups), seed=0)


# ---- images ----------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    folder = write_images(tmp_path / "x", {"a": 7, "b": 6}, (16, 12))
    cfg = replace(SMALL, source=str(folder), crop="pad", flip=True, num_val=1, num_train=12)
    return load_data(cfg, seed=0).train


def test_augmentation_depends_on_seed_epoch_and_index_alone(images: ImageSet) -> None:
    state = torch.get_rng_state()
    first = [images[i][0] for i in range(12)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert all(torch.equal(images[i][0], first[i]) for i in reversed(range(12)))
    images.set_epoch(1)
    assert not all(torch.equal(images[i][0], first[i]) for i in range(12))
    plain = images.plain()
    assert torch.equal(plain[3][0], plain[3][0])
    expected = eval_transform(images.cfg)(images.image(3))
    assert torch.equal(plain[3][0], expected)
    assert plain[3][0].shape == (3, 8, 8)
    grey = (np.asarray(images.image(3))[0, 0, 0] / 255 - 0.5) / 0.5
    torch.testing.assert_close(plain[3][0], torch.full((3, 8, 8), float(grey)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_each_image_once(images: ImageSet, workers: int) -> None:
    cfg = replace(images.cfg, num_workers=workers, batch_size=5)
    seen = [i for _, _, indices in build_loader(images, cfg, train=True) for i in indices.tolist()]
    assert sorted(seen) == list(range(12))
    again = [i for _, _, indices in build_loader(images, cfg, train=True) for i in indices.tolist()]
    assert again == seen != sorted(seen)


def test_processes_share_the_images(images: ImageSet) -> None:
    def seen(train: bool, rank: int) -> list[int]:
        loader = build_loader(images, images.cfg, train=train, rank=rank, world_size=5)
        return [i for _, _, indices in loader for i in indices.tolist()]

    parts = [seen(False, rank) for rank in range(5)]
    assert sorted(chain(*parts)) == list(range(12))
    parts = [seen(True, rank) for rank in range(5)]
    assert [len(part) for part in parts] == [3] * 5
    assert set(chain(*parts)) == set(range(12))


def test_a_lone_last_image_is_left_out(images: ImageSet) -> None:
    cfg = replace(images.cfg, batch_size=11)
    assert [len(labels) for _, labels, _ in build_loader(images, cfg, train=True)] == [11]
    assert [len(labels) for _, labels, _ in build_loader(images, cfg, train=False)] == [11, 1]


def test_limits_keep_all_classes(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", {"a": 10, "b": 10, "c": 10})
    splits = load_data(replace(SMALL, source=str(folder), num_val=6, limit=6), seed=0)
    assert len(splits.train) == 6
    assert set(splits.train.labels.tolist()) == {0, 1, 2}


# ---- what cannot be used ----------------------------------------------------------------------


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"^data\.source: got nowhere, expected digits, "):
        load_pools("nowhere", Path())
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        MissingFileError, match=r"^data\.source: got .*empty .*expected a folder of"
    ):
        load_pools(str(tmp_path / "empty"), Path())
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"bad\.npz: got a damaged or unreadable file"):
        load_pools(str(tmp_path / "bad.npz"), Path())
    write_images(tmp_path / "y" / "train", {"a": 2, "b": 2})
    write_images(tmp_path / "y" / "test", {"a": 2, "c": 2})
    with pytest.raises(
        InputError, match=r"^data\.source test: got other classes than train \(b, c"
    ):
        load_pools(str(tmp_path / "y"), Path())


def test_one_class_and_classes_without_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", {"a": 4})
    with pytest.raises(InputError, match=r"^data\.source: got one class, expected two or more; "):
        load_data(replace(SMALL, source=str(folder), num_val=1), seed=0)
    for name in ("train", "val"):
        write_images(tmp_path / "y" / name, {"a": 2, "b": 2})
    for path in (tmp_path / "y" / "train" / "b").iterdir():
        path.write_bytes(b"no image")
    cfg = replace(SMALL, source=str(tmp_path / "y"))
    match = r"^data\.source: got 2 images that cannot be read \(.*00\.png, .*01\.png\), expected"
    with pytest.raises(InputError, match=match):
        load_data(cfg, seed=0)
    with pytest.raises(InputError, match=r"^data\.source: got no training image of class b, exp"):
        load_data(replace(cfg, skip_bad=True), seed=0)


def test_bad_images_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", {"a": 6, "b": 6})
    (folder / "a" / "03.png").write_bytes(b"no image")
    splits = load_data(replace(SMALL, source=str(folder), num_val=2, skip_bad=True), seed=0)
    assert splits.skipped == [str(folder / "a" / "03.png")]
    assert len(splits.train) + len(splits.val or ()) == 11


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"num_train": 11, "num_val": 2}, r"got 11 \+ 2 \+ 0, expected at most 12"),
        ({"num_val": 12}, r"got 0 \+ 12 \+ 0, expected at most 12"),
    ],
)
def test_splits_that_are_too_large(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    folder = write_images(tmp_path / "x", {"a": 6, "b": 6})
    match = rf"^data\.num_train, num_val and num_test: {message}"
    with pytest.raises(InputError, match=match):
        load_data(replace(SMALL, source=str(folder), **counts), seed=0)
