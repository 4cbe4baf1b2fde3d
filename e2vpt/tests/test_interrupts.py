"""Signals end a command where it says so, and nowhere else."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from e2vpt.interrupts import SIGNALS, stoppable, uninterrupted


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler])
@pytest.mark.parametrize("number", SIGNALS)
def test_both_signals_interrupt_and_the_handlers_come_back(
    number: signal.Signals, before: Any
) -> None:
    signal.signal(number, before)
    with pytest.raises(KeyboardInterrupt), stoppable():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_the_body(number: signal.Signals) -> None:
    done = []

    def body() -> None:
        with uninterrupted():
            os.kill(os.getpid(), number)
            done.append("all of it")

    with stoppable(), pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["all of it"]
    with stoppable():
        with uninterrupted():
            done.append("again")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_an_error_outranks_a_signal_that_waits() -> None:
    def body() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        body()


def test_other_threads_are_let_through() -> None:
    done = []

    def body() -> None:
        with stoppable(), uninterrupted():
            done.append(True)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert done == [True]
