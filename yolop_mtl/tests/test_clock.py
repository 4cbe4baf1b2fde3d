"""Times of parts: what belongs to which, and which batch is left out."""

import pytest

from yolop_mtl import clock
from yolop_mtl.clock import Clock


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Readings that the clock gives one after another."""
    readings: list[float] = []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: readings.pop(0))
    return readings


def test_the_first_batch_is_left_out_where_there_is_another(ticks: list[float]) -> None:
    ticks += [0.0, 5.0, 9.0, 10.0, 10.5, 11.0, 11.25]
    watch = Clock("cpu")
    assert watch.ms_per_image == {}
    watch.lap("load")
    watch.lap("network")
    watch.end_batch(4)
    assert watch.ms_per_image == {"load": 1250, "network": 1000}
    watch.lap("load")
    watch.lap("network")
    watch.end_batch(4)
    assert watch.ms_per_image == {"load": 250, "network": 125}
    watch.lap("load")
    watch.lap("counting")  # a part that the first batch did not have
    watch.end_batch(1)
    assert watch.ms_per_image == {"load": 300, "network": 100, "counting": 50}
