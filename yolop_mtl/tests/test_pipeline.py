"""Threads beside the network: order, bounds, errors, and that nobody waits for ever."""

import threading
import time
from collections.abc import Iterator

import pytest

from yolop_mtl.pipeline import Ahead, Behind


def put_all(behind: Behind[int], count: int) -> None:
    for number in range(count):
        behind.put(number)


def count_to(number: int) -> Iterator[int]:
    yield from range(number)


def test_items_come_in_order_and_few_wait() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    ahead = Ahead(make, depth=3, is_live=False)
    found = []
    for item in ahead:
        found.append(item)
        assert len(made) <= len(found) + 5
    assert found == list(range(50))
    assert ahead.dropped == 0
    ahead.close()


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_an_error_comes_after_the_items_before_it(error: BaseException) -> None:
    def make() -> Iterator[int]:
        yield from range(4)
        raise error

    found: list[int] = []
    with pytest.raises(type(error)):
        found.extend(Ahead(make, depth=2, is_live=False))
    assert found == list(range(4))


def test_a_live_source_does_not_wait() -> None:
    is_done = threading.Event()

    def make() -> Iterator[int]:
        yield from range(20)
        is_done.set()

    ahead = Ahead(make, depth=2, is_live=True)
    assert is_done.wait(10)
    found = list(ahead)
    assert found == [18, 19]
    assert ahead.dropped == 18


def test_a_reader_that_is_not_listened_to_ends() -> None:
    ahead = Ahead(lambda: count_to(10**9), depth=1, is_live=False)
    assert next(iter(ahead)) == 0
    ahead.close()
    assert not ahead._thread.is_alive()


def test_work_behind_is_all_done_in_order() -> None:
    found: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.001)
        found.append(item)

    behind = Behind(work, depth=2)
    for number in range(20):
        behind.put(number)
    behind.close()
    assert found == list(range(20))


def test_an_error_behind_reaches_the_one_in_front() -> None:
    found: list[int] = []

    def work(item: int) -> None:
        if item == 3:
            raise OSError("disk")
        found.append(item)

    behind = Behind(work, depth=1)
    with pytest.raises(OSError, match="disk"):
        put_all(behind, 10**6)
    behind.put(9)
    behind.close()
    assert found == [0, 1, 2]
    late = Behind(work, depth=4)
    late.put(3)
    with pytest.raises(OSError, match="disk"):
        late.close()


def test_a_second_interruption_does_not_cut_off_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.01)
        found.append(item)

    behind = Behind(work, depth=8)
    for number in range(8):
        behind.put(number)
    presses = iter([KeyboardInterrupt, KeyboardInterrupt])
    join = behind._thread.join

    def interrupted(timeout: float | None = None) -> None:
        press = next(presses, None)
        if press is not None:
            raise press
        join(timeout)

    monkeypatch.setattr(behind._thread, "join", interrupted)
    behind.close()
    assert found == list(range(8))
    assert not behind._thread.is_alive()
