"""`yolop-mtl ablate`: what each of the paper's changes brings, trained and put into a table.

Paper: Han et al., YOLOPv2 (arXiv 2208.11434), the ablation: on top of the predecessor's way come
mosaic and mixup, then transposed convolutions in the lane head, then focal and Dice loss for lanes.
Its numbers are not known here; this makes our own, on any data.
"""

import itertools
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from shared_utils import checkpoint
from shared_utils.config import load_json, to_dict
from shared_utils.errors import InputError, Interrupted
from yolop_mtl.augment_config import AugmentConfig
from yolop_mtl.config import OptimConfig, TrainConfig
from yolop_mtl.recipes import SYNTHETIC
from yolop_mtl.train import train

FIGURES = (
    "mAP50", "mAP50_95", "drivable_mIoU", "lane_IoU", "lane_accuracy", "lane_f1", "fitness",
)  # fmt: skip
# Of a run, what may differ between the one that is there and the one that is asked for.
FREE = ("name", "runs_dir", "resume", "overwrite", "accelerator", "devices", "num_nodes")
WIDTH = 160  # characters where there is no terminal


def with_mosaic(cfg: TrainConfig, is_on: bool) -> TrainConfig:
    """Mosaic and mixup as often as by default, and off at the end for the same share of epochs."""
    augment = replace(cfg.augment, mosaic=0.0, mixup=0.0, close_mosaic=0)
    if is_on:
        usual = AugmentConfig()
        closed = max(1, round(cfg.optim.epochs * usual.close_mosaic / OptimConfig().epochs))
        augment = replace(augment, mosaic=usual.mosaic, mixup=usual.mixup, close_mosaic=closed)
    return replace(cfg, augment=augment)


def with_deconv(cfg: TrainConfig, is_on: bool) -> TrainConfig:
    """Transposed convolutions in the lane head, or nearest neighbours and a convolution."""
    return replace(cfg, model=replace(cfg.model, lane_upsample="deconv" if is_on else "nearest"))


def with_focal_dice(cfg: TrainConfig, is_on: bool) -> TrainConfig:
    """The lane loss as configured, or plain binary cross entropy with the focal term's gain.

    Focal loss with exponent 0 and equal weights is half the cross entropy.
    """
    if is_on:
        return cfg
    gain = 2 * cfg.loss.lane_focal
    loss = replace(cfg.loss, lane_alpha=0.5, lane_gamma=0.0, lane_focal=gain)
    loss = replace(loss, lane_dice=0.0, lane_iou=0.0)
    return replace(cfg, loss=loss)


class Switch(NamedTuple):
    """One of the paper's changes: a word for folder names, the table's heading, what it does."""

    word: str
    title: str
    apply: Callable[[TrainConfig, bool], TrainConfig]


