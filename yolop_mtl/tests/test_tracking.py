"""Numbers of vehicles."""

import sys

import numpy as np
import pytest

from shared_utils.errors import InputError
from yolop_mtl.result import Result
from yolop_mtl.tracking import Tracker


def result(*boxes: tuple[float, float, float, float], scores: tuple[float, ...] = ()) -> Result:
    return Result(
        image=np.zeros((100, 300, 3), dtype=np.uint8),
        class_names=("vehicle",),
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.array(scores or [0.9] * len(boxes), dtype=np.float32),
        labels=np.zeros(len(boxes), dtype=np.int64),
    )


def test_numbers_stay_with_vehicles_whatever_the_order() -> None:
    pytest.importorskip("trackers")
    tracker = Tracker(rate=10, conf=0.3)
    seen: list[tuple[int, int]] = []
    for step in range(12):
        one = (20.0 + 4 * step, 40, 60 + 4 * step, 70)
        other = (250.0 - 4 * step, 40, 290 - 4 * step, 70)
        weak = (5.0, 5, 20, 20)
        boxes = (one, other, weak) if step % 2 else (other, one, weak)
        found = tracker.update(result(*boxes, scores=(0.9, 0.8, 0.31)))
        assert found.track_ids is not None
        first, second, third = found.track_ids.tolist()
        assert third == 0
        seen.append((first, second) if step % 2 else (second, first))
        assert found.to_dict()["track_ids"] == found.track_ids.tolist()
    # A track is sure of itself from its second or third frame on.
    assert set(seen[3:]) == {seen[3]}
    assert 0 < min(seen[3])
    assert seen[3][0] != seen[3][1]


def test_frames_without_vehicles() -> None:
    pytest.importorskip("trackers")
    tracker = Tracker(rate=10, conf=0.3)
    for _ in range(3):
        found = tracker.update(result())
        assert found.track_ids is not None
        assert found.track_ids.shape == (0,)
    ids = [tracker.update(result((10, 10, 50, 50))).track_ids for _ in range(3)]
    assert ids[-1].tolist() == [1]
    assert tracker.update(result()).track_ids.shape == (0,)
    assert tracker.update(result((10, 10, 50, 50))).track_ids.tolist() == [1]


@pytest.mark.parametrize("missing", ["supervision", "trackers"])
def test_without_the_libraries(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    message = r"track: got no .*, expected supervision and trackers; run: uv pip install sup"
    with pytest.raises(InputError, match=message):
        Tracker(rate=30, conf=0.3)
