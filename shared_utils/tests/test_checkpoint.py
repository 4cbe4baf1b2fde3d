import errno
import functools
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shared_utils import checkpoint
from shared_utils.errors import InputError, MissingFileError

OLD = {"weight": torch.arange(6.0), "step": 1}
NEW = {"weight": torch.arange(6.0) * 10, "step": 2}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.ckpt"


@pytest.fixture
def previous(path):
    return path.with_name("last.ckpt.prev")


def same(a, b):
    return a.keys() == b.keys() and torch.equal(a["weight"], b["weight"]) and a["step"] == b["step"]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- round trips


def test_a_whole_training_state_comes_back(path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": checkpoint.rng_state(torch.Generator()),
        "config": {"lr": 0.1, "sizes": [1, 2], "name": None},
        "best": 0.5,
    }
    checkpoint.save(state, path)
    loaded = checkpoint.load(path)
    assert loaded.keys() == state.keys() == torch.load(path, weights_only=True).keys()
    assert loaded["config"] == state["config"]
    assert loaded["best"] == 0.5
    assert torch.equal(loaded["model"]["weight"], model.weight)
    fresh = torch.optim.AdamW(nn.Linear(3, 2).parameters())
    fresh.load_state_dict(loaded["optimizer"])
    moments = [state["exp_avg"] for state in fresh.state.values()]
    expected = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, expected, strict=True))


def test_the_file_before_is_kept_and_nothing_else_lies_around(path, previous):
    checkpoint.save(OLD, path)
    assert names(path.parent) == ["last.ckpt"]
    checkpoint.save(NEW, path)
    assert names(path.parent) == ["last.ckpt", "last.ckpt.prev"]
    assert same(checkpoint.load(path), NEW)
    assert same(checkpoint.load(previous), OLD)
    checkpoint.save(OLD, path)
    assert same(checkpoint.load(previous), NEW)


def test_what_a_kill_left_behind_is_written_over(path, previous):
    checkpoint.save(OLD, path)
    path.with_name(".last.ckpt.tmp").write_bytes(b"half")
    os.link(path, path.with_name(".last.ckpt.old"))
    checkpoint.save(NEW, path)
    assert names(path.parent) == ["last.ckpt", "last.ckpt.prev"]
    assert same(checkpoint.load(path), NEW)
    assert same(checkpoint.load(previous), OLD)


def test_a_file_system_without_hard_links_will_do(path, previous, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(OLD, path)
    checkpoint.save(NEW, path)
    assert same(checkpoint.load(path), NEW)
    assert same(checkpoint.load(previous), OLD)


@pytest.mark.parametrize("value", [np.float64(0.5), np.zeros(2), Path("x"), random.Random(0)])
def test_what_would_not_open_again_is_not_saved(value, path):
    checkpoint.save(OLD, path)
    with pytest.raises(TypeError, match=r"^state: got \[.*\], expected tensors and plain data"):
        checkpoint.save({"value": value}, path)
    assert names(path.parent) == ["last.ckpt"]
    assert same(checkpoint.load(path), OLD)


# --- damaged files


def test_a_file_cut_off_anywhere_is_found(path):
    checkpoint.save(OLD, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"last\.ckpt: got a damaged or unreadable file"):
            checkpoint.load(path)


def test_no_changed_byte_ever_gives_other_values(path):
    checkpoint.save(OLD, path)
    whole = path.read_bytes()
    found = []
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 0xFF]) + whole[index + 1 :])
        try:
            state = checkpoint.load(path)
        except InputError as error:
            found.append(str(error))
        else:  # a byte that nothing reads, such as padding or a date
            assert same(state, OLD), index
    assert len(found) > len(whole) / 2
    assert all(f"{path}: got a damaged or unreadable file" in message for message in found)


def test_a_changed_byte_of_a_tensor_is_found_by_its_checksum(path):
    checkpoint.save(OLD, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(torch.arange(6.0).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"last\.ckpt: got .*checksum"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"x" * 500, pickle.dumps({"step": 1})])
def test_a_file_of_another_kind_is_refused(content, path):
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"last\.ckpt: got a damaged or unreadable file"):
        checkpoint.load(path)


def test_a_checkpoint_that_is_no_dictionary_is_refused(path):
    torch.save(torch.zeros(3), path)
    with pytest.raises(InputError, match=r"last\.ckpt: got "):
        checkpoint.load(path)


def test_a_missing_file_is_named(path):
    with pytest.raises(MissingFileError, match=r"last\.ckpt: got no such file, expected a checkp"):
        checkpoint.load(path)
    with pytest.raises(MissingFileError, match=r"last\.ckpt: got no such file"):
        checkpoint.load_last(path)


