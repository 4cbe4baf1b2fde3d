"""Stopping a long command: Ctrl-C and SIGTERM, at a moment when nothing is half done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM stop the body as Ctrl-C does, by KeyboardInterrupt.

    Ctrl-C works in it even where the command was started with it ignored, as shells start jobs in
    the background. Outside the main thread, which alone gets signals, it changes nothing.
    """
    with _handled_by(signal.default_int_handler):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the body is done; then KeyboardInterrupt is raised."""
    held: list[int] = []
    with _handled_by(lambda number, frame: held.append(number)):
        yield
    if held:
        raise KeyboardInterrupt


@contextmanager
def _handled_by(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            # None: a handler that was not set from Python, and so cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if old is None else old)
