"""What `yolop-mtl val` writes and shows: a JSON, curves, tables with both ways of counting."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric import Fabric
from rich.console import Console
from rich.table import Table

from shared_utils import checkpoint
from shared_utils.config import to_dict
from shared_utils.errors import InputError
from yolop_mtl.config import DataConfig
from yolop_mtl.devices import run_facts
from yolop_mtl.report import write_curves
from yolop_mtl.val import FIGURES, ValConfig, Validation

LEGACY = "legacy_"
# Of a condition, both ways where both have it.
TOLD = ("mAP50", "mAP50_95", "recall", "drivable_mIoU", "lane_accuracy", "lane_IoU", "lane_f1")
WIDTH = 150  # characters where there is no terminal


def write_files(
    cfg: ValConfig, fabric: Fabric, data: DataConfig, split: str, result: Validation
) -> None:
    """The curves, then val.json, last, so that it stands for all of them."""
    folder, images = result.folder, result.found.images
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("boxes.png", "lanes.png", FIGURES):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        do = "name one with --out"
        raise InputError("out", error, "a folder that can be written", do) from error
    write_curves(result.found, result.class_names, folder)
    conditions: dict[str, dict[str, Any]] = {}
    for row in result.conditions:
        of = conditions.setdefault(row.attribute, {})
        of[row.value] = {"images": row.num_images, "metrics": row.metrics}
    report = {
        "project": "yolop_mtl",
        "weights": str(cfg.run),
        "split": split,
        "class_names": list(result.class_names),
        "images": len(images),
        "labelled_images": {
            "boxes": sum(image.boxes is not None for image in images),
            "drivable": sum(image.drivable is not None for image in images),
            "lane": sum(image.lane is not None for image in images),
        },
        "metrics": result.found.metrics,
        "conditions": conditions,
        "ms_per_image": result.ms_per_image,
        "options": to_dict(cfg),
        "data": to_dict(data),
        **run_facts(fabric),
    }
    checkpoint.write_text(json.dumps(report, indent=2) + "\n", folder / FIGURES)


def show_tables(result: Validation) -> None:
    """All figures, those of each condition, and the time of each part."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(figure_table(result.found.metrics))
    if result.conditions:
        console.print(condition_table(result))
    told = ", ".join(f"{part} {ms:.2f}" for part, ms in result.ms_per_image.items())
    console.print(f"ms per image: {told}", highlight=False)
    console.print(f"figures and curves: {result.folder}", highlight=False, soft_wrap=True)


def figure_table(metrics: Mapping[str, float]) -> Table:
    """A row for each figure: strict, and YOLOP's where there is such a one."""
    table = Table("figure", title="all images")
    for name in ("strict", "legacy"):
        table.add_column(name, justify="right")
    names = [name.removeprefix(LEGACY) for name in metrics]
    for name in dict.fromkeys(names):
        table.add_row(name, _told(metrics, name), _told(metrics, LEGACY + name))
    return table


def condition_table(result: Validation) -> Table:
    """A row for each condition: its images, and the main figures, strict / legacy."""
    told = [name for name in TOLD if name in result.found.metrics]
    table = Table("condition", title="by condition: strict / legacy")
    table.add_column("images", justify="right")
    for name in told:
        table.add_column(name, justify="right")
    before = ""
    for row in result.conditions:
        if before not in ("", row.attribute):
            table.add_section()
        before = row.attribute
        table.add_row(
            f"{row.attribute}: {row.value}",
            str(row.num_images),
            *_pairs(row.metrics, told, result.found.metrics),
        )
    return table


def _pairs(
    metrics: Mapping[str, float], names: Sequence[str], of_all: Mapping[str, float]
) -> list[str]:
    cells = []
    for name in names:
        has_legacy = LEGACY + name in of_all
        cell = _told(metrics, name)
        cells.append(f"{cell} / {_told(metrics, LEGACY + name)}" if has_legacy else cell)
    return cells


def _told(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.4f}" if name in metrics else "–"
