"""Sources, splits, bad input, loaders: on tiny trees made here, and on real packed images."""

import csv
import io
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from e2vpt import data, splits
from e2vpt.config import DataConfig
from e2vpt.data import DataSplits, ImageSet, build_loader, load_data
from e2vpt.images import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, UnreadableImage
from e2vpt.packed import PackedImages
from e2vpt.sources import load_source
from e2vpt.splits import balanced_order
from shared_utils.errors import InputError, MissingFileError

COLORS = {"ant": (250, 0, 0), "bee": (0, 250, 0), "cat": (0, 0, 250)}
CHECKPOINT = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def load(source: Path | str, seed: int = 0, **options: object) -> DataSplits:
    cfg = DataConfig(source=str(source), **options)  # type: ignore[arg-type]
    return load_data(cfg, img_size=(8, 8), seed=seed, **CHECKPOINT)


def write_classes(folder: Path, per_class: int = 3, names: Sequence[str] = tuple(COLORS)) -> Path:
    """A folder per class; image i of a class has the grey level i added to its colour."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            color = tuple(min(255, value + i) for value in COLORS.get(name, (9, 9, 9)))
            Image.new("RGB", (8, 8), color).save(folder / name / f"{i:03d}.png")
    return folder


def write_csv(path: Path, rows: Sequence[Sequence[str]], header: str = "path,label") -> None:
    with path.open("w", newline="") as file:
        file.write(header + "\n")
        csv.writer(file).writerows(rows)


def write_packed(path: Path, labels: Sequence[int], classes: Sequence[str] = tuple(COLORS),
                 **changes: object) -> Path:  # fmt: skip
    """A packed file whose image i is grey of level i."""
    parts = []
    for i in range(len(labels)):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (i % 256,) * 3).save(file, "PNG")
        parts.append(file.getvalue())
    arrays = {
        "jpeg": np.frombuffer(b"".join(parts), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, parts)]),
        "label": np.array(labels, dtype=np.int16),
        "classes": np.array(classes),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return path


def color_of(images: ImageSet, index: int) -> tuple[int, ...]:
    return images.image(index).getpixel((0, 0))  # type: ignore[return-value]


def counts(found: DataSplits) -> tuple[int, int, int]:
    train, val, test = (len(s) if s else 0 for s in (found.train, found.val, found.test))
    return train, val, test


def paths(images: ImageSet | None) -> set[str]:
    return {images.path(i) for i in range(len(images))} if images else set()


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


# Wrong input ------------------------------------------------------------------------------------


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"data\.source: got '.*none', which is not there"):
        load(tmp_path / "none")


def test_file_that_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"data\.source: got the file '.*a\.txt', expected digits"):
        load(tmp_path / "a.txt")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.source: got an empty folder"):
        load(tmp_path)


def test_images_without_class_folders(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"got no folders inside .*folder of its own"):
        load(tmp_path)


def test_class_folders_without_images(tmp_path: Path) -> None:
    write_classes(tmp_path)
    for name in ("dog", "elk"):
        (tmp_path / name).mkdir()
    (tmp_path / "dog/a.txt").write_text("x")
    with pytest.raises(InputError, match=r"no images in 2 of 5 class folders: .*dog, .*elk"):
        load(tmp_path)


def test_class_folders_in_val_only(tmp_path: Path) -> None:
    write_classes(tmp_path / "val")
    with pytest.raises(InputError, match=r"class folders in val/ only"):
        load(tmp_path)


@pytest.mark.parametrize("layout", ["pool", "split", "csv", "npz"])
def test_one_class_only(tmp_path: Path, layout: str) -> None:
    folder = write_classes(tmp_path / "train" if layout == "split" else tmp_path, 3, ["ant"])
    if layout == "csv":
        write_csv(folder / "train.csv", [("ant/000.png", "ant")])
    if layout == "npz":
        write_packed(folder / "train.npz", [0, 0], ["ant"])
    with pytest.raises(InputError, match=r"data\.source: got one class only \(ant\)"):
        load(tmp_path)


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_folders_that_differ(tmp_path: Path, split: str) -> None:
    write_classes(tmp_path / "train", 2, ["ant", "bee", "cat"])
    write_classes(tmp_path / split, 2, ["ant", "cats"])
    difference = rf"{split}' than in train \(only in train: bee, cat; not in train: cats\)"
    with pytest.raises(InputError, match=difference):
        load(tmp_path)


@pytest.mark.parametrize(
    ("classes", "told"),
    [(["ant", "bee"], "only in train: cat"), (["bee", "ant", "cat"], "another order")],
)
def test_packed_classes_that_differ(tmp_path: Path, classes: list[str], told: str) -> None:
    write_packed(tmp_path / "train.npz", [0, 1, 2])
    write_packed(tmp_path / "val.npz", [0, 1], classes)
    with pytest.raises(InputError, match=told):
        load(tmp_path)


def test_empty_packed_file(tmp_path: Path) -> None:
    write_packed(tmp_path / "train.npz", [])
    with pytest.raises(InputError, match=r"no images in '.*train\.npz'"):
        load(tmp_path / "train.npz")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "npy"])
def test_corrupt_packed_file(tmp_path: Path, damage: str) -> None:
    path = write_packed(tmp_path / "train.npz", [0, 1, 2] * 20)
    good = bytearray(path.read_bytes())
    good[200] ^= 0xFF  # inside the first array
    npy = io.BytesIO()
    np.save(npy, np.zeros(3))
    path.write_bytes({"cut": bytes(good[:300]), "flipped": bytes(good), "empty": b"",
                      "text": b"hello", "npy": npy.getvalue()}[damage])  # fmt: skip
    with pytest.raises(InputError, match=r"train\.npz: got no (readable \.npz|array 'jpeg')"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"label": np.array([0, 1, 3])}, r"got label 3 of image 2, expected 0 to 2"),
        ({"label": np.array([0, -1, 1])}, r"got label -1 of image 1"),
        ({"label": np.array([0.0, 1.0, 2.0])}, r"label float64"),
        ({"label": np.array([0, 1])}, r"4 offsets for 2 labels"),
        ({"offsets": np.array([0, 5, 3, 9])}, r"offsets that leave its bytes or go back"),
        ({"offsets": np.array([0, 1, 2, 10**6])}, r"offsets that leave its bytes or go back"),
        ({"jpeg": None}, r"no array 'jpeg'"),
    ],
)
def test_packed_file_that_contradicts_itself(
    tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    path = write_packed(tmp_path / "train.npz", [0, 1, 2], **changes)
    with pytest.raises(InputError, match=match):
        PackedImages(path)


def test_csv_without_its_columns(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [("a.png", "ant")], header="file,class")
    with pytest.raises(InputError, match=r"columns file, class in '.*train\.csv'.*path and label"):
        load(tmp_path)
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(InputError, match=r"columns \(none\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"path,label\n", r"no rows in '.*train\.csv'"),
        (b"path,label\na.png,ant\nb.png,\n", r"no label in '.*train\.csv' line 3"),
        (b"path,label\nb.png\n", r"no label in '.*train\.csv' line 2"),
        (b"path,label\n,ant\n", r"no path in '.*train\.csv' line 2"),
        (b"path,label\n\xff\xfe.png,ant\n", r"no readable CSV"),
    ],
)
def test_csv_with_incomplete_rows(tmp_path: Path, text: bytes, match: str) -> None:
    (tmp_path / "train.csv").write_bytes(text)
    with pytest.raises(InputError, match=match):
        load(tmp_path)


def test_csv_label_unknown_to_train(tmp_path: Path) -> None:
    write_classes(tmp_path)
    write_csv(tmp_path / "train.csv", [(f"{name}/000.png", name) for name in COLORS])
    write_csv(tmp_path / "val.csv", [("ant/001.png", "ant"), ("bee/001.png", "wasp")])
    with pytest.raises(InputError, match=r"label 'wasp' in .*val\.csv line 3.*ant, bee, cat"):
        load(tmp_path)


def test_csv_that_lists_missing_files(tmp_path: Path) -> None:
    write_classes(tmp_path)
    rows = [(f"{name}/00{i}.png", name) for name in COLORS for i in range(5)]
    write_csv(tmp_path / "train.csv", rows)
    told = r"6 listed files that are not there: .*ant/003\.png, .* and 1 more, expected"
    with pytest.raises(MissingFileError, match=told):
        load(tmp_path)
    found = load(tmp_path, skip_bad=True)
    assert found.num_skipped == 6
    assert sum(counts(found)) == 9


# Unreadable images ------------------------------------------------------------------------------


@pytest.fixture(params=["decoded", "headers"])
def checked_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of the check: small splits are decoded, of large ones only headers are read."""
    if request.param == "headers":
        monkeypatch.setattr(data, "FULL_CHECK_BYTES", 0)
    return request.param


