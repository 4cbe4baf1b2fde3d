"""Work done beside the network: an iterator that runs ahead of it, a consumer that follows it.

Both are threads with short queues, so memory stays bounded, and both pass on what goes wrong: an
error of the one that runs ahead comes where its items are taken, one of the consumer where items
are given to it. Neither waits for ever for a thread that has stopped.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

T = TypeVar("T")
PATIENCE = 0.1  # seconds between two looks at whether the other side has stopped
FAREWELL = 2.0  # seconds that a reader may take to end, e.g. inside of a network library


class Ahead(Generic[T]):
    """Takes items of an iterator in a thread, some before they are asked for.

    Attributes:
        dropped: items that a live source gave and nobody had time for.
    """

    def __init__(self, make: Callable[[], Iterator[T]], *, depth: int, is_live: bool) -> None:
        """Start.

        Args:
            make: gives the iterator, in the thread.
            depth: items that wait at most.
            is_live: drop the oldest one that waits rather than let the source wait.
        """
        self.dropped = 0
        self._make, self._is_live = make, is_live
        self._queue: Queue[T] = Queue(depth)
        self._stop, self._done = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="reader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        """Items in order; raises what the iterator raised once those before it are taken."""
        while True:
            try:
                yield self._queue.get(timeout=PATIENCE)
            except Empty:
                # Nothing is put after `_done`: what came between the two looks is still taken.
                if self._done.is_set() and self._queue.empty():
                    break
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop; a thread that waits for a device or a network is left behind."""
        self._stop.set()
        self._thread.join(FAREWELL)

    def _work(self) -> None:
        try:
            items = self._make()
            for item in items:
                self._put(item)
                if self._stop.is_set():
                    break
        except BaseException as error:  # also KeyboardInterrupt: the other side raises it
            self._error = error
        finally:
            self._done.set()

    def _put(self, item: T) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0 if self._is_live else PATIENCE)
            except Full:
                if self._is_live:
                    with suppress(Empty):  # taken in the meantime
                        self._queue.get_nowait()
                        self.dropped += 1
            else:
                return


class Behind(Generic[T]):
    """Works on items in a thread, in the order in which they come."""

    def __init__(self, work: Callable[[T], None], *, depth: int) -> None:
        """Start; `depth` items wait at most."""
        self._work = work
        self._queue: Queue[tuple[T] | None] = Queue(depth)
        self._error: BaseException | None = None
        self._is_told = False  # raised once; nothing is worked on after it all the same
        self._thread = threading.Thread(target=self._consume, name="writer", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Hand over an item; waits while too many do. Raises: what the work raised."""
        self._check()
        self._queue.put((item,))  # always taken, even after an error

    def close(self) -> None:
        """Wait until all is done, whatever is pressed meanwhile. Raises: what the work raised."""
        is_last = False
        while self._thread.is_alive():
            # A second Ctrl-C must not cut off the end of a video.
            with suppress(KeyboardInterrupt):
                if not is_last:
                    self._queue.put(None)
                    is_last = True
                self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._error is not None and not self._is_told:
            self._is_told = True
            raise self._error

    def _consume(self) -> None:
        while (entry := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._work(entry[0])
                except BaseException as error:  # the other side raises it
                    self._error = error
