"""Sources and splits: on tiny trees made here, and on real packed images."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from e2vpt import splits
from e2vpt.config import DataConfig
from e2vpt.data import ImageSet
from e2vpt.sources import load_source
from e2vpt.splits import balanced_order
from shared_utils.errors import InputError

from .data_sets import COLORS, color_of, counts, load, paths, write_classes, write_csv, write_packed

# Sources ----------------------------------------------------------------------------------------


def test_digits_split_is_fixed_and_complete() -> None:
    found = load("digits", seed=5)
    assert counts(found) == (800, 200, 797)
    assert found.class_names == [str(i) for i in range(10)]
    order = np.random.RandomState(0).permutation(1797)
    assert order[:4].tolist() == [1081, 1707, 927, 713]  # the split must never move
    for images, part in ((found.train, order[:800]), (found.val, order[800:1000]),
                         (found.test, order[1000:])):  # fmt: skip
        assert images is not None
        assert [images.path(i) for i in range(len(images))] == [f"digits image {j}" for j in part]
    assert found.summary() == {"name": "digits", "train_images": 800, "val_images": 200,
                               "test_images": 797, "skipped_images": 0}  # fmt: skip


def test_digits_pixels_are_scaled_from_16() -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = load("digits", normalize="none").train
    first = int(images.path(0).split()[-1])
    image, label = images[0]
    assert label == raw.target[first]
    expected = torch.from_numpy(np.rint(raw.images[first] * 255 / 16) / 255).float()
    torch.testing.assert_close(image, expected.expand(3, 8, 8), atol=1e-6, rtol=0)


def test_raw_pixel_logistic_regression_reaches_its_known_figure() -> None:
    from sklearn.linear_model import LogisticRegression

    found = load("digits", normalize="none")

    def arrays(images: ImageSet | None) -> tuple[np.ndarray, np.ndarray]:
        assert images is not None
        pixels = [images[i][0][0].flatten().numpy() for i in range(len(images))]
        return np.stack(pixels), np.array(images.labels)

    model = LogisticRegression(max_iter=2000).fit(*arrays(found.train))
    assert model.score(*arrays(found.test)) == pytest.approx(0.967, abs=0.003)


def test_class_folders_without_splits(tmp_path: Path) -> None:
    write_classes(tmp_path / "bugs", per_class=10)
    (tmp_path / "bugs/.hidden").mkdir()
    (tmp_path / "bugs/ant/notes.txt").write_text("not an image")
    (tmp_path / "bugs/ant/.cache.png").write_text("not an image")
    (tmp_path / "bugs/bee/more").mkdir()
    shutil.move(tmp_path / "bugs/bee/000.png", tmp_path / "bugs/bee/more/000.PNG")
    found = load(tmp_path / "bugs")
    assert (found.name, found.class_names, found.num_classes) == ("bugs", ["ant", "bee", "cat"], 3)
    assert counts(found) == (18, 6, 6)
    assert found.val is not None
    assert Counter(found.train.labels) == {0: 6, 1: 6, 2: 6}
    assert Counter(found.val.labels) == {0: 2, 1: 2, 2: 2}
    assert len(paths(found.train) | paths(found.val) | paths(found.test)) == 30
    for images in (found.train, found.val):
        for i, label in enumerate(images.labels):
            assert np.argmax(color_of(images, i)) == label
            assert f"/{found.class_names[label]}/" in images.path(i)


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    for split, number in (("train", 4), (val, 2), ("test", 1)):
        write_classes(tmp_path / split, number)
    found = load(tmp_path)
    assert counts(found) == (12, 6, 3)
    assert all(f"/{val}/" in path for path in paths(found.val))


def test_train_folder_alone_gives_a_fifth_for_validation(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 5)
    assert counts(load(tmp_path)) == (12, 3, 0)
    assert counts(load(tmp_path, num_val=6)) == (9, 6, 0)
    assert counts(load(tmp_path, num_train=6, num_val=6)) == (6, 6, 0)
    assert load(tmp_path).test is None


def test_class_called_train_is_a_class(tmp_path: Path) -> None:
    write_classes(tmp_path, 5, ["bus", "train"])
    assert load(tmp_path).class_names == ["bus", "train"]


def test_csv_lists(tmp_path: Path) -> None:
    write_classes(tmp_path / "all", 4)
    for split, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        rows = [(f"all/{name}/{i:03d}.png", name) for name in COLORS for i in numbers]
        write_csv(tmp_path / f"{split}.csv", rows)
    found = load(tmp_path)
    assert counts(found) == (6, 3, 3)
    assert found.class_names == ["ant", "bee", "cat"]
    assert found.train.labels == [0, 0, 1, 1, 2, 2]
    assert color_of(found.train, 3) == (1, 251, 1)


def test_csv_from_a_spreadsheet(tmp_path: Path) -> None:
    write_classes(tmp_path, 3)
    rows = [[f"{i}", f"{name}/{i:03d}.png", name] for name in COLORS for i in range(3)]
    write_csv(tmp_path / "train.csv", [*rows, []], header="\ufeffid,path,label")
    assert counts(load(tmp_path)) == (8, 1, 0)


def test_packed_file_and_packed_folder(tmp_path: Path) -> None:
    labels = [0, 1, 2] * 10
    write_packed(tmp_path / "set/train.npz", labels)
    one = load(tmp_path / "set/train.npz", num_train=15, num_val=9)
    assert (one.name, counts(one)) == ("set", (15, 9, 6))
    assert [color_of(one.train, i)[0] % 3 for i in range(15)] == one.train.labels
    write_packed(tmp_path / "set/val.npz", [0, 1, 2])
    assert counts(load(tmp_path / "set")) == (30, 3, 0)
    write_packed(tmp_path / "set/test.npz", [0, 1])
    assert counts(load(tmp_path / "set")) == (30, 3, 2)


def test_cifar10_as_800_of_50000(papers_data: Path) -> None:
    path = papers_data / "cifar10_jpeg" / "train.npz"
    if not path.is_file():
        pytest.skip(f"no real data: '{path}' is absent")
    source = load_source(str(path))
    assert (len(source.train), len(source.class_names)) == (50_000, 10)
    pools = splits.split_source(source, DataConfig(num_train=800, num_val=200))
    assert {split: len(pool) for split, pool in pools.items()} == {
        "train": 800, "val": 200, "test": 49_000
    }  # fmt: skip
    assert set(Counter(pools["train"].labels).values()) == {80}
    assert not set(pools["train"].indices) & set(pools["test"].indices)
    found = load(path, num_train=800, num_val=200, limit=50)
    assert counts(found) == (50, 50, 50)
    image, label = found.train[0]
    reference = np.asarray(found.train.image(0).resize((8, 8), Image.Resampling.BILINEAR))
    expected = (torch.from_numpy(reference.copy()).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)
    assert label == found.train.labels[0]


# Splits and limits ------------------------------------------------------------------------------


def test_balanced_order_by_properties() -> None:
    labels = [0] * 60 + [1] * 30 + [2] * 9 + [3]
    order = balanced_order(labels)
    assert sorted(order) == list(range(100))
    assert {labels[i] for i in order[:4]} == {0, 1, 2, 3}
    for end in range(1, 101):
        found = Counter(labels[i] for i in order[:end])
        for label, size in ((0, 60), (1, 30), (2, 9), (3, 1)):
            assert abs(found[label] - size * end / 100) <= 2
    assert order == balanced_order(labels)
    assert order != balanced_order(labels, seed=1)
    assert order[:10] != sorted(order[:10])


def test_balanced_order_is_frozen() -> None:
    # Made by hand from RandomState(0).permutation(6) = 5 2 1 3 0 4 with labels a b a b a b: numbers
    # in their classes b0 a0 b1 b2 a1 a2, so shares 0 0 1/3 2/3 1/3 2/3.
    assert np.random.RandomState(0).permutation(6).tolist() == [5, 2, 1, 3, 0, 4]
    assert balanced_order([0, 1, 0, 1, 0, 1]) == [5, 2, 1, 0, 3, 4]


def test_splits_do_not_depend_on_the_seed(tmp_path: Path) -> None:
    write_classes(tmp_path, 10)
    first, second = load(tmp_path, seed=0), load(tmp_path, seed=1)
    assert paths(first.train) == paths(second.train)
    assert paths(first.test) == paths(second.test)


def test_pool_counts(tmp_path: Path) -> None:
    write_classes(tmp_path, 10)
    assert counts(load(tmp_path, num_train=12, num_val=3)) == (12, 3, 15)
    assert counts(load(tmp_path, num_train=12)) == (12, 6, 12)
    assert counts(load(tmp_path, num_val=3)) == (21, 3, 6)
    assert counts(load(tmp_path, num_train=20, num_val=10)) == (20, 10, 0)


def test_limit_keeps_all_classes_and_is_repeatable(tmp_path: Path) -> None:
    write_classes(tmp_path, 20)
    found, again = load(tmp_path, limit=6, seed=0), load(tmp_path, limit=6, seed=9)
    assert counts(found) == (6, 6, 6)
    assert found.train.labels == [0, 0, 1, 1, 2, 2]
    assert paths(found.train) == paths(again.train)
    assert counts(load(tmp_path, limit=1000)) == (36, 12, 12)


@pytest.mark.parametrize("options", [{"num_train": 20, "num_val": 11}, {"num_train": 31},
                                     {"num_val": 30}, {"num_val": 24}])  # fmt: skip
def test_counts_beyond_the_pool(tmp_path: Path, options: dict[str, int]) -> None:
    write_classes(tmp_path, 10)
    with pytest.raises(InputError, match=r"data\.num_train and data\.num_val.*at most 30"):
        load(tmp_path, **options)


@pytest.mark.parametrize("field", ["num_train", "num_val"])
def test_counts_for_a_source_with_its_own_splits(field: str) -> None:
    with pytest.raises(InputError, match=rf"data\.{field}: got 10, expected 0, as 'digits' has"):
        load("digits", **{field: 10})
