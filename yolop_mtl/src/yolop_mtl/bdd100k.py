"""BDD100K's label files, in the form of 2018 (a file an image) and of 2020 (a list a split).

Data: Yu et al., "BDD100K: A Diverse Driving Dataset for Heterogeneous Multitask Learning", CVPR
2020; images and labels have their own, non-commercial licence.

Folders may be named as BDD100K names them or as YOLOP's downloads do; see `find_folders`.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared_utils.checkpoint import reading
from shared_utils.errors import InputError, MissingFileError
from yolop_mtl.lanes import Area, Line, flatten_poly
from yolop_mtl.records import (
    BDD_CLASSES,
    BDD_DROPPED,
    Classes,
    Conditions,
    Record,
    check_boxes,
)

SIZE = (720, 1280)  # (H, W) of every image
CATEGORIES = (*BDD_CLASSES, *BDD_DROPPED)
AREA_TYPES = {
    "drivable": False, "direct": False, "alternative": True, "alternatively": True,
}  # fmt: skip
AREA_CATEGORIES = ("drivable area",)
LANE_CATEGORIES = (
    "crosswalk", "double other", "double white", "double yellow", "road curb", "single other",
    "single white", "single yellow",
)  # fmt: skip
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")

# Per role the folders that may hold it, below the root; {} is the split.
FOLDERS: dict[str, tuple[str, ...]] = {
    "images": ("images/{}", "images/100k/{}"),
    "boxes": ("det_annotations/{}", "labels/100k/{}", "labels/det_20/det_{}.json"),
    "drivable": ("da_seg_annotations/{}", "labels/drivable/masks/{}", "labels/drivable/{}"),
    "lane": ("ll_seg_annotations/{}", "labels/lane/masks/{}", "labels/lane/{}"),
}


class Scene(NamedTuple):
    """The labels of an image as its file has them.

    Attributes:
        name: of the image, without ending.
        boxes_xyxy: pixels, and `categories`, the category of each.
        categories: names as in the file.
        areas: polygons of road.
        lines: edges of painted lines.
        conditions: weather, scene and time of day.
    """

    name: str
    boxes_xyxy: list[list[float]]
    categories: list[str]
    areas: list[Area]
    lines: list[Line]
    conditions: Conditions


def read_scenes(path: Path) -> Iterator[Scene]:
    """The scenes of a label file of either form, in its order.

    Raises: MissingFileError; InputError for a file that is no JSON (with the position), or whose
        entries are not BDD100K's.
    """
    with reading(path, "a label file"):
        text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        got = f"no JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        raise InputError(str(path), got, "a BDD100K label file", "restore it") from error
    frames = data if isinstance(data, list) else [data]
    if isinstance(data, dict) and isinstance(data.get("frames"), list) and "name" not in data:
        # Scalabel's own export: {"frames": [...], "config": ...}, frames as in the list.
        frames = data["frames"]
    for number, frame in enumerate(frames):
        where = f"{path}: entry {number}"
        try:
            yield _read_scene(frame, where)
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            got = f"{type(error).__name__} {error}"
            do = "correct it, or take another reader"
            raise InputError(where, got, "an entry in BDD100K's form", do) from error


def _read_scene(frame: Mapping[str, Any], where: str) -> Scene:
    said = frame.get("attributes") or {}  # of the image, in both forms at the same place
    conditions = Conditions(*(str(said.get(name, "")) for name in Conditions._fields))
    scene = Scene(Path(str(frame["name"])).stem, [], [], [], [], conditions)
    if "frames" in frame:  # 2018: one image a file
        labels = [label for part in frame["frames"] for label in part["objects"]]
    else:
        labels = frame.get("labels") or []
    for label in labels:
        _add_label(scene, label, f"{where} ({scene.name})")
    return scene


def _add_label(scene: Scene, label: Mapping[str, Any], where: str) -> None:
    category, attributes = str(label["category"]), label.get("attributes") or {}
    if category.startswith("area/") or category in AREA_CATEGORIES:
        kind = category.removeprefix("area/")
        if category in AREA_CATEGORIES:
            kind = str(attributes.get("areaType", "direct"))
        if kind not in AREA_TYPES:
            got, do = f"'{kind}'", "correct the label file"
            raise InputError(f"{where}: area", got, ", ".join(AREA_TYPES), do)
        for vertices, types, _ in _polygons(label, where):
            points = flatten_poly(vertices, types, is_closed=True)
            scene.areas.append(Area(points, AREA_TYPES[kind]))
    elif category == "lane" or category.startswith("lane/") or category in LANE_CATEGORIES:
        kinds = _lane_kind(category, attributes)
        for vertices, types, is_closed in _polygons(label, where):
            points = flatten_poly(vertices, types, is_closed=is_closed)
            scene.lines.append(Line(points, kinds))
    elif label.get("box2d"):
        box = label["box2d"]
        scene.boxes_xyxy.append([float(box[side]) for side in ("x1", "y1", "x2", "y2")])
        scene.categories.append(category)


def _lane_kind(category: str, attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """What both edges of a painted line have in common: type, direction, style."""
    name = category.removeprefix("lane/")
    if name == "lane":
        name = str(attributes.get("laneTypes", ""))
    direction = attributes.get("laneDirection", attributes.get("direction", ""))
    style = attributes.get("laneStyle", attributes.get("style", ""))
    return name, str(direction), str(style)


def _polygons(
    label: Mapping[str, Any], where: str
) -> Iterator[tuple[list[Sequence[float]], str, bool]]:
    """Vertices, types and whether closed; 2018 lists [x, y, type], 2020 dictionaries."""
    polygons = label.get("poly2d") or []
    if polygons and not isinstance(polygons[0], Mapping):
        polygons = [
            {"vertices": [p[:2] for p in polygons], "types": "".join(p[2] for p in polygons)}
        ]
    for polygon in polygons:
        vertices = polygon["vertices"]
        if not all(np.isfinite(np.array(vertices, dtype=np.float64)).ravel()):
            got, do = "a vertex that is not finite", "correct the label file"
            raise InputError(f"{where}: poly2d", got, "(x, y) pixels", do)
        if vertices:
            types = str(polygon.get("types") or "L" * len(vertices))
            yield vertices, types, bool(polygon.get("closed", False))


def find_folders(root: Path, split: str) -> dict[str, Path]:
    """Where the parts of a split are, by role; a role that is not there is absent.

    Accepted below `root`: `images/SPLIT` or `images/100k/SPLIT`; boxes in `det_annotations/SPLIT`,
    `labels/100k/SPLIT` or `labels/det_20/det_SPLIT.json`; masks in `da_seg_annotations/SPLIT` and
    `ll_seg_annotations/SPLIT`, or `labels/drivable/masks/SPLIT` and `labels/lane/masks/SPLIT`.

    Raises: MissingFileError where there are no images.
    """
    found: dict[str, Path] = {}
    for role, patterns in FOLDERS.items():
        paths = [root / pattern.format(split) for pattern in patterns]
        for path in paths:
            if path.exists():
                found.setdefault(role, path)
    if "images" not in found:
        wanted = " or ".join(pattern.format(split) for pattern in FOLDERS["images"])
        raise MissingFileError("data.root", f"'{root}' without {wanted}", "them", "check the path")
    return found


def load_records(
    root: Path, split: str, classes: Classes, *, size: tuple[int, int] | None = SIZE
) -> list[Record]:
    """The images of a split with their labels, by name.

    A role whose folder is absent is not labelled for any image, and a file that is absent for none
    but some images leaves these unlabelled.

    Args:
        root: see `find_folders`.
        split: train, val or another.
        classes: of boxes.
        size: (H, W) of the images, to which boxes are clipped; None leaves boxes as they are.

    Raises: MissingFileError; InputError for an empty folder, labels that belong to no image, and
        what `read_scenes` and `check_boxes` find.
    """
    folders = find_folders(root, split)
    images = _by_stem(folders["images"], IMAGE_ENDINGS)
    if not images:
        do = "check data.root and the split"
        raise InputError(str(folders["images"]), "no image", "one or more", do)
    boxes = _load_boxes(folders["boxes"], classes, size) if "boxes" in folders else {}
    masks = {
        role: _by_stem(folders[role], (".png",)) if role in folders else {}
        for role in ("drivable", "lane")
    }
    labelled: dict[str, Collection[str]] = {"boxes": boxes, **masks}
    for role, found in labelled.items():
        extra = sorted(set(found) - set(images))
        if extra:
            got = f"labels of {len(extra)} images that are not there, first '{extra[0]}'"
            do = f"remove them, or add the images to {folders['images']}"
            raise InputError(str(folders[role]), got, "an image for each label", do)
        if role in folders and not found:
            do = "remove the folder if the task is not labelled"
            raise InputError(str(folders[role]), "no label", "one or more", do)
    records = []
    for name, image in images.items():
        own = boxes.get(name)
        records.append(
            Record(
                image,
                None if own is None else own.boxes_xyxy,
                None if own is None else own.labels,
                masks["drivable"].get(name),
                masks["lane"].get(name),
                Conditions() if own is None else own.conditions,
            )
        )
    return records


def _load_boxes(path: Path, classes: Classes, size: tuple[int, int] | None) -> dict[str, Record]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found: dict[str, Record] = {}
    for file in files:
        for scene in read_scenes(file):
            if scene.name in found:
                do = "keep one of them"
                raise InputError(str(file), f"'{scene.name}' twice", "an image once", do)
            where = f"{file} ({scene.name})"
            numbers = [classes.number(category, where) for category in scene.categories]
            kept = [row for row, number in enumerate(numbers) if number is not None]
            boxes = check_boxes([scene.boxes_xyxy[row] for row in kept], size, where)
            labels = np.array([numbers[row] for row in kept], dtype=np.int64)
            found[scene.name] = Record(Path(scene.name), boxes, labels, conditions=scene.conditions)
    return found


def _by_stem(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
    return {path.stem: path for path in files}