class Evil:
    """Its unpickling makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_code_in_a_file_never_runs(path, tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Evil(marker))).close()
    assert marker.exists()  # the trap works
    marker.unlink()
    torch.save({"weight": torch.zeros(2), "evil": Evil(marker)}, path)
    with pytest.raises(InputError, match=r"^\S+last\.ckpt: got more than tensors and plain data, "):
        checkpoint.load(path)
    torch.save({"evil": Evil(marker)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"last\.ckpt: got "):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(InputError, match=r"last\.ckpt: got "):
        checkpoint.load(path)
    with pytest.raises(TypeError, match="state: got "):
        checkpoint.save({"evil": Evil(marker)}, path)
    assert not marker.exists()


# --- resuming


def test_a_good_last_checkpoint_gives_no_warning(path):
    checkpoint.save(OLD, path)
    checkpoint.save(NEW, path)
    state, warning = checkpoint.load_last(path)
    assert same(state, NEW)
    assert warning == ""


@pytest.mark.parametrize("damage", ["cut off", "changed", "gone", "with code"])
def test_the_checkpoint_before_is_used_with_a_warning_by_name(damage, path, tmp_path):
    checkpoint.save(OLD, path)
    checkpoint.save(NEW, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index((torch.arange(6.0) * 10).numpy().tobytes())] ^= 1
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "changed":
        path.write_bytes(whole)
    elif damage == "gone":
        path.unlink()
    else:
        torch.save({"evil": Evil(tmp_path / "marker")}, path)
    state, warning = checkpoint.load_last(path)
    assert same(state, OLD)
    assert warning.startswith(f"{path}: got ")
    assert warning.endswith("; going on from last.ckpt.prev")
    assert "\n" not in warning
    assert not (tmp_path / "marker").exists()


def test_where_both_are_damaged_the_newer_one_is_named(path, previous):
    path.write_bytes(b"x")
    previous.write_bytes(b"x")
    with pytest.raises(InputError, match=r"last\.ckpt: got "):
        checkpoint.load_last(path)


# --- kills and full disks


class Killed(BaseException):
    pass


def stop_at(monkeypatch, count, error):
    """Let the `count`-th call of the system raise `error`; all later ones too if it is a kill."""
    calls = []

    def stopping(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == count or (len(calls) > count and isinstance(error, Killed)):
                raise error
            return function(*args, **kwargs)

        return call

    for name in ("open", "fsync", "link", "replace", "close", "unlink"):
        monkeypatch.setattr(os, name, stopping(name, getattr(os, name)))
    monkeypatch.setattr(shutil, "copyfile", stopping("copyfile", shutil.copyfile))
    monkeypatch.setattr(checkpoint, "open", stopping("open", open), raising=False)
    return calls


@pytest.mark.parametrize("damaged", ["nothing", "last", "previous"])
@pytest.mark.parametrize("has_links", [True, False])
def test_a_kill_between_any_two_steps_leaves_a_good_file(damaged, has_links, path, previous):
    seen = set()
    for count in range(1, 40):
        for file in path.parent.iterdir():
            file.unlink()
        checkpoint.save(OLD, path)
        checkpoint.save(OLD, path)
        if damaged != "nothing":
            (path if damaged == "last" else previous).write_bytes(b"damaged")
        with pytest.MonkeyPatch.context() as patch:
            if not has_links:
                patch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM)))
            calls = stop_at(patch, count, Killed())
            try:
                checkpoint.save(NEW, path)
                done = True
            except Killed:
                done = False
        state, _ = checkpoint.load_last(path)
        assert same(state, OLD) or same(state, NEW), (count, calls)
        seen.add(state["step"])
        if done:
            break
    assert done
    assert count > 8
    assert seen == {1, 2}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_any_step_leaves_a_good_file(number, path, previous):
    for count in range(1, 40):
        for file in path.parent.iterdir():
            file.unlink()
        checkpoint.save({**OLD, "step": 0}, path)
        checkpoint.save(OLD, path)
        with pytest.MonkeyPatch.context() as patch:
            calls = stop_at(patch, count, OSError(number, os.strerror(number)))
            try:
                checkpoint.save(NEW, path)
            except OSError:
                assert calls[count - 1] == "unlink"  # while clearing up
            except InputError as error:
                assert "last.ckpt: got a full disk, expected room to save" in str(error)  # noqa: PT017
        state, warning = checkpoint.load_last(path)
        assert warning == ""
        assert state["step"] in (1, 2)
        if state["step"] == 1:  # it failed before the new file was in place
            assert checkpoint.load(previous)["step"] == 0
        if len(calls) < count:
            break
    assert count > 8
    assert state["step"] == 2


class FullDisk:
    """A file that takes so many writes and then is full, as /dev/full is from the start."""

    def __init__(self, writes, path, mode):
        self.file, self.writes = open(path, mode), writes

    def write(self, data):
        self.writes -= 1
        if self.writes < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_disk_that_fills_up_during_any_write_leaves_all_as_it_was(path, previous, monkeypatch):
    checkpoint.save({**OLD, "step": 0}, path)
    checkpoint.save(OLD, path)
    before = [p.read_bytes() for p in (path, previous)]
    for writes in range(100):
        with pytest.MonkeyPatch.context() as patch:
            fill = functools.partial(FullDisk, writes)
            patch.setattr(checkpoint, "open", fill, raising=False)
            try:
                checkpoint.save(NEW, path)
                break
            except InputError as error:
                assert "last.ckpt: got a full disk, expected room to save" in str(error)  # noqa: PT017
        assert names(path.parent) == ["last.ckpt", "last.ckpt.prev"]
        assert [p.read_bytes() for p in (path, previous)] == before
    assert writes > 5
    assert same(checkpoint.load(path), NEW)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("size", [6, 1_000_000])
def test_a_really_full_device_gives_the_same_line(size, path, previous, monkeypatch):
    checkpoint.save(OLD, path)
    full = functools.partial(lambda opened, file, mode: opened("/dev/full", mode), open)
    monkeypatch.setattr(checkpoint, "open", full, raising=False)
    big = {"weight": torch.zeros(size)}
    with pytest.raises(InputError, match=r"last\.ckpt: got a full disk, expected room to save; fr"):
        checkpoint.save(big, path)
    with pytest.raises(InputError, match=r"w\.safetensors: got a full disk"):
        checkpoint.save_weights(big, path.with_name("w.safetensors"), {})
    with pytest.raises(InputError, match=r"x\.json: got a full disk"):
        checkpoint.write_text("x", path.with_name("x.json"))
    assert names(path.parent) == ["last.ckpt"]
    assert same(checkpoint.load(path), OLD)


def test_another_error_of_the_system_is_not_called_a_full_disk(path):
    with pytest.raises(FileNotFoundError):
        checkpoint.save(OLD, path.parent / "absent" / "last.ckpt")


# --- weights and text


def test_weights_come_back_with_their_metadata_even_where_they_share_memory(tmp_path):
    path = tmp_path / "w.safetensors"
    weight = torch.arange(6.0).view(2, 3)
    tensors = {"a": weight, "b": weight, "t": weight.T, "half": weight.half()}
    checkpoint.save_weights(tensors, path, {"format": "pt"})
    loaded, metadata = checkpoint.load_weights(path)
    assert metadata == {"format": "pt"}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert loaded["half"].dtype == torch.float16
    assert names(tmp_path) == ["w.safetensors"]


def test_damaged_weights_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(
        MissingFileError, match=r"w\.safetensors: got no such file, expected a .saf"
    ):
        checkpoint.load_weights(path)
    checkpoint.save_weights({"a": torch.zeros(9)}, path, {})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"w\.safetensors: got a damaged or unreadable file"):
            checkpoint.load_weights(path)


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    checkpoint.write_text("first ä\n", path)
    assert path.read_text(encoding="utf-8") == "first ä\n"

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=r"result\.json: got a full disk"):
        checkpoint.write_text("second\n", path)
    assert path.read_text(encoding="utf-8") == "first ä\n"
    assert names(tmp_path) == ["result.json"]


# --- random numbers


def draws(loader):
    numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal()]
    return [*numbers, float(torch.rand(())), int(torch.randint(2**31, (), generator=loader))]


def test_the_random_state_gives_the_same_next_numbers_after_a_save(path):
    loader = torch.Generator().manual_seed(3)
    draws(loader)  # leaves half a pair of normal numbers in Python and NumPy
    checkpoint.save({"rng": checkpoint.rng_state(loader)}, path)
    expected = draws(loader)
    fresh = torch.Generator()
    draws(fresh)
    checkpoint.set_rng_state(checkpoint.load(path)["rng"], fresh)
    assert draws(fresh) == expected


def test_the_random_state_works_without_a_loader():
    state = checkpoint.rng_state()
    assert state["loader"] is None
    expected = random.random()
    loader = torch.Generator().manual_seed(1)
    checkpoint.set_rng_state(state, loader)
    assert random.random() == expected
    assert loader.initial_seed() == 1
    checkpoint.set_rng_state(checkpoint.rng_state(loader))
