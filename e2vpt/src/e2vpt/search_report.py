"""What a search leaves for people: tables, JSON, a heat map of the grid and of the pruning."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from e2vpt.devices import run_facts
from e2vpt.search import Row
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


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([row(header), row(["-" * width for width in widths]), *map(row, lines)])


def budget_table(stages: Sequence[tuple[str, int, int]]) -> str:
    """What a search will cost at most: runs and epochs of each stage and in all."""
    total = ("in all", sum(runs for _, runs, _ in stages), sum(epochs for *_, epochs in stages))
    lines = [(name, str(runs), str(epochs)) for name, runs, epochs in (*stages, total)]
    return "budget:\n" + markdown(("stage", "runs", "epochs"), lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results, a line per method; accuracies in percent."""
    lines = []
    for row in rows:
        removed = f"{row['pruned_tokens']} tokens" if row["pruned_tokens"] else ""
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
                f"{100 * row['val_top1']:.1f}",
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
) -> None:
    """`search.json`, `table.md`, `search.png`, and last of all `result.json` of the best row."""
    plain = [row.plain() for row in rows]
    trials = {
        stage: [
            {
                "name": trial.name,
                "metrics": trial.result["metrics"],
                "diverged": trial.result.get("diverged"),
                "tuned": trial.tuned,
                "epochs": trial.cfg.optim.epochs,
                "seconds": round(trial.seconds, 1),
            }
            for trial in of_stage
        ]
        for stage, of_stage in stages.items()
    }
    write_text(
        json.dumps({"rows": plain, "stages": trials}, indent=1) + "\n", folder / "search.json"
    )
    write_text(table(plain) + "\n", folder / "table.md")
    heat_maps(stages, folder / "search.png")
    best = max(rows, key=lambda row: row.chosen.val_top1)
    chosen = best.plain()
    write_result(
        folder,
        {
            "project": "e2vpt",
            "name": folder.name,
            "recipe": cfg.recipe,
            "method": chosen["label"],
            "seed": cfg.run.seed,
            "metrics": {"val_top1": chosen["val_top1"], "test_top1": chosen["test_mean"]},
            "test_std": chosen["test_std"],
            "parameters": best.finals[0].result["parameters"],
            "backbone": best.finals[0].result["backbone"],
            "normalize": cfg.data.normalize,
            "data": best.finals[0].result["data"],
            "epochs": sum(t.cfg.optim.epochs for of_stage in stages.values() for t in of_stage),
            "images_per_second": best.finals[0].result["images_per_second"],
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
