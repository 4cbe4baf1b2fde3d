"""FGVC: its five data sets, their JSON form and the published figures.

Paper: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119 (the five sets and their
splits). All accuracies here are top-1 on the test images in percent. See docs/fgvc.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from e2vpt.readers import FileReader, Pool, Source, some_of
from e2vpt.vtab import REPRINTED, missing_of
from shared_utils.errors import InputError, MissingFileError, near_miss

SPLITS = ("train", "val", "test")
IMAGE_ROOTS = ("images", "Images", "")  # below the set's folder


@dataclass(frozen=True)
class FGVCSet:
    """One of the five data sets."""

    folder: str
    title: str
    num_classes: int
    image_root: str
    """folder below the set's own that image names start from"""
    num_visual_prompts: int = 5
    """P of the released command list"""
    num_kv_prompts: int = 5
    """n of the released command list"""

    @property
    def recipe(self) -> str:
        """Its name in RECIPES."""
        return f"fgvc-{self.folder}"


# In the column order of the paper's table.
SETS = (
    FGVCSet("cub", "CUB-200-2011", 200, "images"),
    FGVCSet("nabirds", "NABirds", 555, "images"),
    FGVCSet("flowers", "Oxford Flowers", 102, ""),
    FGVCSet("dogs", "Stanford Dogs", 120, "Images"),
    FGVCSet("cars", "Stanford Cars", 196, ""),
)
SET_OF_FOLDER = {found.folder: found for found in SETS}


def is_fgvc_set(folder: Path) -> bool:
    """Whether it holds train.json."""
    return (folder / "train.json").is_file()


def load_fgvc_set(folder: Path, *, skip_missing: bool = False) -> Source:
    """List one data set, nothing decoded: the images of train.json, val.json and test.json.

    Labels 0 to C - 1 are the class ids of train.json in sorted order, and the ids are the class
    names. Image names start from images/, Images/ or the folder itself, see `image_root`.

    Args:
        folder: holds the three lists, each `{"image name": class id, ...}`.
        skip_missing: leave it to the later check to count listed images that are not there.

    Raises:
        MissingFileError: a list or listed images are not there.
        InputError: no such JSON, ids of validation or test images that train.json does not have,
            another number of classes than the set has whose name the folder bears.
    """
    name = folder.resolve().name
    rows = {split: read_split(folder, split) for split in SPLITS}
    ids = class_ids(folder, rows, SET_OF_FOLDER.get(name))
    number = {key: label for label, key in enumerate(ids)}
    root = image_root(folder, list(rows["train"]))
    pools, missing = {}, []
    for split, listed in rows.items():
        paths = [root / image for image in listed]
        missing += missing_of(paths)
        labels = [number[key] for key in listed.values()]
        pools[split] = Pool(FileReader(paths), list(range(len(paths))), labels)
    if missing and not skip_missing:
        raise MissingFileError(
            "data.source",
            f"{len(missing)} listed image{'s' * (len(missing) > 1)} not there: {some_of(missing)}",
            "every image of the three lists",
            "restore them or give --data.skip-bad",
        )
    return Source(name, [str(key) for key in ids], pools["train"], pools["val"], pools["test"])


def read_split(folder: Path, split: str) -> dict[str, int | str]:
    """Class id by image name. Ids are whole numbers or text, one kind in a file.

    Raises:
        MissingFileError, InputError: as `load_fgvc_set`.
    """
    path = folder / f"{split}.json"
    if not path.is_file():
        raise MissingFileError(
            "data.source",
            f"no '{path}'",
            f"{', '.join(f'{name}.json' for name in SPLITS)} in a folder of FGVC",
            "restore the list",
        )
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of the text or of its coding
        raise InputError(
            "data.source", f"no readable JSON '{path}' ({error})", "one", "restore the list"
        ) from error
    wanted = '{"image name": class id, ...}'
    if not isinstance(listed, dict) or not listed:
        got = "an empty list" if listed in ({}, []) else f"a {type(listed).__name__}"
        raise InputError("data.source", f"{got} in '{path}'", wanted, "restore the list")
    kinds = {type(key) for key in listed.values()}
    if kinds not in ({int}, {str}):
        image = next(name for name, key in listed.items() if type(key) is not int)
        raise InputError(
            "data.source",
            f"class id {json.dumps(listed[image])[:40]} of '{image}' in '{path}'",
            f"{wanted}, all ids whole numbers or all text",
            "correct it",
        )
    return listed


def class_ids(
    folder: Path, rows: dict[str, dict[str, int | str]], known: FGVCSet | None
) -> list[int | str]:
    """The ids of train.json, sorted; the other splits may have no others."""
    ids = sorted(set(rows["train"].values()))  # of one kind, as read_split sees to
    trained = set(ids)
    for split, listed in rows.items():
        image = next((image for image, key in listed.items() if key not in trained), None)
        if image is not None:
            raise InputError(
                "data.source",
                f"class id {json.dumps(listed[image])} of '{image}' in '{folder / split}.json'",
                "an id of train.json",
                "restore the lists",
            )
    if known is not None and len(ids) != known.num_classes:
        raise InputError(
            "data.source",
            f"{len(ids)} class ids in '{folder / 'train.json'}'",
            f"{known.num_classes}, those of {known.title}",
            "restore the list, or rename the folder if it holds another set",
        )
    return ids


def image_root(folder: Path, names: list[str]) -> Path:
    """The folder that image names start from: the first that holds one of them.

    Tried in turn: the place that the set has whose name the folder bears, images/, Images/, the
    folder itself. If none holds any image it is the first.
    """
    known = SET_OF_FOLDER.get(folder.resolve().name)
    roots = [folder / root for root in ([known.image_root] if known else []) + list(IMAGE_ROOTS)]
    for name in names:
        for root in roots:
            if (root / name).is_file():
                return root
    return roots[0]


# ---- published figures ----------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A row of the published table, ViT-B/16 pretrained on ImageNet-21k."""

    method: str
    mean: float
    """over the five sets, as printed"""
    source: str
    top1: dict[str, float]
    """by set folder; empty where only the mean could be had"""
    tuned_percent: dict[str, float]
    """tuned parameters of all, in percent, by set folder; empty where they could not be had"""


def _row(method: str, mean: float, top1: str = "", tuned: str = "") -> Published:
    def by_set(figures: str) -> dict[str, float]:
        return dict(zip(SET_OF_FOLDER, map(float, figures.split()), strict=True)) if figures else {}

    return Published(method, mean, REPRINTED, by_set(top1), by_set(tuned))


PUBLISHED = (
    _row("Full", 88.54),
    _row("Linear", 79.32),
    _row("Partial-1", 82.63),
    _row("Bias", 88.41),
    _row("Adapter", 85.46),
    _row("VPT-Shallow", 84.62, "86.7 78.8 98.4 90.7 68.7"),
    _row("VPT-Deep", 89.11, "88.5 84.2 99.0 90.2 83.6", ".29 1.02 .14 1.17 2.27"),
    _row("E²VPT", 89.22, "89.1 84.6 99.1 90.5 82.8", ".32 .65 .15 .88 1.27"),
)


def published(method: str = "E²VPT") -> Published:
    """The row of a method.

    Raises: InputError naming the methods there are.
    """
    rows = {row.method: row for row in PUBLISHED}
    if method not in rows:
        raise InputError("method", f"'{method}'", "a row of the table", near_miss(method, rows))
    return rows[method]
