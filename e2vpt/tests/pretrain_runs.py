"""Runs of `e2vpt pretrain` that take a second, their images, and what they leave behind."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from e2vpt import pretrain as module
from e2vpt.config import RunConfig
from e2vpt.pretrain import pretrain
from e2vpt.pretrain_config import PretrainConfig, PretrainData, PretrainModel, PretrainOptim
from shared_utils import checkpoint
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


def write_set(folder: Path) -> Path:
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
