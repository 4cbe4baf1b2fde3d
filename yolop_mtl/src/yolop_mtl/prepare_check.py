"""What is in a data set's folder: images, boxes and masks counted, a sample of them opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from shared_utils.checkpoint import reading
from shared_utils.errors import InputError
from yolop_mtl import bdd100k, coco
from yolop_mtl.masks import Kind, check_share, read_mask
from yolop_mtl.progress import show_progress
from yolop_mtl.records import ALL_BDD_CLASSES, Classes, Record

ROLES = ("boxes", "drivable", "lane")
KINDS: tuple[Kind, ...] = ("drivable", "lane")
MOST_SIZES = 4  # different sizes of images that are listed


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What was found in a split.

    Attributes:
        split: its name.
        num_images: all of them.
        labelled: images with boxes (perhaps none on it), drivable and lane masks, by role.
        boxes: by category; empty where boxes are not labelled.
        sizes: (H, W) of the opened images, most frequent first, four at most.
        shares: foreground of the opened masks, 0 to 1, by kind.
        missing: a line for each role that images lack.
    """

    split: str
    num_images: int
    labelled: dict[str, int]
    boxes: dict[str, int]
    sizes: list[tuple[int, int]]
    shares: dict[Kind, float]
    missing: list[str]

    @property
    def num_boxes(self) -> int:
        """Of all categories."""
        return sum(self.boxes.values())


def check_split(
    root: Path,
    split: str,
    *,
    source: Literal["bdd100k", "coco"],
    formats: Mapping[Kind, str],
    sample: int,
) -> SplitReport:
    """Read a split's labels, open some of its images and masks, and count.

    Args:
        root: of the data set.
        split: its name.
        source: form of the labels.
        formats: form of the masks, by kind.
        sample: images and masks to open, evenly spread; 0 opens all.

    Raises: MissingFileError, and InputError for what the readers find, a broken image or mask, a
        mask of another size than its image, or a share of foreground that cannot be.
    """
    names: Sequence[str] = ()
    if source == "bdd100k":
        classes = Classes(ALL_BDD_CLASSES, known=bdd100k.CATEGORIES)
        records = bdd100k.load_records(root, split, classes, size=None)
        names = classes.names
    else:
        own = coco.find_classes(root, split)
        records = coco.load_records(root, split, own)
        names = own.names if own is not None else ()
    counts = np.zeros(len(names), dtype=np.int64)
    for record in records:
        if record.labels is not None:
            counts += np.bincount(record.labels, minlength=len(names))
    chosen = _spread(records, sample)
    sizes = _open_images(chosen, split)
    shares: dict[Kind, float] = {}
    for kind in KINDS:
        labelled = [record for record in records if getattr(record, kind) is not None]
        if labelled:
            shares[kind] = _open_masks(_spread(labelled, sample), kind, formats[kind], split)
    has = {role: [_has(record, role) for record in records] for role in ROLES}
    return SplitReport(
        split=split,
        num_images=len(records),
        labelled={role: sum(found) for role, found in has.items()},
        boxes={name: int(n) for name, n in zip(names, counts, strict=True) if n},
        sizes=sizes,
        shares=shares,
        missing=[line for role in ROLES if (line := _lacking(role, records, has[role]))],
    )


def _has(record: Record, role: str) -> bool:
    return getattr(record, "boxes_xyxy" if role == "boxes" else role) is not None


def _lacking(role: str, records: Sequence[Record], has: Sequence[bool]) -> str:
    lacking = [record.image.name for record, found in zip(records, has, strict=True) if not found]
    what = role if role == "boxes" else f"{role} mask"
    if len(lacking) == len(records):
        return f"no {what} for any image: that task is not labelled"
    if lacking:
        return f"no {what} for {len(lacking)} of {len(records)} images, first {lacking[0]}"
    return ""


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    if not count or count >= len(records):
        return list(records)
    rows = np.linspace(0, len(records) - 1, count).round().astype(int)
    return [records[row] for row in np.unique(rows)]


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) from the header of an image file. Raises: MissingFileError, InputError."""
    with reading(path, "an image"), Image.open(path) as image:
        return image.height, image.width


def _open_images(records: Sequence[Record], split: str) -> list[tuple[int, int]]:
    """Sizes, after every pixel and every box was looked at."""
    found: dict[tuple[int, int], int] = {}
    for record in show_progress(records, len(records), f"{split}: images opened"):
        with reading(record.image, "an image"), Image.open(record.image) as image:
            image.load()
            size = image.height, image.width
        found[size] = found.get(size, 0) + 1
        boxes = record.boxes_xyxy
        if boxes is not None and len(boxes):
            height, width = size
            outside = (boxes[:, 0] >= width) | (boxes[:, 1] >= height) | (boxes[:, 2:] <= 0).any(1)
            if outside.any():
                got, do = f"{boxes[outside][0].tolist()}", "correct the label file"
                expected = f"one that meets the image of {width} x {height} pixels"
                raise InputError(f"{record.image}: box", got, expected, do)
    return sorted(found, key=lambda size: -found[size])[:MOST_SIZES]


def _open_masks(records: Sequence[Record], kind: Kind, form: str, split: str) -> float:
    """The share of foreground, 0 to 1; only counts are kept of masks that were looked at."""
    counts = np.zeros(2, dtype=np.int64)  # background, foreground
    for record in show_progress(records, len(records), f"{split}: {kind} masks opened"):
        path = getattr(record, kind)
        mask = read_mask(path, kind, form)
        size = image_size(record.image)
        if mask.shape != size:
            got = f"{mask.shape[1]} x {mask.shape[0]} pixels"
            expected = f"{size[1]} x {size[0]}, as {record.image.name} has"
            raise InputError(str(path), got, expected, "restore the mask of that image")
        known = mask != 255
        counts += np.array([(known & (mask == 0)).sum(), (known & (mask > 0)).sum()])
    total = int(counts.sum())
    if not total:
        return 0.0
    # Small masks with the same shares in all, so that one place decides and words the refusal.
    summary = np.repeat(np.array([0, 1], np.uint8), (counts * 10_000 / total).round().astype(int))
    check_share(kind, form, [summary] * len(records))
    return float(counts[1] / total)
