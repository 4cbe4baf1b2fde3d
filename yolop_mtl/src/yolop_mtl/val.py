"""`yolop-mtl val`: the figures of a run's network, strict and legacy."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from shared_utils.config import load_json
from shared_utils.errors import InputError
from yolop_mtl import model_io, processes
from yolop_mtl.assemble import labelled_tasks, load_split
from yolop_mtl.config import Precision, RunConfig, TrainConfig, check_ranges
from yolop_mtl.dataset import DrivingDataset, build_loader
from yolop_mtl.devices import launch_fabric
from yolop_mtl.evaluate import evaluate
from yolop_mtl.samples import check_masks, check_records


@dataclass(frozen=True, kw_only=True)
class ValConfig:
    """Measure a run on its validation images again, on another split, or on other data."""

    run: tyro.conf.Positional[Path]
    """run folder of `yolop-mtl train`"""
    split: str = ""
    """which split (default: the run's data.val_split)"""
    root: str = ""
    """folder of other data of the same form (default: the run's data.root)"""
    batch_size: int = 32
    """images per pass"""
    num_workers: int = 4
    """loader processes (0: load in between)"""
    conf: float = 0.001
    """boxes need a higher score"""
    iou: float = 0.65
    """of two boxes that overlap more the better one stays"""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """what to run on"""
    precision: Precision = "32-true"
    """32-true, bf16-mixed or 16-mixed (autocast)"""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges("", self, {"conf": (0, 1), "iou": (0, 1), "batch_size": (1, 2**20)})
        check_ranges("", self, {"num_workers": (0, 2**20)})


def val(cfg: ValConfig) -> dict[str, float]:
    """Figures by name; those of tasks that are off or not labelled are absent.

    Raises: InputError where the run or the data are not what they should be.
    """
    trained = load_json(TrainConfig, cfg.run / "config.json")
    deployed = model_io.load(cfg.run)
    run = RunConfig(accelerator=cfg.accelerator, precision=cfg.precision)
    fabric = launch_fabric(run)
    data = trained.data
    if cfg.root:
        data = replace(data, root=Path(cfg.root))
    split, names = load_split(data, cfg.split or data.val_split)
    if names != deployed.class_names[: len(names)]:
        got = f"classes {', '.join(names[:5])}"
        expected = f"those of the run, {', '.join(deployed.class_names[:5])}"
        raise InputError("root", got, expected, "name data with the same classes")
    tasks = deployed.model.tasks
    check_records(
        split, labelled_tasks(split, tasks) or tasks, f"split '{cfg.split or data.val_split}'"
    )
    check_masks(split, data, tasks)
    loader = build_loader(
        DrivingDataset(split, data, tasks=tasks, augment=None, seed=trained.run.seed),
        batch_size=cfg.batch_size,
        shuffle=False,
        num_workers=cfg.num_workers,
        seed=trained.run.seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        drop_last=False,
    )
    found = evaluate(
        deployed.model.to(fabric.device),
        loader,
        class_names=deployed.class_names,
        data=data,
        device=fabric.device,
        autocast=fabric.autocast,
        conf=cfg.conf,
        iou=cfg.iou,
        gather=processes.gather if fabric.world_size > 1 else None,
    )
    return found.metrics
