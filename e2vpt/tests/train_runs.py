"""Runs of `e2vpt train` that take a second, and what they leave behind."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from e2vpt.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from e2vpt.train import _Training, train
from shared_utils import checkpoint
from shared_utils.run_log import read_metrics

STEPS = 3  # per epoch: 40 images in batches of 16
CLOCKS = {"seconds", "images_per_second"}
LR = {"full": 1e-3, "bias": 3e-3}  # others 0.05


def config(
    tmp_path: Path,
    backbone: Path,
    name: str = "run",
    *,
    method: Any = "e2vpt",
    run: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **optim: Any,
) -> TrainConfig:
    """A run of a second on 40 digits."""
    return TrainConfig(
        recipe="digits",
        model=ModelConfig(
            method=method,
            backbone=str(backbone),
            architecture="micro_vit",
            num_visual_prompts=4,
            num_kv_prompts=2,
        ),
        data=DataConfig(limit=40, batch_size=16, **(data or {})),
        optim=OptimConfig(**{"lr": LR.get(method, 0.05), "epochs": 2, "warmup_epochs": 0, **optim}),
        run=RunConfig(runs_dir=tmp_path, name=name, accelerator="cpu", **(run or {})),
    )


def resume(cfg: TrainConfig, folder: Path, **optim: Any) -> Path:
    return train(
        replace(cfg, optim=replace(cfg.optim, **optim), run=replace(cfg.run, resume=str(folder)))
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(folder / "model.safetensors")[0]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())  # type: ignore[no-any-return]


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in read_metrics(folder)]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit-equal weights, equal losses, rates and scores."""
    assert rows(one) == rows(other)
    assert result(one)["metrics"] == result(other)["metrics"]
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def at_step(
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    act: Callable[[_Training], None],
    after: bool = False,
) -> None:
    """Do something before (or after) optimiser step `step`, counted from 0."""
    real = _Training._step

    def stepping(self: _Training, images: torch.Tensor, labels: torch.Tensor) -> float:
        if self.step == step and not after:
            act(self)
        loss = real(self, images, labels)
        if self.step == step and after:
            act(self)
        return loss

    monkeypatch.setattr(_Training, "_step", stepping)


def stop(_: Any) -> None:
    raise KeyboardInterrupt
