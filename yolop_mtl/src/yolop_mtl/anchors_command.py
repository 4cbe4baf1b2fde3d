"""`yolop-mtl anchors`: fit anchors to the boxes of a data set, at the size it is trained in."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from shared_utils.checkpoint import write_text
from shared_utils.errors import InputError
from yolop_mtl.anchors import AnchorFit, fit_anchors, measure_anchors
from yolop_mtl.assemble import box_sizes, load_split
from yolop_mtl.boxes import COCO_ANCHORS
from yolop_mtl.config import DataConfig
from yolop_mtl.progress import show_progress
from yolop_mtl.trunk import STRIDES


@dataclass(frozen=True, kw_only=True)
class AnchorsConfig:
    """Fit anchors, in pixels of the letterboxed image, to the boxes of the training split."""

    data: DataConfig = field(default_factory=DataConfig)
    """whose boxes, and the size of the network's input"""
    num_steps: int = 1000
    """random changes to try after k-means"""
    min_size: float = 2.0
    """boxes with a shorter side are left out, in pixels of the input"""
    seed: int = 0
    """of k-means and of the changes"""
    json: Path | None = None
    """write anchors and how well they fit into this file too"""

    def __post_init__(self) -> None:
        """Check counts."""
        if self.num_steps < 0:
            raise InputError("num_steps", self.num_steps, "0 or more", "correct it")
        if self.min_size < 0:
            raise InputError("min_size", self.min_size, "0 or more", "correct it")
        if self.seed < 0:
            raise InputError("seed", self.seed, "0 or more", "correct it")
        if self.json is not None and not self.json.resolve().parent.is_dir():
            got = f"'{self.json}' in a folder that is not there"
            raise InputError("json", got, "a file to write", "make the folder")


def run_anchors(config: AnchorsConfig) -> list[list[list[float]]]:
    """Read the boxes, fit, and print a table beside the released network's anchors.

    Returns: (width, height) per scale, small to large, in pixels of the input.

    Raises: MissingFileError; InputError where boxes are not labelled, are too few, or what the
        readers find.
    """
    sizes = read_sizes(config.data)
    anchors = fit_anchors(
        sizes, num_steps=config.num_steps, min_size=config.min_size, seed=config.seed
    )
    usable = sizes[(sizes >= config.min_size).all(1)]
    height, width = config.data.img_size
    # As --model.anchors coco trains with them: in the pixels they have, whatever the input's size.
    rows = {"fitted": np.array(anchors), "COCO (released network)": np.array(COCO_ANCHORS)}
    fits = {name: measure_anchors(usable, own.reshape(-1, 2)) for name, own in rows.items()}
    console = Console()
    console.print(_table(rows, fits))
    numbers = np.array(anchors).ravel().tolist()
    text = (
        f"{len(usable)} boxes of {len(sizes)}; width,height in pixels of {width} x {height}; "
        "to train with them:\n--model.anchors explicit --model.anchor-sizes "
        + " ".join(f"{number:g}" for number in numbers)
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if config.json is not None:
        found = {
            "anchors": anchors,
            "img_size": list(config.data.img_size),
            "boxes": len(usable),
            **fits["fitted"]._asdict(),
        }
        write_text(json.dumps(found, indent=2) + "\n", config.json)
    return anchors


def read_sizes(data: DataConfig) -> NDArray[np.float64]:
    """Width and height of the training boxes, (n, 2) pixels of the network's input.

    Raises: MissingFileError; InputError where no image has its boxes labelled, where none is of
        the classes asked for, or what the readers find.
    """
    records = load_split(data, data.train_split).records
    labelled = [record for record in records if record.boxes_xyxy is not None]
    if not labelled:
        got = f"no image of '{data.train_split}' in '{data.root}' with labelled boxes"
        raise InputError("data.root", got, "one or more", "add the labels of boxes")
    shown = show_progress(labelled, len(labelled), "image sizes read")
    sizes = box_sizes(shown, data.img_size)
    if not len(sizes):
        got = f"'{data.classes}', of which '{data.train_split}' has no box"
        raise InputError("data.classes", got, "one or more", "give vehicle or all, or add boxes")
    return sizes


def _table(rows: dict[str, NDArray[np.float64]], fits: dict[str, AnchorFit]) -> Table:
    table = Table(
        "", *(f"stride {stride}" for stride in STRIDES), "recall", "fitness", "anchors a box"
    )
    for name, anchors in rows.items():
        scales = [
            "  ".join(f"{w:g},{h:g}" for w, h in scale) for scale in anchors.round(1).tolist()
        ]
        fit = fits[name]
        table.add_row(
            name, *scales, f"{fit.recall:.4f}", f"{fit.fitness:.4f}", f"{fit.per_box:.2f}"
        )
    return table
