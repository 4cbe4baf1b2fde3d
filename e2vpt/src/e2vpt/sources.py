"""Where images come from: digits, class folders, CSV lists, packed files, benchmarks.

A source is listed here, quickly and without decoding; data.py splits it, checks the images and
makes data sets of it. Every error is the user's to mend and names the path.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from e2vpt.fgvc import is_fgvc_set, load_fgvc_set
from e2vpt.images import IMAGE_SUFFIXES
from e2vpt.packed import PackedImages
from e2vpt.readers import ArrayReader, FileReader, PackedReader, Pool, Source, some_of
from e2vpt.vtab import is_vtab_task, load_vtab_task
from shared_utils.errors import InputError, MissingFileError

EXPECTED = (
    "digits, an image folder, a folder with train.csv, train.npz, train800.txt (VTAB-1k) or "
    "train.json (FGVC), or a packed .npz file"
)
VAL_FOLDERS = ("val", "valid", "validation")
DIGITS_SPLIT_SEED = 0
DIGITS_TRAIN, DIGITS_VAL = 800, 200


def load_source(source: str, *, skip_missing: bool = False) -> Source:
    """List a source: what `data.source` means.

    - `digits`: scikit-learn's 1,797 images, see `digits_source`.
    - a `.npz` file: one pool.
    - a folder with train.npz: packed splits; val.npz and test.npz are optional.
    - a folder with train.csv: columns path and label; paths are relative to the folder, labels are
      class names, sorted as text; val.csv and test.csv are optional.
    - a folder with train800.txt: a task of VTAB-1k, see `vtab.load_vtab_task`.
    - a folder with train.json: a data set of FGVC, see `fgvc.load_fgvc_set`.
    - a folder whose train/ holds folders: splits with a folder per class, sorted by name; val/ (or
      valid/, validation/) and test/ are optional. Folders inside a class folder belong to it.
    - any other folder: one pool with a folder per class.
    The first that fits is taken. Files whose name starts with a dot or does not end like an image
    are passed over.

    Args:
        source: the word or path.
        skip_missing: leave it to the later check to count listed files that are not there.

    Raises:
        MissingFileError: the path, a list, or files that one lists, are not there.
        InputError: nothing usable there, fewer than two classes, classes that do not match, labels
            that do not fit.
    """
    if source == "digits":
        return digits_source()
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".npz":
        found = _packed_source(path.resolve().parent.name, {"train": path}, is_split=False)
    elif path.is_file():
        raise InputError("data.source", f"the file '{source}'", EXPECTED, "name one of these")
    elif not path.is_dir():
        raise MissingFileError(
            "data.source", f"'{source}', which is not there", EXPECTED, "check the path"
        )
    elif (path / "train.npz").is_file():
        found = _packed_source(path.resolve().name, _split_files(path, ".npz"), is_split=True)
    elif (path / "train.csv").is_file():
        found = _csv_source(path, skip_missing)
    elif is_vtab_task(path):
        found = load_vtab_task(path, skip_missing=skip_missing)
    elif is_fgvc_set(path):
        found = load_fgvc_set(path, skip_missing=skip_missing)
    else:
        found = _folder_source(path)
    if len(found.class_names) < 2:
        raise InputError(
            "data.source",
            f"one class only ({', '.join(found.class_names)}) in '{path}'",
            "two or more",
            "add images of another class",
        )
    return found


def digits_source() -> Source:
    """scikit-learn's 1,797 real digits, 8x8, split 800 train / 200 val / 797 test.

    The split: `order = numpy.random.RandomState(0).permutation(1797)` (a stream that NumPy keeps
    fixed); the first 800 train, the next 200 validate, the rest test, each in this order. It does
    not depend on the run's seed. Grey values 0 to 16 become round(v * 255 / 16) in 8-bit RGB.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.RandomState(DIGITS_SPLIT_SEED).permutation(len(pixels)).tolist()
    everything = Pool(
        ArrayReader("digits", pixels), list(range(len(pixels))), digits.target.tolist()
    )
    end = DIGITS_TRAIN + DIGITS_VAL
    return Source(
        "digits",
        [str(name) for name in digits.target_names],
        everything.take(order[:DIGITS_TRAIN]),
        everything.take(order[DIGITS_TRAIN:end]),
        everything.take(order[end:]),
    )


def _split_files(folder: Path, suffix: str) -> dict[str, Path]:
    files = {split: folder / f"{split}{suffix}" for split in ("train", "val", "test")}
    return {split: path for split, path in files.items() if path.is_file()}


def _packed_source(name: str, files: Mapping[str, Path], *, is_split: bool) -> Source:
    packed = {split: PackedImages(path) for split, path in files.items()}
    classes = packed["train"].classes
    for images in packed.values():
        if len(images) == 0:
            raise InputError(
                "data.source", f"no images in '{images.path}'", "some", "pack it again"
            )
        _same_classes(classes, images.classes, str(images.path))
    pools = {
        split: Pool(PackedReader(p), list(range(len(p))), p.labels) for split, p in packed.items()
    }
    return Source(name, classes, pools["train"], pools.get("val"), pools.get("test"), is_split)


