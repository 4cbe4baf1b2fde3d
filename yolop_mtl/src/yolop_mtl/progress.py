"""Progress of long work outside a run folder: a bar on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

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
