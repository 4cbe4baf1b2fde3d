"""One's own data: boxes as COCO JSON, masks as images, each of them optional.

Below the root: `images/SPLIT/`, `annotations/SPLIT.json` (or `annotations/instances_SPLIT.json`),
`drivable/SPLIT/NAME.png`, `lane/SPLIT/NAME.png`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from shared_utils.checkpoint import reading
from shared_utils.errors import InputError, MissingFileError
from yolop_mtl.records import Classes, Record, check_boxes


def read_categories(path: Path) -> dict[str, tuple[str, ...]]:
    """Every category of a COCO file as a class of its own, by id; for `records.Classes`."""
    try:
        named = sorted((int(c["id"]), str(c["name"])) for c in _load(path)["categories"])
    except (KeyError, TypeError) as error:
        got, do = f"{type(error).__name__} {error}", "write it in COCO's form"
        raise InputError(f"{path}: categories", got, "an id and a name each", do) from error
    return {name: (name,) for _, name in named}


def load_records(root: Path, split: str, classes: Classes | None = None) -> list[Record]:
    """The images of a split with their labels, by name.

    Images without a mask file have that mask unlabelled; where there is a JSON, an image that it
    does not list has its boxes unlabelled, and one that it lists without boxes has none. Crowds
    (`iscrowd`) are left out.

    Args:
        root: see above.
        split: name of a folder in `images/`.
        classes: of boxes; None: the file's own categories.

    Raises: MissingFileError; InputError for an empty or broken file, an image that is listed or has
        a mask and is not there, an unknown category, a wrong box.
    """
    folder = root / "images" / split
    if not folder.is_dir():
        raise MissingFileError("data.root", f"no folder '{folder}'", "images", "check the path")
    images = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    }
    if not images:
        raise InputError(str(folder), "no image", "one or more", "check data.root and the split")
    boxes: dict[str, Record] = {}
    if path := _find_json(root, split):
        boxes = _load_boxes(path, classes or _own_classes(path), set(images))
    stems = {path.stem for path in images.values()}
    for kind in ("drivable", "lane"):
        masks = sorted((root / kind / split).glob("*.png"))
        if extra := [mask for mask in masks if mask.stem not in stems]:
            got = f"masks of {len(extra)} images that are not there, first '{extra[0].stem}'"
            do = f"remove them, or add the images to {folder}"
            raise InputError(str(root / kind / split), got, "an image for each mask", do)
    records = []
    for name, image in images.items():
        own = boxes.get(name, Record(image))
        masks = [root / kind / split / f"{image.stem}.png" for kind in ("drivable", "lane")]
        drivable, lane = (mask if mask.is_file() else None for mask in masks)
        records.append(Record(image, own.boxes_xyxy, own.labels, drivable, lane))
    return records


def find_classes(root: Path, split: str) -> Classes | None:
    """The categories of a split's file, each a class; None where there is no file."""
    path = _find_json(root, split)
    return None if path is None else _own_classes(path)


def _find_json(root: Path, split: str) -> Path | None:
    names = (f"{split}.json", f"instances_{split}.json")
    return next((p for name in names if (p := root / "annotations" / name).is_file()), None)


def _own_classes(path: Path) -> Classes:
    members = read_categories(path)
    return Classes(members, known=tuple(members))


def _load(path: Path) -> dict[str, Any]:
    with reading(path, "a COCO file"):
        text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        got = f"no JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        raise InputError(str(path), got, "a COCO file", "restore it") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            do = "write it in COCO's form"
            raise InputError(str(path), f"no list '{key}'", "images, annotations, categories", do)
    return dict(data)


def _load_boxes(path: Path, classes: Classes, present: set[str]) -> dict[str, Record]:
    data = _load(path)
    try:
        names = {int(c["id"]): str(c["name"]) for c in data["categories"]}
        files, sizes = {}, {}
        for image in data["images"]:
            files[int(image["id"])] = Path(str(image["file_name"])).name
            sizes[int(image["id"])] = image.get("height"), image.get("width")
        rows: dict[int, list[tuple[list[float], int]]] = {number: [] for number in files}
        for entry in data["annotations"]:
            where = f"{path}: annotation {entry['id']}"
            if int(entry["category_id"]) not in names:
                got, do = str(entry["category_id"]), "correct it"
                raise InputError(f"{where}: category_id", got, "a listed category", do)
            if int(entry["image_id"]) not in files:
                got, do = str(entry["image_id"]), "correct it"
                raise InputError(f"{where}: image_id", got, "a listed image", do)
            number = classes.number(names[int(entry["category_id"])], where)
            if number is None or entry.get("iscrowd"):
                continue
            x, y, width, height = (float(value) for value in entry["bbox"])
            rows[int(entry["image_id"])].append(([x, y, x + width, y + height], number))
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        got, do = f"{type(error).__name__} {error}", "write it in COCO's form"
        raise InputError(str(path), got, "entries in COCO's form", do) from error
    found = {}
    for number, own in rows.items():
        name, (height, width) = files[number], sizes[number]
        if name not in present:
            do = "add it, or take it out of the list"
            raise InputError(str(path), f"no file for image '{name}'", "every listed image", do)
        size = (int(height), int(width)) if height and width else None
        boxes = check_boxes([box for box, _ in own], size, f"{path} ({name})")
        found[name] = Record(Path(name), boxes, np.array([n for _, n in own], dtype=np.int64))
    return found