def _same_classes(classes: Sequence[str], others: Sequence[str], where: str) -> None:
    """Raise InputError naming the difference between train's classes and another split's."""
    missing = sorted(set(classes) - set(others))
    added = sorted(set(others) - set(classes))
    if not missing and not added and list(classes) == list(others):
        return
    parts = [f"only in train: {some_of(missing)}"] if missing else []
    parts += [f"not in train: {some_of(added)}"] if added else []
    told = "; ".join(parts) or "the same names in another order"
    raise InputError(
        "data.source",
        f"other classes in '{where}' than in train ({told})",
        "the same classes in every split",
        "add or rename what differs",
    )


def _csv_source(folder: Path, skip_missing: bool) -> Source:
    rows = {split: _csv_rows(path) for split, path in _split_files(folder, ".csv").items()}
    class_names = sorted({label for _, label, _ in rows["train"]})
    number = {name: i for i, name in enumerate(class_names)}
    pools, missing = {}, []
    for split, listed in rows.items():
        for _, label, line in listed:
            if label not in number:
                raise InputError(
                    "data.source",
                    f"label '{label}' in {folder / split}.csv line {line}",
                    f"a class of train.csv ({some_of(class_names)})",
                    "correct it or add training images",
                )
        paths = [folder / path for path, _, _ in listed]
        missing += [str(path) for path in paths if not path.is_file()]
        labels = [number[label] for _, label, _ in listed]
        pools[split] = Pool(FileReader(paths), list(range(len(paths))), labels)
    if missing and not skip_missing:
        raise MissingFileError(
            "data.source",
            f"{len(missing)} listed files that are not there: {some_of(missing)}",
            "every listed file",
            "correct the CSV or give --data.skip-bad",
        )
    return Source(
        folder.resolve().name, class_names, pools["train"], pools.get("val"), pools.get("test")
    )


def _csv_rows(path: Path) -> list[tuple[str, str, int]]:
    """(path, label, line) of every row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"path", "label"} <= set(columns):
                raise InputError(
                    "data.source",
                    f"columns {', '.join(columns) or '(none)'} in '{path}'",
                    "the columns path and label in the first line",
                    "add that line",
                )
            rows = [(row["path"] or "", row["label"] or "", reader.line_num) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            "data.source", f"no readable CSV '{path}' ({error})", "UTF-8 text", "save it again"
        ) from error
    if not rows:
        raise InputError("data.source", f"no rows in '{path}'", "a row per image", "add some")
    for image, label, line in rows:
        if not image or not label:
            raise InputError(
                "data.source",
                f"no {'label' if image else 'path'} in '{path}' line {line}",
                "a path and a label",
                "complete the line",
            )
    return rows


def _folder_source(folder: Path) -> Source:
    if _has_folders(folder / "train"):
        val = next((name for name in VAL_FOLDERS if (folder / name).is_dir()), "val")
        names = {"train": "train", "val": val, "test": "test"}
        present = {
            split: folder / name for split, name in names.items() if (folder / name).is_dir()
        }
    elif others := [name for name in (*VAL_FOLDERS, "test") if _has_folders(folder / name)]:
        raise InputError(
            "data.source",
            f"'{folder}' with class folders in {', '.join(others)}/ only",
            "class folders in train/ too",
            "add them or name a folder of classes",
        )
    else:
        pool, class_names = _class_folders(folder)
        return Source(folder.resolve().name, class_names, pool, is_split=False)
    pools = {}
    class_names = [path.name for path in _folders(present["train"])]
    for split, path in present.items():
        pools[split], found = _class_folders(path)
        _same_classes(class_names, found, str(path))
    return Source(
        folder.resolve().name, class_names, pools["train"], pools.get("val"), pools.get("test")
    )


def _class_folders(folder: Path) -> tuple[Pool, list[str]]:
    """All images below a folder with a folder per class, and the class names."""
    classes = _folders(folder)
    if not classes:
        empty = not any(folder.iterdir())
        raise InputError(
            "data.source",
            f"{'an empty folder' if empty else 'no folders inside'} '{folder}'",
            EXPECTED,
            "put the images of each class into a folder of its own",
        )
    files = [_images_below(path) for path in classes]
    bare = [str(path) for path, found in zip(classes, files, strict=True) if not found]
    if bare:
        raise InputError(
            "data.source",
            f"no images in {len(bare)} of {len(classes)} class folders: {some_of(bare)}",
            "images in every class folder",
            "add some or remove the folder",
        )
    paths = [path for found in files for path in found]
    labels = [label for label, found in enumerate(files) for _ in found]
    return Pool(FileReader(paths), list(range(len(paths))), labels), [path.name for path in classes]


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and bool(_folders(folder))


def _images_below(folder: Path) -> list[Path]:
    return sorted(
        Path(where) / name
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
    )
