"""What a search leaves for people: tables, JSON, a heat map of the grid and of the pruning."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from e2vpt.devices import run_facts
from e2vpt.search_config import SearchConfig
from e2vpt.train import Setup
from e2vpt.trials import Trial
from shared_utils.checkpoint import write_text
from shared_utils.run_log import write_result

HEADER = (
    "method",
    "lr",
    "decay",
    "removed",
    "tuned",
    "%",
    "val",
    "test (mean ± std)",
    "search epochs",
    "search s",
    "final s",
)


@dataclass(frozen=True)
class Row:
    """One line of the results table.

    Attributes:
        label: the method, and what was pruned.
        chosen: the run whose settings were chosen.
        finals: its final runs, one for each seed.
        search_epochs: epochs of all runs that led to the choice.
        search_seconds: their wall time.
        is_control: the settings were chosen for another row; it has no validation accuracy of its
            own and is not chosen in turn.
    """

    label: str
    chosen: Trial
    finals: tuple[Trial, ...]
    search_epochs: int
    search_seconds: float
    is_control: bool = False

    def plain(self) -> dict[str, Any]:
        """For `search.json`; accuracies in [0, 1], `test_std` over the seeds, 0 of a single one."""
        tests = [trial.test_top1 for trial in self.finals]
        prune = self.chosen.cfg.prune
        return {
            "label": self.label,
            "method": self.chosen.cfg.model.method,
            "lr": self.chosen.cfg.optim.lr,
            "weight_decay": self.chosen.cfg.optim.weight_decay,
            "pruned_tokens": prune.num_tokens,
            "pruned_segments": prune.num_segments,
            "of_segments": prune.of_segments if prune.num_segments else 0,
            "val_top1": None if self.is_control else self.chosen.val_top1,
            "test_top1": tests,
            "test_mean": mean(tests),
            "test_std": stdev(tests) if len(tests) > 1 else 0.0,
            "tuned": self.finals[0].tuned,
            "percent": self.finals[0].result["parameters"]["percent"],
            "search_epochs": self.search_epochs,
            "search_seconds": round(self.search_seconds, 1),
            "final_seconds": round(mean(trial.seconds for trial in self.finals), 1),
            "rewind": prune.rewind if prune.source else None,
        }


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([row(header), row(["-" * width for width in widths]), *map(row, lines)])


def budget_table(*budgets: Sequence[tuple[str, int, int]]) -> str:
    """What searches will cost together at most: runs and epochs of each stage and in all."""
    sums: dict[str, tuple[int, int]] = {}
    for stages in budgets:
        for name, runs, epochs in stages:
            before = sums.pop("in all", (0, 0))
            told = sums.get(name, (0, 0))
            sums[name] = (told[0] + runs, told[1] + epochs)
            sums["in all"] = (before[0] + runs, before[1] + epochs)
    lines = [(name, str(runs), str(epochs)) for name, (runs, epochs) in sums.items()]
    return "budget:\n" + markdown(("stage", "runs", "epochs"), lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results, a line per method; accuracies in percent."""
    lines = []
    for row in rows:
        count = row["pruned_tokens"]
        removed = f"{count} token{'s' * (count > 1)}" if count else ""
        if row["pruned_segments"]:
            removed += f" {row['pruned_segments']}/{row['of_segments']} segments"
        lines.append(
            (
                row["label"],
                f"{row['lr']:g}",
                f"{row['weight_decay']:g}",
                removed.strip() or "-",
                f"{row['tuned']:,}",
                f"{row['percent']:.3f}",
                "-" if row["val_top1"] is None else f"{100 * row['val_top1']:.1f}",
                f"{100 * row['test_mean']:.2f} ± {100 * row['test_std']:.2f}",
                str(row["search_epochs"]),
                f"{row['search_seconds']:.0f}",
                f"{row['final_seconds']:.0f}",
            )
        )
    return markdown(HEADER, lines)


def write(
    folder: Path,
    cfg: SearchConfig,
    setup: Setup,
    rows: Sequence[Row],
    stages: Mapping[str, Sequence[Trial]],
    chosen: Row,
) -> None:
    """`search.json`, `table.md`, `search.png`, and last of all `result.json` of the chosen row."""
    plain = [row.plain() for row in rows]
    trials = {
        stage: [
            {
                "name": trial.name,
                "metrics": trial.result["metrics"],
                "val_loss": trial.val_loss if math.isfinite(trial.val_loss) else None,
                "diverged": trial.result.get("diverged"),
                "tuned": None if trial.is_diverged else trial.tuned,
                "epochs": trial.cfg.optim.epochs,
                "seconds": round(trial.seconds, 1),
            }
            for trial in of_stage
        ]
        for stage, of_stage in stages.items()
    }
    found = {"chosen": chosen.label, "rows": plain, "stages": trials}
    write_text(json.dumps(found, indent=1) + "\n", folder / "search.json")
    write_text(table(plain) + "\n", folder / "table.md")
    heat_maps(stages, folder / "search.png")
    row, result = chosen.plain(), chosen.finals[0].result
    write_result(
        folder,
        {
            "project": "e2vpt",
            "name": folder.name,
            "recipe": cfg.recipe,
            "method": row["label"],
            "seed": cfg.run.seed,
            "metrics": {"val_top1": row["val_top1"], "test_top1": row["test_mean"]},
            "test_std": row["test_std"],
            "parameters": result["parameters"],
            "backbone": result["backbone"],
            "normalize": cfg.data.normalize,
            "data": result["data"],
            "epochs": sum(t.cfg.optim.epochs for of_stage in stages.values() for t in of_stage),
            "images_per_second": result["images_per_second"],
            **run_facts(setup.fabric),
        },
    )


def heat_maps(stages: Mapping[str, Sequence[Trial]], path: Path) -> None:
    """Validation accuracy over rate and decay, a panel per method, and over what was pruned."""
    grids = {stage: trials for stage, trials in stages.items() if stage.endswith(" grid")}
    pruned = [t for stage in ("tokens", "segments") for t in stages.get(stage, ())]
    count = len(grids) + bool(pruned)
    figure = Figure(figsize=(4.6 * count, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (stage, trials) in enumerate(grids.items(), 1):
        points = {(t.cfg.optim.weight_decay, t.cfg.optim.lr): t.val_top1 for t in trials}
        axes = figure.add_subplot(1, count, i, title=stage, xlabel="lr", ylabel="weight decay")
        _heat_map(axes, points)
    if pruned:
        points = {
            (float(t.cfg.prune.num_segments), float(t.cfg.prune.num_tokens)): t.val_top1
            for t in pruned
        }
        axes = figure.add_subplot(
            1, count, count, title="pruning", xlabel="tokens removed", ylabel="segments removed"
        )
        _heat_map(axes, points)
    figure.savefig(path, dpi=110)


def _heat_map(axes: Axes, points: Mapping[tuple[float, float], float]) -> None:
    """Percent by (row, column); combinations that were not tried stay white."""
    rows, columns = (sorted({point[axis] for point in points}) for axis in (0, 1))
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in points.items():
        values[rows.index(row), columns.index(column)] = 100 * value
    axes.imshow(values, cmap="viridis", aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), [f"{c:g}" for c in columns], rotation=45)
    axes.set_yticks(range(len(rows)), [f"{r:g}" for r in rows])
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for row, column in np.argwhere(~np.isnan(values)):
        value = values[row, column]
        colour = "white" if value <= middle else "black"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
