"""`e2vpt pretrain`: its run folder, its resume in the middle of an epoch, its data, its errors."""

import io
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from e2vpt import pretrain as module
from e2vpt.backbones import load_backbone
from e2vpt.cli import main
from e2vpt.config import RunConfig
from e2vpt.pretrain import pretrain
from e2vpt.pretrain_config import PretrainConfig, PretrainData, PretrainModel, PretrainOptim
from shared_utils import checkpoint
from shared_utils.errors import InputError, Interrupted
from shared_utils.run_log import read_metrics

CLASSES = ("ant", "bee", "cat", "dog")
STEPS = 4  # per epoch: 64 images in batches of 16


def write_packed(
    path: Path, *, count: int = 64, side: int = 32, classes: tuple[str, ...] = CLASSES
) -> Path:
    """Images sorted by class, each class of a colour of its own; image i has its number in red."""
    parts, labels = [], []
    for i in range(count):
        label = i * len(classes) // count
        pixels = np.random.default_rng(i).integers(0, 120, (side, side, 3), dtype=np.uint8)
        pixels[..., label % 3] += 100
        pixels[0, 0] = (i, label, 0)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        parts.append(file.getvalue())
        labels.append(label)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(parts), dtype=np.uint8),
        offsets=np.cumsum([0, *map(len, parts)]),
        label=np.array(labels),
        classes=np.array(classes),
    )
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_packed(folder / "train.npz")
    write_packed(folder / "val.npz", count=20)
    return folder


def config(tmp_path: Path, images: Path, name: str = "run", **optim: Any) -> PretrainConfig:
    return PretrainConfig(
        model=PretrainModel(embed_dim=64, depth=2),
        data=PretrainData(
            train=images / "train.npz", val=images / "val.npz", batch_size=16, mix_prob=0.5
        ),
        optim=PretrainOptim(**{"epochs": 2, "warmup_epochs": 0.5, **optim}),
        run=RunConfig(runs_dir=tmp_path, name=name, accelerator="cpu", precision="32-true"),
    )


def again(cfg: PretrainConfig, folder: Path, **optim: Any) -> Path:
    return pretrain(
        replace(cfg, optim=replace(cfg.optim, **optim), run=replace(cfg.run, resume=str(folder)))
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    clocks = {"seconds", "images_per_second"}
    return [{k: v for k, v in r.items() if k not in clocks} for r in read_metrics(folder)]


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "last.ckpt")[part]  # type: ignore[no-any-return]


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for part in ("model", "ema"):
        a, b = tensors(one, part), tensors(other, part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def _log_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_EVERY", 1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOG_EVERY", 1)
        return pretrain(config(tmp_path_factory.mktemp("straight"), images))


def call_at(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, act: Callable[[], None]
) -> None:
    """Do something before the call of `pretrain.<name>` with this number, counted from 0."""
    real, calls = getattr(module, name), [0]

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number + 1:
            act()
        return real(*args, **options)

    monkeypatch.setattr(module, name, counted)


def stop() -> None:
    raise KeyboardInterrupt


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


# ---- errors ---------------------------------------------------------------------------------


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
