"""An image with its labels in memory, read from a record's files and checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.io import ImageReadMode, decode_image, read_file

from shared_utils.errors import InputError, MissingFileError
from yolop_mtl.config import DataConfig
from yolop_mtl.masks import Kind, check_share, read_mask
from yolop_mtl.records import Record, check_boxes

Pixels = NDArray[np.uint8]
SHARE_SAMPLE = 64  # masks that the check of their form looks at


class Sample(NamedTuple):
    """An image and its labels, in its own pixels. Shapes: (H, W) pixels, T boxes.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        boxes_xyxy: (T, 4) float32, pixels; None where boxes are not labelled.
        labels: (T,) int64 class numbers; None with the boxes.
        drivable: (H, W) uint8, 0, 1, perhaps 2, or 255 (unknown); None where not labelled.
        lane: (H, W) uint8, 0, 1 or 255; None where not labelled.
        known: (H, W) bool, where boxes are labelled, if that is not all or nothing of the image.
    """

    image: Pixels
    boxes_xyxy: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None
    drivable: Pixels | None = None
    lane: Pixels | None = None
    known: NDArray[np.bool_] | None = None


def read_sample(record: Record, data: DataConfig, tasks: Sequence[str]) -> Sample:
    """Read the files of a record; only what the tasks need.

    Boxes are clipped to the image.

    Args:
        record: where they are.
        data: form of the masks.
        tasks: detection, drivable, lane, or some of them.

    Raises: MissingFileError; InputError for a broken file, a mask of another size than the image,
        a box that lies outside of it.
    """
    image = read_image(record.image)
    size = image.shape[:2]
    boxes, labels = None, None
    if "detection" in tasks and record.boxes_xyxy is not None:
        boxes = check_boxes(record.boxes_xyxy.tolist(), size, f"{record.image}")
        labels = record.labels
    masks = {
        kind: _read_mask(path, kind, data, size)
        for kind, path in _mask_files(record)
        if kind in tasks and path is not None
    }
    return Sample(image, boxes, labels, masks.get("drivable"), masks.get("lane"))


def read_image(path: Path) -> Pixels:
    """An image file as (H, W, 3) uint8, RGB, turned as its EXIF entry says.

    Raises: MissingFileError; InputError for a broken file or one of more than 8 bits a channel.
    """
    if not path.is_file():
        raise MissingFileError(str(path), "no such file", "an image", "check the path")
    try:
        # Twice as fast as Pillow, to the bit the same; unlike OpenCV it refuses a truncated file.
        pixels = decode_image(
            read_file(str(path)), mode=ImageReadMode.RGB, apply_exif_orientation=True
        )
    except RuntimeError as error:
        reason = str(error).rsplit(".cpp:", 1)[-1].partition(", ")[2] or str(error)
        got = f"a damaged or unreadable file ({reason})"
        do = "restore it, or remove it with its labels"
        raise InputError(str(path), got, "a JPEG or PNG image", do) from error
    if pixels.dtype != torch.uint8:
        raise InputError(str(path), f"pixels of {pixels.dtype}", "8 bits a channel", "convert it")
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _mask_files(record: Record) -> tuple[tuple[Kind, Path | None], tuple[Kind, Path | None]]:
    return ("drivable", record.drivable), ("lane", record.lane)


def _read_mask(path: Path, kind: Kind, data: DataConfig, size: tuple[int, ...] | None) -> Pixels:
    mask_format = data.drivable_format if kind == "drivable" else data.lane_format
    mask = read_mask(path, kind, mask_format, classes=data.area_classes)
    if size is not None and mask.shape != size:
        got, expected = ("{} x {} pixels".format(*shape) for shape in (mask.shape, size))
        raise InputError(str(path), got, f"{expected} as the image", "give this image's mask")
    return mask


def check_masks(
    records: Sequence[Record], data: DataConfig, tasks: Sequence[str], *, num: int = SHARE_SAMPLE
) -> dict[str, float]:
    """Read masks from all over the set and check that they have the form that `data` names.

    Args:
        records: of a split.
        data: form of the masks.
        tasks: whose masks.
        num: masks of each kind at most, at equal distances.

    Returns: per kind that is labelled the share of foreground, 0 to 1.

    Raises: as `read_mask`; InputError where the share cannot be that of the kind.
    """
    shares: dict[str, float] = {}
    files: dict[Kind, list[Path]] = {"drivable": [], "lane": []}
    for record in records:
        for kind, path in _mask_files(record):
            if kind in tasks and path is not None:
                files[kind].append(path)
    for kind, paths in files.items():
        if paths:
            rows = np.unique(np.linspace(0, len(paths) - 1, min(num, len(paths))).round())
            masks = [_read_mask(paths[int(row)], kind, data, None) for row in rows]
            mask_format = data.drivable_format if kind == "drivable" else data.lane_format
            shares[kind] = check_share(kind, mask_format, masks)
    return shares


def check_records(records: Sequence[Record], tasks: Sequence[str], where: str) -> dict[str, int]:
    """How many images are labelled for each task.

    Args:
        records: of a split.
        tasks: that are to be learnt or measured.
        where: names the split in an error.

    Raises: InputError for no image, one without a label of any of the tasks, or a task that no
        image is labelled for.
    """
    if not records:
        raise InputError(where, "no image", "one or more", "check data.root and the split")
    labelled = {
        "detection": [record.boxes_xyxy is not None for record in records],
        "drivable": [record.drivable is not None for record in records],
        "lane": [record.lane is not None for record in records],
    }
    table = np.array([labelled[task] for task in tasks])  # (tasks, N)
    bare = np.flatnonzero(~table.any(0))
    if len(bare) == len(records):
        do = "check data.root and the names of its folders"
        raise InputError(where, f"no label for {', '.join(tasks)}", "labelled images", do)
    if len(bare):
        got = f"{len(bare)} images without any label, first '{records[bare[0]].image}'"
        do = "add their labels, or remove them"
        raise InputError(where, got, "a label of some kind for each", do)
    counts = dict(zip(tasks, table.sum(1).tolist(), strict=True))
    for task, count in counts.items():
        if not count:
            do = "add labels, or leave the task out of model.tasks"
            raise InputError(where, f"no image labelled for {task}", "one or more", do)
    return counts
