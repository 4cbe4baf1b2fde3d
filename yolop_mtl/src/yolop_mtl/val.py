"""`yolop-mtl val`: the figures of a network on labelled images, strict and legacy."""

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro

from shared_utils.config import load_json
from shared_utils.errors import InputError
from yolop_mtl import model_io, processes
from yolop_mtl.assemble import labelled_tasks, load_split
from yolop_mtl.clock import Clock
from yolop_mtl.conditions import ConditionFigures, by_condition
from yolop_mtl.config import DataConfig, Precision, RunConfig, TrainConfig, check_ranges
from yolop_mtl.dataset import DrivingDataset, build_loader
from yolop_mtl.devices import launch_fabric
from yolop_mtl.evaluate import Evaluation, evaluate
from yolop_mtl.masks import AreaClasses, MaskFormat
from yolop_mtl.model import MAX_STRIDE, fuse
from yolop_mtl.progress import show_progress
from yolop_mtl.records import Record
from yolop_mtl.samples import check_masks, check_records
from yolop_mtl.subpixel import to_subpixel

FIGURES = "val.json"  # in the folder of an evaluation


@dataclass(frozen=True, kw_only=True)
class ValConfig:
    """Measure a network on labelled images: strict and YOLOP's figures, apart for each condition.

    A run brings its data's description; for weights alone, such as imported ones, --root names the
    data, in BDD100K's form unless --source and the other options say otherwise.
    """

    run: tyro.conf.Positional[Path]
    """run folder of `yolop-mtl train`, another folder with model.safetensors and model.json, or the
    path of model.safetensors"""
    out: str = ""
    """folder for figures and curves (default: val-SPLIT-TIME beside the weights)"""
    overwrite: bool = False
    """write over an earlier evaluation in --out"""
    split: str = ""
    """which split (default: the run's data.val_split; val for weights alone)"""
    root: str = ""
    """folder of other data (default: the run's data.root)"""
    source: Literal["", "bdd100k", "coco", "synthetic"] = ""
    """form of the labels (default: the run's; bdd100k for weights alone)"""
    drivable_format: MaskFormat | Literal[""] = ""
    """form of the drivable masks: binary, value, color, index (default: the run's, or binary)"""
    lane_format: MaskFormat | Literal[""] = ""
    """form of the lane masks: binary, bits, index (default: the run's, or binary)"""
    area_classes: AreaClasses | Literal[""] = ""
    """the alternative area: merged, direct_only, or three classes (default: as trained)"""
    scene_size: tuple[int, int] = (0, 0)
    """height and width of generated scenes in pixels (0 0: the run's, or 720 1280)"""
    img_size: tuple[int, int] = (0, 0)
    """height and width of the network's input in pixels, multiples of 32 (0 0: as trained)"""
    limit: int | None = None
    """use at most so many images (0: all; default: the run's data.limit)"""
    batch_size: int = 32
    """images per pass"""
    num_workers: int = 4
    """loader processes (0: load in between)"""
    conf: float = 0.001
    """boxes need a higher score"""
    iou: float = 0.65
    """of two boxes that overlap more the better one stays"""
    fuse: bool = False
    """fold norms and keep channels last, as prediction does: faster, and equal up to rounding"""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """what to run on"""
    precision: Precision = "32-true"
    """32-true, bf16-mixed or 16-mixed (autocast)"""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges("", self, {"conf": (0, 1), "iou": (0, 1), "batch_size": (1, 2**20)})
        check_ranges("", self, {"num_workers": (0, 2**20)})
        if self.limit is not None:
            check_ranges("", self, {"limit": (0, 2**40)})
        if any(side < 0 or side % MAX_STRIDE for side in self.img_size):
            expected = f"a height and a width that are multiples of {MAX_STRIDE}"
            raise InputError("img_size", self.img_size, expected, "correct it")


class Validation(NamedTuple):
    """What an evaluation found.

    Attributes:
        found: figures of all images, and curves.
        conditions: figures apart for weather, scene and time of day.
        ms_per_image: of load, network, postprocessing and counting, without the first batch.
        class_names: of boxes.
        folder: where figures and curves lie.
    """

    found: Evaluation
    conditions: list[ConditionFigures]
    ms_per_image: dict[str, float]
    class_names: tuple[str, ...]
    folder: Path