def test_unreadable_images_are_all_listed_and_can_be_skipped(
    tmp_path: Path, checked_by: str
) -> None:
    write_classes(tmp_path / "train", 4)
    write_classes(tmp_path / "val", 4)
    bad = [tmp_path / p for p in ("train/ant/001.png", "train/cat/003.png", "val/bee/000.png")]
    for path in bad:
        path.write_bytes(b"rubbish")
    told = "3 unreadable images: " + ".*, ".join(re.escape(str(path)) for path in bad)
    with pytest.raises(InputError, match=told + r".*give --data\.skip-bad"):
        load(tmp_path)
    found = load(tmp_path, skip_bad=True)
    assert (found.num_skipped, found.skipped) == (3, [str(path) for path in bad])
    assert counts(found) == (10, 11, 0)
    assert not (paths(found.train) | paths(found.val)) & set(found.skipped)
    for i, label in enumerate(found.train.labels):
        assert int(found.train[i][0].mean(dim=(1, 2)).argmax()) == label


def test_one_unreadable_image_in_a_packed_file(tmp_path: Path) -> None:
    path = write_packed(tmp_path / "train.npz", [0, 1, 2] * 5)
    with np.load(path) as archive:
        arrays = dict(archive)
    start, end = arrays["offsets"][7:9]
    arrays["jpeg"][start:end] = 0
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=r"1 unreadable image: .*train\.npz image 7 \(no image"):
        load(path)
    assert load(path, skip_bad=True).num_skipped == 1


