"""`e2vpt pretrain`: spoilt losses and weights, models and data that do not fit."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from e2vpt import pretrain as module
from e2vpt.cli import main
from e2vpt.pretrain import pretrain
from shared_utils import checkpoint
from shared_utils.errors import InputError, Interrupted

from .pretrain_runs import CLASSES, again, call_at, config, rows, stop, write_packed, write_set


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(autouse=True)
def _log_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_EVERY", 1)


def test_a_loss_that_is_no_number(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, images)
    folder = tmp_path / "e2vpt" / "run"
    real = module.train_step

    def ruined(*args: Any) -> float:
        loss = real(*args)
        return loss if len(rows(folder)) < 6 else float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", ruined)
        match = (
            rf"^loss_ce: got nan at step 5, expected .*; lower --optim\.lr .* --resume {folder}$"
        )
        with pytest.raises(InputError, match=match):
            pretrain(cfg)
    state = checkpoint.load(folder / "last.ckpt")
    assert state["step"] == 4
    assert all(bool(torch.isfinite(t).all()) for t in state["model"].values())
    again(cfg, folder)


def test_ruined_weights_are_not_saved(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.evaluate
    calls = []

    def ruin(fabric: Any, model: Any, *args: Any) -> dict[str, float]:
        scores = real(fabric, model, *args)
        calls.append(1)
        if len(calls) == 2:
            run.network.head.weight.data[0, 0] = float("inf")
        return scores

    made = module._Pretraining.__init__

    def keep(self: Any, *args: Any) -> None:
        nonlocal run
        made(self, *args)
        run = self

    run: Any = None
    monkeypatch.setattr(module._Pretraining, "__init__", keep)
    monkeypatch.setattr(module, "evaluate", ruin)
    with pytest.raises(InputError, match=r"^head\.weight: got nan or inf after step 8, expected"):
        pretrain(config(tmp_path, images))
    assert checkpoint.load(tmp_path / "e2vpt" / "run" / "last.ckpt")["step"] == 4


@pytest.mark.parametrize(
    ("model", "message"),
    [({"embed_dim": 128}, "size mismatch"), ({"depth": 3}, "Missing key")],
)
def test_resume_of_another_model_is_refused(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, int],
    message: str,
) -> None:
    cfg = config(tmp_path, images)
    folder = tmp_path / "e2vpt" / "run"
    with monkeypatch.context() as patch:
        call_at(patch, "train_step", 3, stop)
        with pytest.raises(Interrupted):
            pretrain(cfg)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"^--resume: got a model that does not fit .*"):
        again(replace(cfg, model=replace(cfg.model, **model)), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def other_classes(folder: Path) -> None:
    write_packed(folder / "val.npz", count=20, classes=("ant", "bee", "cat", "emu"))


def other_size(folder: Path) -> None:
    write_packed(folder / "train.npz", side=28)


def val_of_other_size(folder: Path) -> None:
    write_packed(folder / "val.npz", count=20, side=28)


def corrupt(folder: Path) -> None:
    with np.load(folder / "train.npz") as archive:
        arrays = dict(archive)
    arrays["jpeg"] = arrays["jpeg"].copy()
    arrays["jpeg"][arrays["offsets"][5] :][:200] = 0
    np.savez(folder / "train.npz", **arrays)


def no_images(folder: Path) -> None:
    np.savez(
        folder / "val.npz",
        jpeg=np.zeros(0, np.uint8), offsets=[0], label=np.zeros(0, int), classes=CLASSES,
    )  # fmt: skip


def few(folder: Path) -> None:
    write_packed(folder / "train.npz", count=12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_classes,
            r"^error: data\.val: got class names that differ from those of data\.train",
        ),
        (other_size, r"^error: data\.train: got images of \(28, 28\), expected 32x32"),
        (val_of_other_size, r"^error: data\.val: got images of \(28, 28\), expected 32x32"),
        (corrupt, r"^error: image '.*train\.npz image 5': got "),
        (no_images, r"^error: data\.val: got no images in '.*val\.npz', expected some"),
        (few, r"^error: data\.batch_size: got 16, expected at most 12, the number of training"),
    ],
)
def test_wrong_data_is_one_line_and_no_run(
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "set"
    write_packed(folder / "train.npz")
    write_packed(folder / "val.npz", count=20)
    change(folder)
    argv = ["pretrain", "tiny-imagenet-32", "--runs-dir", str(tmp_path / "runs")]
    argv += ["--data.train", str(folder / "train.npz"), "--data.val", str(folder / "val.npz")]
    assert main([*argv, "--data.batch-size", "16", "--accelerator", "cpu"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
