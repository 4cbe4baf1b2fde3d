"""Sources that are wrong, and images that cannot be read."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from e2vpt import data
from e2vpt.config import DataConfig
from e2vpt.data import build_loader
from e2vpt.images import Preprocessing, UnreadableImage
from e2vpt.packed import PackedImages
from e2vpt.sources import load_source
from shared_utils.errors import InputError, MissingFileError

from .data_sets import COLORS, counts, load, paths, write_classes, write_csv, write_packed

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
