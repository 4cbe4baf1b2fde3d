"""The run folder and what is written into it: metrics, TensorBoard, progress, curves, the result.

Only the writer (process 0) touches files and the terminal: in the others every call of a `RunLog`
does nothing, and the functions are not to be called.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch.utils.tensorboard import SummaryWriter

from shared_utils.checkpoint import reading, write_text
from shared_utils.errors import InputError

PLAIN_LINE_SECONDS = 10.0
ESTIMATE_SECONDS = 300.0  # the time left is judged by these last ones; the first steps are slow


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

    Without a name it is the recipe's and the time. `resume` outranks the other options: a run's
    stored configuration may still hold the `overwrite` that it was started with.

    Raises: InputError where the folder exists and `overwrite` does not say so, is no run folder, or
        cannot be made; MissingFileError where the run to resume is not there.
    """
    if resume:
        with reading(Path(resume), "a run folder with config.json"):
            (Path(resume) / "config.json").stat()
        return Path(resume)
    if name != Path(name).name or name == "..":
        raise InputError("--name", name, "a plain name", "use --runs-dir for the place")
    folder = runs_dir / package / (name or f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}")
    while not name and folder.exists():  # two starts within one second
        folder = folder.with_name(f"{folder.name}-2")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            if not overwrite:
                do = f"use --resume {folder} to go on or --overwrite to start over"
                raise InputError("--name", f"{name}, which exists as {folder}", "a new name", do)
            if not (folder / "config.json").is_file():
                got, do = f"{folder}, which holds no config.json", "choose another --name"
                raise InputError("--overwrite", got, "a run folder", do)
            shutil.rmtree(folder)
            folder.mkdir()
    except OSError as error:
        raise InputError("--runs-dir", error, "a folder to write", "choose another one") from error
    return folder


class RunLog:
    """Writes `metrics.jsonl` and `tensorboard/`, and tells the terminal how far the work is."""

    def __init__(self, folder: Path, *, is_writer: bool = True, resume_step: int = -1) -> None:
        """Open the files.

        With `resume_step` >= 0 what was logged after that step is dropped, since the resumed run
        writes it again; `seconds` goes on from the last line that stays.
        """
        self.is_writer = is_writer
        self.console = Console(quiet=not is_writer)
        if is_writer:
            rows = [row for row in read_metrics(folder) if not 0 <= resume_step < row["step"]]
            self._started = time.perf_counter() - (rows[-1]["seconds"] if rows else 0)
            # Written anew: a line cut off by a kill would swallow the next one.
            path = folder / "metrics.jsonl"
            write_text("".join(json.dumps(row) + "\n" for row in rows), path)
            self._file = path.open("a")
            purge_step = resume_step + 1 if resume_step >= 0 else None
            self._board = SummaryWriter(folder / "tensorboard", purge_step=purge_step, flush_secs=9)

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Append step, epoch, seconds since the run's start and the values; NaN becomes null."""
        if self.is_writer:
            row = {"step": step, "epoch": epoch, "seconds": time.perf_counter() - self._started}
            finite = {name: float(v) for name, v in values.items() if math.isfinite(v)}
            self._file.write(json.dumps(row | dict.fromkeys(values) | finite) + "\n")
            self._file.flush()
            for name, value in finite.items():
                self._board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """One line for the person at the terminal."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, what: str, total: int, start: int = 0) -> Iterator["Ticker"]:
        """Show progress with an estimate of the time left while the body runs."""
        with Progress(
            console=self.console,
            disable=not (self.is_writer and self.console.is_interactive),
            speed_estimate_period=ESTIMATE_SECONDS,
            get_time=time.perf_counter,
        ) as bar:
            bar.add_task(escape(what), total=total, completed=start)
            yield Ticker(self, bar, what)

    def close(self) -> None:
        """Flush and close the files."""
        if self.is_writer:
            self._file.close()
            self._board.close()


@dataclasses.dataclass
class Ticker:
    """Counts finished steps; where no bar is drawn it prints a line now and then."""

    log: RunLog
    bar: Progress  # with one task, counted also where the bar is not drawn
    what: str
    told: float = -math.inf  # when a line was printed; the first step gets one, a sign of life

    def tick(self, note: str = "") -> None:
        """One more step is done; `note` is shown beside it."""
        task, now = self.bar.tasks[0], time.perf_counter()
        said = f"{self.what} {task.completed + 1}/{task.total}  {note}".rstrip()
        self.bar.update(task.id, advance=1, description=escape(said))
        if self.bar.disable and (task.finished or now - self.told >= PLAIN_LINE_SECONDS):
            self.told = now
            left = "?" if task.time_remaining is None else timedelta(seconds=task.time_remaining)
            self.log.say(f"{said}  left {left}")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, none without the file; what a kill cut off is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def plot_curves(folder: Path, groups: Mapping[str, list[str]]) -> Path:
    """Draw `curves.png` over the step: a panel per group, its title -> the names drawn in it."""
    from matplotlib.figure import Figure  # slow to import, and needed once at the end

    rows = read_metrics(folder)
    figure = Figure(figsize=(5 * len(groups), 3.6), layout="constrained")
    for i, (title, names) in enumerate(groups.items(), 1):
        axes = figure.add_subplot(1, len(groups), i, title=title, xlabel="step")
        axes.grid(alpha=0.3)
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." * (len(points) < 40))
                axes.legend()
    figure.savefig(folder / "curves.png", dpi=110)
    return folder / "curves.png"


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, adding command and `seconds_since_start`; NaN becomes null."""
    full = {**result, "command": sys.argv, "seconds": round(seconds_since_start(), 3)}
    finite = json.loads(json.dumps(full), parse_constant=lambda constant: None)
    write_text(json.dumps(finite, indent=2) + "\n", folder / "result.json")