SWITCHES = (
    Switch("mosaic", "mosaic, mixup", with_mosaic),
    Switch("deconv", "transposed conv.", with_deconv),
    Switch("focaldice", "focal + Dice", with_focal_dice),
)
Row = tuple[bool, ...]  # which switches are on


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Train recipe synthetic with the paper's changes off and on, over seeds, and make a table.

    Runs that are done are read, and one that was interrupted goes on, so the same command goes on
    where it stopped. Options of `yolop-mtl train` are those of every run; --seed is the first one.
    """

    seeds: int = 3
    """runs of each row, with seeds one after another"""
    grid: Literal["rows", "all"] = "rows"
    """rows: none, and each change added to the ones before, as in the paper; all: every choice"""
    base: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: SYNTHETIC)

    def __post_init__(self) -> None:
        """Check counts, and that no run is named to go on with."""
        if self.seeds < 1:
            raise InputError("seeds", self.seeds, "1 or more", "correct it")
        if self.base.run.resume:
            do = "give the same --name again: what is done is kept"
            raise InputError("resume", self.base.run.resume, "no run to go on with", do)
        if "lane" not in self.base.model.tasks:
            do = "leave lane on"
            raise InputError("model.tasks", self.base.model.tasks, "lane among them", do)

    @property
    def rows(self) -> list[Row]:
        """Which switches are on, row by row."""
        count = len(SWITCHES)
        if self.grid == "all":
            return sorted(itertools.product((False, True), repeat=count), key=sum)
        return [(True,) * n + (False,) * (count - n) for n in range(count + 1)]


def ablate(cfg: AblateConfig) -> Path:
    """Train what is not there yet, then write ablation.md and ablation.json.

    Returns: the folder with the table, `RUNS_DIR/yolop_mtl/NAME`; runs lie beside it.

    Raises: InputError where a run of that name is of another configuration; Interrupted.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        got, do = "several processes", "start it without torchrun"
        raise InputError("ablate", got, "one process", do)
    name = cfg.base.run.name or "ablation"
    if name != Path(name).name or name == "..":
        raise InputError("--name", name, "a plain name", "use --runs-dir for the place")
    folder = cfg.base.run.runs_dir / "yolop_mtl" / name
    found: dict[Row, list[dict[str, float]]] = {}
    for number, row in enumerate(cfg.rows):
        for seed in range(cfg.base.run.seed, cfg.base.run.seed + cfg.seeds):
            told = f"row {number + 1}/{len(cfg.rows)} ({describe(row)}), seed {seed}"
            Console().print(told, highlight=False, soft_wrap=True)
            run = _configure(cfg, row, seed, name)
            found.setdefault(row, []).append(_metrics_of(run))
    table = summarize(found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--runs-dir", error, "a folder to write", "choose another one") from error
    report = {"rows": table, "seeds": cfg.seeds, "config": to_dict(cfg)}
    checkpoint.write_text(json.dumps(report, indent=2) + "\n", folder / "ablation.json")
    checkpoint.write_text(as_markdown(table), folder / "ablation.md")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(as_table(table))
    console.print(f"{folder / 'ablation.md'}", highlight=False, soft_wrap=True)
    return folder


def describe(row: Row) -> str:
    """The words of the switches that are on, joined; `none`."""
    words = [switch.word for switch, is_on in zip(SWITCHES, row, strict=True) if is_on]
    return "-".join(words) or "none"


def _configure(cfg: AblateConfig, row: Row, seed: int, name: str) -> TrainConfig:
    """The run of a row and a seed."""
    run = replace(cfg.base.run, name=f"{name}-{describe(row)}-seed{seed}", seed=seed)
    made = replace(cfg.base, run=run)
    for switch, is_on in zip(SWITCHES, row, strict=True):
        made = switch.apply(made, is_on)
    return made


def _metrics_of(cfg: TrainConfig) -> dict[str, float]:
    """Figures of a run: those it has, or those that it reaches when it is trained now."""
    folder = cfg.run.runs_dir / "yolop_mtl" / cfg.run.name
    if (folder / "config.json").is_file() and not cfg.run.overwrite:
        _check_same(cfg, folder)
    is_done = (folder / "result.json").is_file()
    if not is_done or cfg.run.overwrite:
        # Without a checkpoint it had not begun; a finished one is only gone where asked for.
        has_begun = (folder / "last.ckpt").is_file() and not cfg.run.overwrite
        how = {"resume": str(folder)} if has_begun else {"overwrite": True}
        try:
            train(replace(cfg, run=replace(cfg.run, **how)))
        except Interrupted:
            words = [word for word in sys.argv[1:] if word != "--overwrite"]
            raise Interrupted(shlex.join(["yolop-mtl", *words])) from None
    with checkpoint.reading(folder / "result.json", "the result.json of a run"):
        metrics = json.loads((folder / "result.json").read_text())["metrics"]
        return {key: float(value) for key, value in metrics.items() if value is not None}


def _check_same(cfg: TrainConfig, folder: Path) -> None:
    """That the run which is there is the one that is asked for."""
    before, now = (_flat(to_dict(c)) for c in (load_json(TrainConfig, folder / "config.json"), cfg))
    for key in now:
        if before[key] != now[key] and key not in {f"run.{name}" for name in FREE}:
            got, do = f"{folder} with {before[key]}", "take another --name, or say --overwrite"
            raise InputError(key.removeprefix("run."), got, f"{now[key]}", do)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def summarize(found: Mapping[Row, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds of each row.

    Returns: for each row `switches` (word to whether it is on), `runs` (their number), and
        `figures`, name to `mean` and `std`, the standard deviation of one run (n - 1); None for
        one run alone. A figure that a run lacks is absent.
    """
    table = []
    for row, runs in found.items():
        figures = {}
        for name in FIGURES:
            values = [metrics[name] for metrics in runs if name in metrics]
            if len(values) == len(runs):
                std = statistics.stdev(values) if len(values) > 1 else None
                figures[name] = {"mean": statistics.fmean(values), "std": std}
        switches = dict(zip((switch.word for switch in SWITCHES), row, strict=True))
        table.append({"switches": switches, "runs": len(runs), "figures": figures})
    return table


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cells = ["yes" if row["switches"][switch.word] else "" for switch in SWITCHES]
    for name in names:
        figure = row["figures"].get(name)
        if figure is None:
            cells.append("–")
        else:
            spread = "" if figure["std"] is None else f" ± {figure['std']:.3f}"
            cells.append(f"{figure['mean']:.3f}{spread}")
    return cells


def _headings(table: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Titles of all columns, and the figures among them."""
    names = [name for name in FIGURES if any(name in row["figures"] for row in table)]
    return [*(switch.title for switch in SWITCHES), *names], names


def as_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The table of `summarize` in Markdown."""
    titles, names = _headings(table)
    lines = [titles, ["---"] * len(titles), *(_cells(row, names) for row in table)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def as_table(table: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `summarize` for a terminal."""
    titles, names = _headings(table)
    told = Table(title=f"mean ± deviation over {table[0]['runs']} runs, strict figures")
    for title in titles:
        told.add_column(title, justify="right")
    for row in table:
        told.add_row(*_cells(row, names))
    return told
