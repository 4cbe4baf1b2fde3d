"""The run folder and what is written into it: metrics, TensorBoard, progress, curves, the result.

Only the writer (process 0) touches files and the terminal; elsewhere every call does nothing.
"""

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from shared_utils.checkpoint import write_text
from shared_utils.errors import InputError, MissingFileError

PLAIN_LINE_SECONDS = 10.0


def seconds_since_start() -> float:
    """Wall time since this process was started, imports included."""
    return time.time() - float(psutil.Process().create_time())


def open_run(package: str, recipe: str, *, runs_dir: Path, name: str = "", resume: str = "",
             overwrite: bool = False) -> Path:  # fmt: skip
    """The folder of a run, made where it is new: `runs_dir/package/name`.

    Raises: InputError where the folder exists and neither `resume` nor `overwrite` says so;
        MissingFileError where the run to resume is not there.
    """
    if resume:
        folder = Path(resume)
        if not (folder / "config.json").is_file():
            raise MissingFileError("--resume", f"'{resume}'", "a run folder with config.json",
                                   f"look below {runs_dir}")  # fmt: skip
        return folder
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = runs_dir / package / (name or f"{recipe}-{stamp}")
    if not name:  # two starts within one second
        number = 1
        while folder.exists():
            number += 1
            folder = runs_dir / package / f"{recipe}-{stamp}-{number}"
    elif folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise InputError("--name", f"'{name}', which exists as {folder}", "a new name",
                             f"use --resume {folder} to go on or --overwrite to start over")  # fmt: skip
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _clear(folder: Path) -> None:
    """Empty a run folder; anything that no run writes is the user's own, and stops it."""
    if not (folder / "config.json").is_file():
        raise InputError("--overwrite", f"{folder}, which holds no config.json", "a run folder",
                         "choose another --name")  # fmt: skip
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


class RunLog:
    """Writes `metrics.jsonl` and `tensorboard/`, and tells the terminal how far the work is."""

    def __init__(self, folder: Path, *, is_writer: bool = True, resume_step: int = -1) -> None:
        """Open the files. With `resume_step` >= 0 lines after that step are dropped first, since
        the resumed run writes them again."""  # noqa: D205, D209
        self.folder = folder
        self.is_writer = is_writer
        self.console = Console()
        self._started = time.perf_counter()
        if not is_writer:
            return
        path = folder / "metrics.jsonl"
        if resume_step >= 0 and path.is_file():
            rows = [row for row in read_metrics(folder) if row["step"] <= resume_step]
            write_text("".join(json.dumps(row) + "\n" for row in rows), path)
        self._file = path.open("a")
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step >= 0 else None
        )

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Append one line: step, epoch, seconds since the run's start, and the values."""
        if not self.is_writer:
            return
        row = {"step": step, "epoch": epoch, "seconds": time.perf_counter() - self._started}
        row |= {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)

    def say(self, text: str) -> None:
        """One line for the person at the terminal."""
        if self.is_writer:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int, start: int = 0) -> Iterator["Ticker"]:
        """Show progress with an estimate of the time left while the body runs."""
        if not self.is_writer or not self.console.is_terminal:
            yield Ticker(self, what, total, start, None)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                   TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(what, total=total, completed=start, note="")
            yield Ticker(self, what, total, start, lambda n, note: bar.update(task, completed=n, note=note))

    def close(self) -> None:
        """Flush and close the files."""
        if self.is_writer:
            self._file.close()
            self._board.close()


class Ticker:
    """Counts finished steps; on a plain output it prints a line every few seconds."""

    def __init__(self, log: RunLog, what: str, total: int, start: int, draw: Any) -> None:
        """`draw(done, note)` updates a bar; None prints plain lines instead."""
        self._log, self._what, self._total, self._start = log, what, total, start
        self._draw = draw
        self.done = start
        self._begun = self._told = time.perf_counter()

    def tick(self, note: str = "") -> None:
        """One more step is done; `note` is shown beside it."""
        self.done += 1
        if self._draw is not None:
            self._draw(self.done, note)
            return
        now = time.perf_counter()
        if now - self._told >= PLAIN_LINE_SECONDS or self.done == self._total:
            self._told = now
            left = (now - self._begun) / (self.done - self._start) * (self._total - self.done)
            self._log.say(f"{self._what} {self.done}/{self._total}  left {_clock(left)}  {note}".rstrip())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line cut off by a kill is left out."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_curves(folder: Path, groups: Mapping[str, list[str]]) -> Path:
    """Draw `curves.png`: one panel per group of metric names, over the step.

    Args:
        folder: run folder with `metrics.jsonl`.
        groups: panel title -> names of the series; names without values are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in read_metrics(folder):
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series[name].append((row["step"], value))
    groups = {title: [n for n in names if n in series] for title, names in groups.items()}
    groups = {title: names for title, names in groups.items() if names}
    figure = Figure(figsize=(5 * max(len(groups), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, names) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), i + 1)
        for name in names:
            axes.plot(*zip(*series[name], strict=True), label=name, marker="." if len(series[name]) < 40 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, adding the command and the seconds since the process was started."""
    full = {**result, "command": sys.argv, "seconds": round(seconds_since_start(), 3)}
    write_text(json.dumps(full, indent=2) + "\n", folder / "result.json")
