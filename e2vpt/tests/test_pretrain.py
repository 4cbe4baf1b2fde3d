"""`e2vpt pretrain`: its run folder, its export, its resume in the middle of an epoch."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from e2vpt import pretrain as module
from e2vpt.backbones import load_backbone
from e2vpt.cli import main
from e2vpt.pretrain import pretrain
from shared_utils import checkpoint
from shared_utils.errors import Interrupted

from .pretrain_runs import (
    CLASSES,
    STEPS,
    again,
    assert_same_run,
    call_at,
    config,
    rows,
    stop,
    tensors,
    write_set,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(autouse=True)
def _log_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_EVERY", 1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOG_EVERY", 1)
        return pretrain(config(tmp_path_factory.mktemp("straight"), images))


def test_run_folder(straight: Path, images: Path) -> None:
    assert {path.name for path in straight.iterdir()} == {
        "config.json", "metrics.jsonl", "last.ckpt", "last.ckpt.prev", "model.safetensors",
        "model.json", "result.json", "curves.png", "tensorboard",
    }  # fmt: skip
    result = json.loads((straight / "result.json").read_text())
    assert result["project"] == "e2vpt"
    assert result["metrics"].keys() == {"val_top1"}
    assert result["data"] == {
        "name": images.name, "train_images": 64, "val_images": 20, "test_images": 0,
    }  # fmt: skip
    assert result["parameters"]["tuned"] == result["parameters"]["total"] == 137_104 + 65 * 4
    assert result["images_per_second"] > 0
    found = rows(straight)
    assert [row["step"] for row in found if "loss_ce" in row] == list(range(1, 9))
    assert [(r["step"], r["epoch"]) for r in found if "val_top1" in r] == [(4, 0), (8, 1)]
    assert result["metrics"]["val_top1"] == found[-1]["val_top1"]


def test_the_export_is_a_backbone(straight: Path, images: Path) -> None:
    backbone = load_backbone(str(straight / "model.safetensors"), "micro_vit")
    card = json.loads((straight / "model.json").read_text())
    assert card["classes"] == list(CLASSES)
    assert card["val"] == {"top1": rows(straight)[-1]["val_top1"]}
    assert (card["architecture"]["embed_dim"], card["architecture"]["depth"]) == (64, 2)
    averaged = tensors(straight, "ema")
    for name, tensor in backbone.module.state_dict().items():
        kept = averaged[name].half().float() if tensor.is_floating_point() else averaged[name]
        assert torch.equal(tensor, kept), name
    assert backbone.img_size == (32, 32)
    assert backbone.mean == pytest.approx((0.485, 0.456, 0.406))
    # The card says what it was made with, and nothing of this machine's folders.
    text = (straight / "model.json").read_text()
    assert str(images.parent) not in text
    assert str(straight.parent) not in text
    assert card["config"]["data"]["train"] == f"{images.name}/train.npz"
    assert card["config"]["optim"]["epochs"] == 2
    assert card["config"]["run"] == {"seed": 0, "precision": "32-true"}


def test_the_average_is_over_all_steps(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's warm-up of the decay: 1 - (1 + step)^(-2/3), up to its limit."""
    steps: list[torch.Tensor] = []
    real = module.train_step

    def keep(fabric: Any, model: Any, *args: Any) -> float:
        loss = real(fabric, model, *args)
        steps.append(model.state_dict()["head.weight"].detach().clone())
        return loss

    monkeypatch.setattr(module, "train_step", keep)
    folder = pretrain(config(tmp_path, images, ema_decay=0.6))
    average = steps[0]
    for step, weight in enumerate(steps):
        passed = step - 1  # without what timm counts as no step yet
        decay = 0.0 if passed <= 0 else min(0.6, 1 - (1 + passed) ** (-2 / 3))
        average = decay * average + (1 - decay) * weight
    assert len(steps) == 2 * STEPS
    torch.testing.assert_close(tensors(folder, "ema")["head.weight"], average)
    assert not torch.allclose(average, steps[-1])


def test_it_learns(tmp_path: Path, images: Path) -> None:
    folder = pretrain(config(tmp_path, images, epochs=8, lr=3e-3, ema_decay=0.5))
    losses = [row["loss_ce"] for row in rows(folder) if "loss_ce" in row]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.4
    assert rows(folder)[-1]["val_top1"] >= 0.5  # of four classes


