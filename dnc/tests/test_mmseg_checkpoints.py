"""Checkpoints that open weights-only, and files that do not."""

import pickle
import re
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from dnc.mmseg import checkpoints
from dnc.mmseg.checkpoints import PlainCheckpointHook, from_plain, to_plain
from shared_utils.errors import InputError, MissingFileError


class Strange:
    """Something of no plain type."""


def state() -> dict[str, Any]:
    history = HistoryBuffer([1.5, 2.5, 4.0], [1, 1, 1], 10)
    return {
        "meta": {"iter": 3, "best": np.float64(0.5), "classes": ("a", "b"), "seed": np.int64(4)},
        "state_dict": OrderedDict(weight=torch.ones(2)),
        "message_hub": {
            "log_scalars": OrderedDict({"train/loss": history}),
            "resumed_keys": OrderedDict({"train/loss": True}),
            "runtime_info": {"kept": deque([1, 2]), "table": np.arange(3.0), "at": Path("a/b")},
        },
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    }


def test_what_is_saved_opens_weights_only_and_comes_back(tmp_path: Path) -> None:
    before, saved = state(), state()
    hook = PlainCheckpointHook()
    torch.save(saved, tmp_path / "as_it_was.pth")
    hook.before_save_checkpoint(None, saved)
    torch.save(saved, tmp_path / "plain.pth")
    loaded = torch.load(tmp_path / "plain.pth", weights_only=True)
    hook.after_load_checkpoint(None, loaded)
    history = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(history, HistoryBuffer)
    assert [part.tolist() for part in history.data] == [[1.5, 2.5, 4.0], [1, 1, 1]]
    assert (history.max_length, history.mean()) == (10, pytest.approx(8 / 3))
    assert loaded["meta"] == before["meta"]
    assert isinstance(loaded["message_hub"]["log_scalars"], OrderedDict)
    info = loaded["message_hub"]["runtime_info"]
    assert (info["kept"], info["at"]) == ([1, 2], "a/b")
    assert np.array_equal(info["table"], np.arange(3.0))
    assert torch.equal(loaded["state_dict"]["weight"], torch.ones(2))
    assert loaded["optimizer"]["param_groups"] == [{"lr": 0.1}]
    with pytest.raises(InputError, match=r"as_it_was\.pth: got more than tensors and plain data"):
        checkpoints.load(tmp_path / "as_it_was.pth")


def test_what_cannot_be_plain_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(checkpoints, "print_log", lambda text, logger: told.append(text))
    assert to_plain({"a": [Strange(), 1]}, "meta") == {"a": [None, 1]}
    assert [line.partition(":")[0] for line in told] == ["meta.a[0] is not saved"]


def test_plain_data_stays_as_it_is() -> None:
    value = {"a": (1, [2.0, None]), "b": {3: "x"}, "c": True}
    assert from_plain(to_plain(value)) == value


def test_a_foreign_file_is_refused_by_name_unless_it_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pth"
    torch.save({"state_dict": {"w": torch.ones(1)}, "other": Strange()}, path)
    told = re.escape(
        f"{path}: got more than tensors and plain data, which can run code when it is opened, "
        "expected a checkpoint that opens weights-only; if you trust its source, give --trusted "
        "(in a config: load_from='trusted:PATH')"
    )
    with pytest.raises(InputError, match=told):
        checkpoints.load(path)
    assert isinstance(checkpoints.load(path, trusted=True)["other"], Strange)
    loaded = CheckpointLoader.load_checkpoint(f"trusted:{path}", map_location="cpu")
    assert torch.equal(checkpoints.state_dict_of(loaded)["w"], torch.ones(1))


def test_what_is_no_checkpoint_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"gone\.pth: got no such file"):
        checkpoints.load(tmp_path / "gone.pth")
    (tmp_path / "text.pth").write_text("hello, this is no checkpoint")
    with pytest.raises(InputError, match=r"text\.pth: got a damaged or unreadable file"):
        checkpoints.load(tmp_path / "text.pth")
    torch.save({"state_dict": {"w": torch.randn(1000)}}, tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.pth: got a damaged or unreadable file"):
        checkpoints.load(tmp_path / "cut.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(InputError, match=r"list\.pth: got list, expected a dict"):
        checkpoints.load(tmp_path / "list.pth")


def test_weights_are_found_below_either_name() -> None:
    weight = torch.ones(1)
    for found in ({"state_dict": {"w": weight}}, {"model": {"w": weight}}, {"w": weight, "n": 1}):
        assert list(checkpoints.state_dict_of(found)) == ["w"]


def test_weights_only_stays_the_default(tmp_path: Path) -> None:
    torch.save(Strange(), tmp_path / "strange.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "strange.pth")
