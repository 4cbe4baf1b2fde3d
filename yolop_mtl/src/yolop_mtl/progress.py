"""Progress of long work outside a run folder: a bar on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
PLAIN_LINE_SECONDS = 10.0


def show_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield the items while showing how many of `total` are done and how long the rest takes."""
    console = Console()
    start, told = time.perf_counter(), -math.inf
    with Progress(console=console, disable=not console.is_interactive) as bar:
        task = bar.add_task(what, total=total)
        for done, item in enumerate(items, 1):
            yield item
            bar.advance(task)
            now = time.perf_counter()
            if bar.disable and (done == total or now - told >= PLAIN_LINE_SECONDS):
                told = now
                left = (now - start) / done * (total - done)
                text = f"{what} {done}/{total}, {left:.0f} s left"
                console.print(text, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the person at the terminal."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


class Meter:
    """Shows how many images are done and how many in a second, also where no one knows how many.

    Attributes:
        done: images.
    """

    def __init__(self, what: str, total: int | None) -> None:
        """Begin; `total` is None where the end is not known."""
        self.done = 0
        self._what, self._total = what, total
        self._console = Console()
        self._start = time.perf_counter()
        self._told = -math.inf
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        is_plain = not self._console.is_interactive
        self._bar = Progress(*columns, console=self._console, disable=is_plain)
        self._task = self._bar.add_task(what, total=total, rate="")
        self._bar.start()

    @property
    def rate(self) -> float:
        """Images per second, since the beginning."""
        return self.done / max(time.perf_counter() - self._start, 1e-9)

    def tick(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        of = "" if self._total is None else f"/{self._total}"
        text = f"{self._what} {self.done}{of}, {self.rate:.1f} images/s"
        self._bar.update(self._task, completed=self.done, rate=text.partition(", ")[2])
        now = time.perf_counter()
        if self._bar.disable and (
            self.done == self._total or now - self._told >= PLAIN_LINE_SECONDS
        ):
            self._told = now
            left = "" if self._total is None else f", {self._left():.0f} s left"
            self.say(text + left)

    def say(self, text: str) -> None:
        """A line for the person at the terminal, above the bar."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def _left(self) -> float:
        return max(0, (self._total or 0) - self.done) / max(self.rate, 1e-9)