def val(cfg: ValConfig) -> Validation:
    """Evaluate, write figures and curves, tell the terminal.

    Memory grows by what `ImageResult` keeps of an image, and nothing else.

    Raises: InputError where network, data or folder are not what they should be.
    """
    deployed = model_io.load(cfg.run)
    weights = cfg.run.parent if cfg.run.is_file() else cfg.run
    data = _describe_data(cfg, weights, deployed)
    name = cfg.split or data.val_split
    folder = _check_folder(cfg, weights, name)
    fabric = launch_fabric(RunConfig(accelerator=cfg.accelerator, precision=cfg.precision))
    split, names = load_split(data, name)
    split = as_numbered(split, names, deployed.class_names)
    tasks = deployed.model.tasks
    check_records(split, labelled_tasks(split, tasks) or tasks, f"split '{name}'")
    check_masks(split, data, tasks)
    model = deployed.model.to(fabric.device)
    if cfg.fuse:
        fuse(model, completely=True)
        if fabric.device.type == "cpu":
            to_subpixel(model)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = build_loader(
        DrivingDataset(split, data, tasks=tasks, augment=None, seed=0),
        batch_size=cfg.batch_size,
        shuffle=False,
        num_workers=cfg.num_workers,
        seed=0,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        drop_last=False,
    )
    clock = Clock(fabric.device)
    found = evaluate(
        model,
        show_progress(loader, len(loader), "batches") if fabric.is_global_zero else loader,
        class_names=deployed.class_names,
        data=data,
        device=fabric.device,
        autocast=fabric.autocast,
        conf=cfg.conf,
        iou=cfg.iou,
        gather=processes.gather if fabric.world_size > 1 else None,
        clock=clock,
    )
    conditions = by_condition(found.images, split, len(deployed.class_names))
    result = Validation(found, conditions, clock.ms_per_image, deployed.class_names, folder)
    if fabric.is_global_zero:
        from yolop_mtl.val_report import show_tables, write_files

        write_files(cfg, fabric, data, name, result)
        show_tables(result)
    return result


def as_numbered(
    records: list[Record], names: tuple[str, ...], class_names: tuple[str, ...]
) -> list[Record]:
    """Records with the network's class numbers: classes are the same where their names are.

    Args:
        records: labels by the data's numbers.
        names: of the data's classes.
        class_names: of the network's.

    Raises: InputError for a class of the data that the network does not have.
    """
    if lacking := [name for name in names if name not in class_names]:
        got = f"class '{lacking[0]}'"
        expected = f"those of the network, {', '.join(class_names[:5])}"
        raise InputError("root", got, expected, "name data with the same classes")
    numbers = np.array([class_names.index(name) for name in names], dtype=np.int64)
    if (numbers == np.arange(len(names))).all():
        return records
    return [r if r.labels is None else r._replace(labels=numbers[r.labels]) for r in records]


def _describe_data(cfg: ValConfig, weights: Path, deployed: model_io.Deployed) -> DataConfig:
    """The run's data, or BDD100K's form for weights alone, with what the options say otherwise."""
    head = deployed.model.drivable
    is_three = head is not None and head.output.conv.out_channels == 3
    if (weights / "config.json").is_file():
        data = load_json(TrainConfig, weights / "config.json").data
    elif not cfg.root:
        do = "name its folder with --root"
        raise InputError("root", "nothing for weights without a run", "labelled data", do)
    else:
        data = DataConfig(
            classes="vehicle" if "vehicle" in deployed.class_names else "all",
            area_classes="three" if is_three else "merged",
        )
    size = cfg.img_size if any(cfg.img_size) else deployed.img_size
    return replace(
        data,
        root=Path(cfg.root) if cfg.root else data.root,
        source=cfg.source or data.source,
        drivable_format=cfg.drivable_format or data.drivable_format,
        lane_format=cfg.lane_format or data.lane_format,
        area_classes=cfg.area_classes or data.area_classes,
        scene_size=cfg.scene_size if any(cfg.scene_size) else data.scene_size,
        limit=data.limit if cfg.limit is None else cfg.limit,
        img_size=size,
    )


def _check_folder(cfg: ValConfig, weights: Path, split: str) -> Path:
    """Where to write; checked before the work."""
    if not cfg.out:
        return weights / f"val-{split}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(cfg.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / FIGURES).is_file():
            do = "name another folder"
            raise InputError("out", f"'{folder}', which holds no {FIGURES}", "a new folder", do)
        if not cfg.overwrite:
            do = "say --overwrite, or name another folder"
            raise InputError("out", f"'{folder}' with an earlier evaluation", "a new folder", do)
    return folder
