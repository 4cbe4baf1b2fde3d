"""`yolop-mtl prepare`: check a data set's folder, and draw or convert its masks.

Checked are BDD100K in the forms of 2018 and 2020, YOLOP's downloads, and one's own data (COCO JSON
and masks). Written are masks alone, below YOLOP's folder names, where the readers look first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from shared_utils.errors import InputError, MissingFileError
from yolop_mtl.masks import AreaClasses, Kind, MaskFormat, check_format
from yolop_mtl.prepare_check import KINDS, ROLES, SplitReport, check_split
from yolop_mtl.prepare_masks import convert_masks, draw_masks, link_data


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Check a data set's folder, and draw or convert its masks."""

    root: Path = Path("data/bdd100k")
    """folder that holds images/ and the labels"""
    source: Literal["bdd100k", "coco"] = "bdd100k"
    """form of the labels: BDD100K's (or YOLOP's downloads), or COCO JSON with mask files"""
    splits: tuple[str, ...] = ("train", "val")
    """names of the images' folders"""
    drivable_format: MaskFormat = "binary"
    """form of the drivable masks there are: binary (YOLOP's), value (official), color, index"""
    lane_format: MaskFormat = "binary"
    """form of the lane masks there are: binary (YOLOP's), bits (official), index"""
    sample: int = 200
    """images and masks of a split to open, evenly spread; 0 opens all"""
    draw_lane: bool = False
    """draw lane masks from the polygons, into ll_seg_annotations/"""
    draw_drivable: bool = False
    """draw drivable masks from the polygons, into da_seg_annotations/"""
    convert: bool = False
    """rewrite masks of the named forms as YOLOP's (0 and 255), into the same folders"""
    lane_width: float = 8.0
    """pixels of a lane at 1280x720, in every split but val_split"""
    val_lane_width: float = 2.0
    """pixels of a lane at 1280x720 in val_split"""
    val_split: str = "val"
    """the split whose lanes are drawn in val_lane_width"""
    area_classes: AreaClasses = "merged"
    """the alternative area in what is drawn or converted: merged (255, as the direct one),
    direct_only (background), or three (class numbers 0, 1, 2: the form index)"""
    out: Path | None = None
    """write the masks there instead, beside links to the images and labels"""
    overwrite: bool = False
    """replace masks that are there; otherwise they stay, and only missing ones are written"""

    def __post_init__(self) -> None:
        """Check forms, widths and what goes together."""
        check_format("drivable", self.drivable_format)
        check_format("lane", self.lane_format)
        if not self.splits:
            raise InputError("splits", "none", "one or more", "name them, e.g. --splits train val")
        if self.sample < 0:
            raise InputError("sample", self.sample, "0 or more", "correct it")
        for name in ("lane_width", "val_lane_width"):
            if not 0 < getattr(self, name) <= 100:
                got = getattr(self, name)
                raise InputError(name, got, "more than 0, 100 at most", "correct it")
        writes = self.draw_lane or self.draw_drivable or self.convert
        if self.source == "coco" and writes:
            do = "leave draw and convert out; masks of one's own data are read as they are"
            raise InputError("source", "coco", "bdd100k where masks are written", do)
        if self.convert and (self.draw_lane or self.draw_drivable):
            do = "run the command twice"
            raise InputError("convert", "it beside draw_lane or draw_drivable", "one of them", do)
        if self.out is not None and not writes:
            do = "add --draw-lane, --draw-drivable or --convert, or leave out away"
            raise InputError("out", f"'{self.out}' with nothing to write", "something to write", do)


def prepare(config: PrepareConfig) -> list[SplitReport]:
    """Check, write what is asked for, check what was written, and print a table.

    Returns: what was found in each split, in the end.

    Raises: MissingFileError where the root or a split's images are not there; InputError for what
        the readers find, for masks that do not suit their images or their form, and for polygons
        that are to be drawn and are not there.
    """
    if not config.root.is_dir():
        got = f"'{config.root}', which is no folder"
        raise MissingFileError("root", got, "a folder with images/", "check the path")
    root = config.root
    console = Console()
    if config.out is not None and config.out.resolve() != root.resolve():
        link_data(root, config.out, config.splits, written=_written(config))
    target = config.out or root
    for split in config.splits:
        for kind in _written(config):
            if config.convert:
                form = config.lane_format if kind == "lane" else config.drivable_format
                done = convert_masks(
                    root, target, split, kind, form,
                    classes=config.area_classes, overwrite=config.overwrite,
                )  # fmt: skip
            else:
                width = config.val_lane_width if split == config.val_split else config.lane_width
                done = draw_masks(
                    root, target, split, kind, width=width,
                    classes=config.area_classes, overwrite=config.overwrite,
                )  # fmt: skip
            _say(console, f"{split}: {kind} masks: {done}")
    reports = [
        check_split(
            target, split, source=config.source, formats=_formats(config), sample=config.sample
        )
        for split in config.splits
    ]
    console.print(_table(reports))
    for report in reports:
        for line in report.missing:
            _say(console, f"{report.split}: {line}")
    return reports


def _written(config: PrepareConfig) -> list[Kind]:
    """Kinds of masks that the command writes."""
    wanted: dict[Kind, bool] = {"drivable": config.draw_drivable, "lane": config.draw_lane}
    return [kind for kind, is_drawn in wanted.items() if is_drawn or config.convert]


def _formats(config: PrepareConfig) -> dict[Kind, str]:
    """The forms of the masks after the command has written its own."""
    formats: dict[Kind, str] = {"drivable": config.drivable_format, "lane": config.lane_format}
    for kind in _written(config):
        is_index = kind == "drivable" and config.area_classes == "three"
        formats[kind] = "index" if is_index else "binary"
    return formats


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _table(reports: list[SplitReport]) -> Table:
    """A column a split."""
    table = Table("", *(report.split for report in reports))

    def row(name: str, values: list[Any]) -> None:
        table.add_row(name, *("-" if value is None else str(value) for value in values))

    row("images", [report.num_images for report in reports])
    row("size", [", ".join(f"{w} x {h}" for h, w in report.sizes) for report in reports])
    for role in ROLES:
        row(f"images with {role}", [report.labelled[role] for report in reports])
    row("boxes", [report.num_boxes for report in reports])
    for name in dict.fromkeys(name for report in reports for name in report.boxes):
        row(f"  {name}", [report.boxes.get(name, 0) for report in reports])
    for kind in KINDS:
        shares = [report.shares.get(kind) for report in reports]
        row(f"{kind} share", [None if share is None else f"{share:.2%}" for share in shares])
    return table