@pytest.mark.parametrize(
    ("name", "number"),
    [("train_step", 2), ("train_step", 5), ("evaluate", 0), ("evaluate", 1), ("plot_curves", 0)],
)
def test_resume_anywhere_equals_a_straight_run(
    tmp_path: Path,
    images: Path,
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
) -> None:
    cfg = config(tmp_path, images)
    folder = tmp_path / "e2vpt" / "run"
    with monkeypatch.context() as patch:
        call_at(patch, name, number, stop)
        with pytest.raises(Interrupted, match=rf"^e2vpt pretrain --resume {folder}$"):
            pretrain(cfg)
    assert not (folder / "result.json").exists()
    step = checkpoint.load(folder / "last.ckpt")["step"]
    assert step == {"train_step": number, "evaluate": 4 * (number + 1)}.get(name, 8)
    torch.rand(3)
    again(cfg, folder)
    assert_same_run(folder, straight)
    assert (folder / "result.json").is_file()


def test_a_kill_loses_the_steps_since_the_last_save(
    tmp_path: Path, images: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    cfg = config(tmp_path, images)
    folder = tmp_path / "e2vpt" / "run"
    monkeypatch.setattr(module, "SAVE_EVERY", 3)
    with monkeypatch.context() as patch:
        call_at(patch, "train_step", 7, kill)
        with pytest.raises(Killed):
            pretrain(cfg)
    assert checkpoint.load(folder / "last.ckpt")["step"] == 6
    assert rows(folder)[-1]["step"] == 7
    again(cfg, folder)
    assert_same_run(folder, straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_step(
    tmp_path: Path,
    images: Path,
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """It comes while weights are changed; what is saved is the state after that step."""
    argv = ["pretrain", "tiny-imagenet-32", "--runs-dir", str(tmp_path), "--name", "a b"]
    argv += ["--data.train", str(images / "train.npz"), "--data.val", str(images / "val.npz")]
    argv += ["--model.embed-dim", "64", "--model.depth", "2", "--data.batch-size", "16"]
    argv += ["--data.mix-prob", "0.5", "--optim.epochs", "2", "--optim.warmup-epochs", "0.5"]
    argv += ["--optim.optimizer", "adamw", "--optim.lr", "1.5e-3", "--optim.schedule", "cosine"]
    argv += ["--accelerator", "cpu", "--precision", "32-true"]
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts background jobs
    try:
        with monkeypatch.context() as patch:
            call_at(patch, "train_step", 1, lambda: os.kill(os.getpid(), number))
            assert main(argv) == 130
    finally:
        signal.signal(signal.SIGINT, kept)
    folder = tmp_path / "e2vpt" / "a b"
    error = capsys.readouterr().err
    assert error.endswith(f"go on with: e2vpt pretrain --resume '{folder}'\n")
    assert checkpoint.load(folder / "last.ckpt")["step"] == 2
    assert main(["pretrain", "--resume", str(folder)]) == 0
    assert_same_run(folder, straight)


def test_more_epochs_while_a_trapezoid_is_flat(tmp_path: Path, images: Path) -> None:
    """Stopped before the descent, a short run made longer is the long run."""
    long = pretrain(config(tmp_path, images, "long", schedule="trapezoid", epochs=6))
    cfg = config(tmp_path, images, "short", schedule="trapezoid", epochs=3)
    folder = tmp_path / "e2vpt" / "short"
    with pytest.MonkeyPatch.context() as patch:
        call_at(patch, "train_step", 7, stop)  # of 12, whose last 4.2 descend
        with pytest.raises(Interrupted):
            pretrain(cfg)
    again(cfg, folder, epochs=6)
    assert_same_run(folder, long)
    rates = [row["lr"] for row in rows(folder) if "lr" in row]
    assert len(rates) == 6 * STEPS
    assert rates[4:15] == [1.5e-3] * 11
    assert rates[-1] < 0.2 * 1.5e-3


def test_limit_spreads_over_the_classes(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = module.train_step

    def keep(fabric: Any, model: Any, optimizer: Any, x: Any, y: Any, cfg: Any) -> float:
        seen.append((x, y))
        return real(fabric, model, optimizer, x, y, cfg)

    monkeypatch.setattr(module, "train_step", keep)
    cfg = config(tmp_path, images, epochs=1)
    folder = pretrain(replace(cfg, data=replace(cfg.data, limit=8, batch_size=8)))
    ((x, y),) = seen
    assert sorted(y.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(x[:, 0, 0, 0].tolist()) == list(range(0, 64, 8))
    assert torch.equal(x[:, 1, 0, 0].long(), y)  # each with its own label
    data = json.loads((folder / "result.json").read_text())["data"]
    assert (data["train_images"], data["val_images"]) == (8, 8)
