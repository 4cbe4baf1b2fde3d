"""Whole training runs: methods, options, interrupts, several processes."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2vpt.cli import main
from e2vpt.train import _Training, train
from shared_utils import checkpoint
from shared_utils.errors import Interrupted

from .train_runs import STEPS, at_step, config, result, resume, rows, stop, weights

DIGITS_TARGET = 0.93  # test top-1 of the recipe `digits` in full

# Tuned parameters on a micro ViT of width 64, depth 2, one head, for 10 classes, counted by hand.
HEAD = 64 * 10 + 10
TUNED = {
    "linear": HEAD,
    "vpt-shallow": HEAD + 4 * 64,
    "vpt-deep": HEAD + 2 * 4 * 64,
    "e2vpt": HEAD + 2 * 4 * 64 + 2 * 1 * 2 * 64,
    # batch norms 16 + 32 + 32, last convolution, final norm; norms, qkv, projection, MLP per block
    "bias": HEAD + 80 + 64 + 64 + 2 * (64 + 192 + 64 + 64 + 256 + 64),
    "full": HEAD + 137_104,
}

# ---- methods and options --------------------------------------------------------------------


@pytest.mark.parametrize("method", TUNED)
def test_every_method_trains(
    tmp_path: Path, tiny_backbones: tuple[Path, Path], method: str
) -> None:
    folder = train(config(tmp_path, tiny_backbones[0], method=method, epochs=6))
    counts = result(folder)["parameters"]
    assert counts["tuned"] == TUNED[method]
    added = HEAD if method in ("bias", "full") else TUNED[method]
    assert counts["total"] == 137_104 + added
    assert counts["percent"] == pytest.approx(100 * counts["tuned"] / counts["total"])
    losses = [row["loss_ce"] for row in rows(folder)]
    assert losses[-1] < losses[0] - 0.04
    assert result(folder)["method"] == method


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizers_and_precisions(
    tmp_path: Path, tiny_backbones: tuple[Path, Path], optimizer: str, precision: str
) -> None:
    cfg = config(
        tmp_path,
        tiny_backbones[0],
        optimizer=optimizer,
        lr=0.02 if optimizer == "sgd" else 0.05,
        epochs=5,
        run={"precision": precision},
    )
    folder = train(cfg)
    losses = [row["loss_ce"] for row in rows(folder)]
    assert losses[-1] < losses[0]
    assert result(folder)["precision"] == precision
    assert {t.dtype for t in weights(folder).values()} == {torch.float32}
    state = checkpoint.load(folder / "last.ckpt")["optimizer"]["state"][0]
    assert ("momentum_buffer" in state) == (optimizer == "sgd")
    assert ("exp_avg" in state) == (optimizer == "adamw")


def test_parity_schedule_and_scaled_rate(
    tmp_path: Path, tiny_backbones: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(
        tmp_path,
        tiny_backbones[0],
        optimizer="sgd",
        schedule="per-epoch",
        lr=8.0,
        scale_lr=True,
        epochs=4,
        warmup_epochs=2,
    )
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}

    def keep(into: dict[str, torch.Tensor]) -> Callable[[_Training], None]:
        return lambda run: into.update(
            {n: p.detach().clone() for n, p in run.network.named_parameters() if p.requires_grad}
        )

    with monkeypatch.context() as patch:
        at_step(patch, 0, keep(before))
        at_step(patch, STEPS, keep(after))
        folder = train(cfg)
    peak = 8.0 * 16 / 256
    expected = [0.0, peak / 2, peak, peak / 2 * (1 + math.cos(math.pi / 2))]
    assert [row["lr"] for row in rows(folder)] == pytest.approx(expected)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)  # epoch 0 has rate 0


def test_full_saves_running_statistics_too(
    tmp_path: Path, tiny_backbones: tuple[Path, Path]
) -> None:
    folder = train(config(tmp_path, tiny_backbones[0], method="full"))
    name = "backbone.patch_embed.proj.1.running_mean"
    began = checkpoint.load_weights(tiny_backbones[0])[0]["patch_embed.proj.1.running_mean"]
    assert not torch.equal(weights(folder)[name], began.float())


# ---- interrupts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "before"),
    [
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGINT, signal.SIG_IGN),  # as a shell starts jobs in the background
        (signal.SIGTERM, signal.SIG_DFL),
    ],
)
def test_signals_save_and_print_the_line_that_resumes(
    tmp_path: Path,
    quick: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    before: Any,
) -> None:
    place = tmp_path / "with a space"
    kept = signal.signal(number, before)
    try:
        with monkeypatch.context() as patch:
            at_step(patch, STEPS, lambda run: os.kill(os.getpid(), number))
            argv = ["train", "digits", "--runs-dir", str(place), "--name", "x", *quick]
            assert main(argv) == 130
        assert signal.getsignal(number) is before  # others may have use for it
    finally:
        signal.signal(number, kept)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    folder = place / "e2vpt" / "x"
    assert told.endswith(f"go on with: e2vpt train --resume '{folder}'\n")
    assert checkpoint.load(folder / "last.ckpt")["epoch"] == 1
    assert main(["train", "--resume", str(folder)]) == 0  # the words of that line
    assert [row["epoch"] for row in rows(folder)] == [1, 2]
    assert (folder / "result.json").is_file()


def test_an_interrupt_of_the_final_test_resumes_too(
    tmp_path: Path, tiny_backbones: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, tiny_backbones[0])
    with monkeypatch.context() as patch:
        patch.setattr("e2vpt.train.pictures.confusion", lambda *args: stop(None))
        with pytest.raises(Interrupted, match="--resume"):
            train(cfg)
    folder = tmp_path / "e2vpt" / "run"
    assert not (folder / "result.json").exists()
    resume(cfg, folder)
    assert (folder / "confusion.png").is_file()
    assert (folder / "result.json").is_file()


# ---- long -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # 41 images in batches of 20: one process has two batches of 21 images, the other one of 20.
    options = [*quick, "--data.limit", "41", "--data.batch-size", "20", "--precision", "32-true"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["train", "digits", "--runs-dir", str(tmp_path), "--name", "two", *options]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "e2vpt", *command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1  # one process talks
    folder = tmp_path / "e2vpt" / "two"
    assert [p.parent for p in tmp_path.rglob("result.json")] == [folder]
    written = result(folder)
    assert written["processes"] == 2
    assert len(rows(folder)) == 2
    assert rows(folder)[-1]["step"] == 2 * 2  # 21 images each, two batches an epoch
    assert len(checkpoint.load(folder / "last.ckpt")["rng"]) == 2
    for split in ("test", "val"):
        assert main(["evaluate", str(folder), "--split", split, "--accelerator", "cpu"]) == 0
        for line in capsys.readouterr().out.splitlines():
            name, value = line.split()
            assert float(value) == pytest.approx(written["metrics"][name], abs=5e-5)


@pytest.mark.slow
def test_the_default_recipe_in_full(tmp_path: Path) -> None:
    assert main(["train", "digits", "--runs-dir", str(tmp_path), "--name", "full"]) == 0
    written = result(tmp_path / "e2vpt" / "full")
    assert written["metrics"]["test_top1"] >= DIGITS_TARGET
    assert written["parameters"]["percent"] < 1.5
