"""The run folder and what is written into it: metrics, TensorBoard, progress, curves, the result.

Only the writer (process 0) touches files and the terminal; in the others every call of a `RunLog`
does nothing, and the functions are not to be called.
"""

import json
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from shared_utils.atomic import write_text
from shared_utils.errors import InputError, MissingFileError

PLAIN_LINE_SECONDS = 10.0
# Steps older than this say nothing about the time left; the first ones are often slow.
ESTIMATE_SECONDS = 300.0


def seconds_since_start() -> float:
    """Wall time since this process was started, imports included."""
    return time.time() - float(psutil.Process().create_time())


def open_run(
    package: str,
    recipe: str,
    *,
    runs_dir: Path,
    name: str = "",
    resume: str = "",
    overwrite: bool = False,
) -> Path:
    """The folder of a run, made where it is new: `runs_dir/package/name`.

    Without a name it is the recipe's and the time. `resume` outranks the other options, because a
    resumed run's stored configuration may still hold the `overwrite` it was started with.

    Raises: InputError where the folder exists and `overwrite` does not say so, or is no run folder
        and so not ours to empty, or cannot be made; MissingFileError where the run to resume is
        not there.
    """
    if resume:
        if (Path(resume) / "config.json").is_file():
            return Path(resume)
        expected, do = "a run folder with config.json", f"look below {runs_dir}"
        raise MissingFileError("--resume", f"'{resume}'", expected, do)
    if name != Path(name).name:
        raise InputError(
            "--name", f"'{name}'", "a plain folder name", "use --runs-dir for the place"
        )
    stem = name or f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = runs_dir / package / stem
    number = 1
    while not name and folder.exists():  # two starts within one second
        number += 1
        folder = folder.with_name(f"{stem}-{number}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            do = f"use --resume {folder} to go on or --overwrite to start over"
            raise InputError("--name", f"'{name}', which exists as {folder}", "a new name", do)
        if folder.is_symlink() or not (folder / "config.json").is_file():
            got = f"{folder}, which holds no config.json of its own"
            raise InputError("--overwrite", got, "a run folder", "choose another --name")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{folder} ({error.strerror})"
        raise InputError("--runs-dir", got, "a place to write", "choose another") from error
    return folder


class RunLog:
    """Writes `metrics.jsonl` and `tensorboard/`, and tells the terminal how far the work is."""

    def __init__(self, folder: Path, *, is_writer: bool = True, resume_step: int = -1) -> None:
        """Open the files.

        With `resume_step` >= 0 what was logged after that step is dropped, since the resumed run
        writes it again; `seconds` goes on from the last line that stays.
        """
        self.folder = folder
        self.is_writer = is_writer
        self.console = Console()
        if not is_writer:
            return
        rows = [row for row in read_metrics(folder) if not 0 <= resume_step < row["step"]]
        self._started = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)
        path = folder / "metrics.jsonl"
        # Written anew: a line cut off by a kill would swallow the next one.
        write_text("".join(json.dumps(row) + "\n" for row in rows), path)
        self._file = path.open("a")
        purge_step = resume_step + 1 if resume_step >= 0 else None
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Append one line: step, epoch, seconds since the run's start, and the values.

        NaN and infinities become null in `metrics.jsonl`, since JSON has neither.
        """
        if not self.is_writer:
            return
        row = {"step": step, "epoch": epoch, "seconds": time.perf_counter() - self._started}
        row |= {name: float(value) for name, value in values.items()}
        self._file.write(_json(row) + "\n")
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
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            disable=not (self.is_writer and self.console.is_interactive),
            speed_estimate_period=ESTIMATE_SECONDS,
            get_time=time.perf_counter,
        )
        bar.add_task(what, total=total, completed=start, note="")
        try:
            with bar:
                yield Ticker(self, bar)
        finally:
            if self.is_writer:
                self._board.flush()  # after an interrupt nobody may call close()

    def close(self) -> None:
        """Flush and close the files."""
        if self.is_writer:
            self._file.close()
            self._board.close()


class Ticker:
    """Counts finished steps; where no bar is drawn it prints a line now and then."""

    def __init__(self, log: RunLog, bar: Progress) -> None:
        """`bar` has one task, which is counted also where the bar is not shown."""
        self._log, self._bar = log, bar
        self._told = -math.inf  # the first step gets a line: a sign of life

    def tick(self, note: str = "") -> None:
        """One more step is done; `note` is shown beside it."""
        task = self._bar.tasks[0]
        self._bar.update(task.id, advance=1, note=note)
        now = time.perf_counter()
        if not self._bar.disable or (now - self._told < PLAIN_LINE_SECONDS and not task.finished):
            return
        self._told = now
        left = "?" if task.time_remaining is None else timedelta(seconds=task.time_remaining)
        line = f"{task.description} {task.completed}/{task.total}  left {left}  {note}"
        self._log.say(line.rstrip())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, none where there is no file; one cut off by a kill is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def plot_curves(folder: Path, groups: Mapping[str, list[str]]) -> Path:
    """Draw `curves.png`: one panel per group of metric names, over the step.

    Args:
        folder: run folder with `metrics.jsonl`.
        groups: panel title -> names of the series; names without values are left out.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once at the end

    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in read_metrics(folder):
        for name, value in row.items():
            if value is not None:
                series[name].append((row["step"], value))
    panels = {title: [n for n in names if n in series] for title, names in groups.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(5 * max(len(panels), 1), 3.6), layout="constrained")
    for i, (title, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), i)
        for name in names:
            points = series[name]
            axes.plot(*zip(*points, strict=True), label=name, marker="." * (len(points) < 40))
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, adding the command and the seconds since the process was started.

    NaN and infinities become null.
    """
    full = {**result, "command": sys.argv, "seconds": round(seconds_since_start(), 3)}
    write_text(_json(full, indent=2) + "\n", folder / "result.json")


def _json(value: Any, indent: int | None = None) -> str:
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, indent=indent)