def test_long_lists_are_cut(tmp_path: Path) -> None:
    write_classes(tmp_path, 8)
    for path in (tmp_path / "ant").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"8 unreadable images: ([^,]*, ){5}expected") as caught:
        load(tmp_path)
    assert "and 3 more" in str(caught.value)


def test_split_of_unreadable_images_only(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 2)
    write_classes(tmp_path / "val", 1)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="only unreadable images in the val split"):
        load(tmp_path, skip_bad=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_that_breaks_after_the_check_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    write_classes(tmp_path / "train", 3)
    write_classes(tmp_path / "val", 3)
    found = load(tmp_path)
    bad = tmp_path / "train/bee/001.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    loader = build_loader(found.train, DataConfig(num_workers=num_workers), train=True)
    with pytest.raises(UnreadableImage, match=re.escape(f"image '{bad}': got ")) as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_all_modes_and_sizes_in_one_set(tmp_path: Path) -> None:
    """The same picture, stored in nine ways, gives the same input."""
    write_classes(tmp_path, 1, ["ant", "bee"])
    grey = np.repeat(np.arange(0, 256, 32, dtype=np.uint8)[None], 8, axis=0)
    image = Image.fromarray(grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "ant"
    (folder / "000.png").unlink()
    image.save(folder / "grey.png")
    image.convert("RGB").save(folder / "rgb.bmp")
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("LA").save(folder / "la.png")
    image.convert("P").save(folder / "palette.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    image.save(folder / "moving.gif", save_all=True, append_images=[Image.new("L", (8, 8))])
    large = image.resize((64, 64), Image.Resampling.NEAREST)
    large.save(folder / "large.webp", lossless=True)
    images = load_source(str(tmp_path)).train
    preprocessing = Preprocessing((8, 8), (0.0,) * 3, (1.0,) * 3)
    expected = torch.from_numpy(grey / 255).float().expand(3, 8, 8)
    assert images.labels == [0] * 9 + [1]
    for i in range(9):
        # The large one is averaged down by a triangle filter, which blurs its columns.
        atol = 0.13 if "large" in images.name(i) else 1e-6
        got = preprocessing(images.image(i))
        torch.testing.assert_close(got, expected, atol=atol, rtol=0, msg=images.name(i))
    assert sum(counts(load(tmp_path, resize="crop"))) == 10


# Preprocessing of a data set --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalize", "mean", "std"),
    [
        ("imagenet", IMAGENET_MEAN, IMAGENET_STD),
        ("checkpoint", (0.5,) * 3, (0.5,) * 3),
        ("none", (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_statistics_and_size_from_the_config(
    normalize: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    found = load("digits", normalize=normalize, limit=3)
    assert found.preprocessing == Preprocessing((8, 8), mean, std)
    resized = load("digits", limit=3, img_size=20, resize="crop")
    assert resized.preprocessing.img_size == (20, 20)
    assert resized.train[0][0].shape == (3, 20, 20)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_cache_changes_no_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: str
) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i, size in enumerate([(8, 8), (20, 9), (7, 31), (40, 40), (5, 6)]):
            values = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / name / f"{i}.png")
    augment = "crop-flip" if resize == "crop" else "flip"
    cached = load(tmp_path, resize=resize, augment=augment)
    assert cached.train._cache is not None
    # The second bound fits the network's input but not the larger images that are cropped.
    for bound in (0, 6 * 3 * 8 * 8) if resize == "crop" else (0,):
        monkeypatch.setattr(data, "CACHE_BYTES", bound)
        plain = load(tmp_path, resize=resize, augment=augment)
        assert plain.train._cache is None
        assert plain.val is not None
        assert cached.val is not None
        for first, second in ((cached.train, plain.train), (cached.val, plain.val)):
            for i in range(len(first)):
                assert torch.equal(first[i][0], second[i][0])
    monkeypatch.undo()
    shutil.rmtree(tmp_path)
    assert cached.train[0][0].shape == (3, 8, 8)  # from memory


def test_validation_is_not_augmented(tmp_path: Path) -> None:
    write_classes(tmp_path, 10)
    found = load(tmp_path, augment="flip")
    assert (found.train.augment, found.val.augment, found.test.augment) == ("flip", "none", "none")


# Loaders ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    cfg = DataConfig(resize="crop", augment="crop-flip", limit=50)
    return load_data(cfg, img_size=(16, 16), seed=3, **CHECKPOINT)


def batches(images: ImageSet, num_workers: int, epochs: int = 2) -> list[list[torch.Tensor]]:
    """Per epoch: all images, all labels, from one loader."""
    cfg = DataConfig(batch_size=16, num_workers=num_workers)
    loader = build_loader(images, cfg, train=True)
    out = []
    for epoch in range(epochs):
        images.set_epoch(epoch)
        found = list(loader)
        assert [len(labels) for _, labels in found] == [16, 16, 16, 2]
        out.append([torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])])
    return out


def test_workers_change_neither_order_nor_augmentation(digits: DataSplits) -> None:
    alone, shared = batches(digits.train, 0), batches(digits.train, 2)
    for one, two in zip(alone, shared, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert not torch.equal(alone[0][1], alone[1][1])  # another order in the next epoch
    assert (alone[0][0].dtype, alone[0][1].dtype) == (torch.float32, torch.int64)


def test_augmentation_is_drawn_from_seed_epoch_and_index(digits: DataSplits) -> None:
    images = digits.train

    def draw(epoch: int, seed: int = 3) -> torch.Tensor:
        again = ImageSet(images.pool, images.preprocessing, augment="crop-flip", seed=seed)
        again.set_epoch(epoch)
        return torch.stack([again[i][0] for i in range(len(again))])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), draw(1, seed=4))
    plain = images.with_augment("none")
    center = torch.stack([plain[i][0] for i in range(len(plain))])
    changed = (draw(0) != center).flatten(1).any(dim=1)
    assert 35 <= int(changed.sum()) <= 50  # 1 of 9 crops times 2 leaves few unchanged


def test_order_from_a_generator_does_not_depend_on_workers(digits: DataSplits) -> None:
    def orders(num_workers: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(7)
        cfg = DataConfig(batch_size=50, num_workers=num_workers)
        loader = build_loader(digits.train, cfg, train=True, generator=generator)
        return [next(iter(loader))[1].tolist() for _ in range(3)]

    alone = orders(0)
    assert alone == orders(2)
    generator = torch.Generator().manual_seed(7)
    for labels in alone:  # nothing else draws from it, so its state alone resumes a run
        order = torch.randperm(50, generator=generator).tolist()
        assert labels == [digits.train.labels[i] for i in order]


def test_loading_leaves_the_global_random_state(digits: DataSplits) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(build_loader(digits.train, DataConfig(), train=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_keeps_the_order(digits: DataSplits) -> None:
    loader = build_loader(digits.train, DataConfig(batch_size=50), train=False)
    assert next(iter(loader))[1].tolist() == digits.train.labels


def test_loader_through_fabric_with_two_ranks(digits: DataSplits) -> None:
    """What Fabric makes of the loader on several processes: shards of the one order."""
    from lightning.fabric import Fabric
    from lightning.fabric.utilities.data import _update_dataloader

    loader = build_loader(digits.train, DataConfig(batch_size=50), train=True)
    whole = next(iter(loader))[1].tolist()
    parts = []
    for rank in range(2):
        sampler = Fabric._get_distributed_sampler(loader, num_replicas=2, rank=rank)
        sharded = _update_dataloader(loader, sampler)
        assert type(sharded) is type(loader)
        parts.append(next(iter(sharded))[1].tolist())
    assert [label for pair in zip(*parts, strict=True) for label in pair] == whole
