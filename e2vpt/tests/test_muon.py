"""`e2vpt pretrain --optim.optimizer muon`: what moves how, and resume."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from e2vpt import pretrain as module
from e2vpt.cli import main
from e2vpt.config import RunConfig
from e2vpt.micro_vit import build_micro_vit
from e2vpt.optim import build_muon, set_lr
from e2vpt.pretrain import pretrain
from e2vpt.pretrain_config import PretrainConfig, PretrainData, PretrainModel, PretrainOptim
from shared_utils import checkpoint
from shared_utils.config import load_json
from shared_utils.errors import InputError, Interrupted

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 12 validation images of noise, packed."""
    folder = tmp_path_factory.mktemp("set")
    for split, count in (("train", 48), ("val", 12)):
        parts = []
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            parts.append(file.getvalue())
        np.savez(
            folder / f"{split}.npz",
            jpeg=np.frombuffer(b"".join(parts), dtype=np.uint8),
            offsets=np.cumsum([0, *map(len, parts)]),
            label=np.arange(count) % 3,
            classes=np.array(CLASSES),
        )
    return folder


def config(tmp_path: Path, images: Path, name: str = "run", **optim: Any) -> PretrainConfig:
    """Three steps an epoch."""
    return PretrainConfig(
        model=PretrainModel(embed_dim=64, depth=2),
        data=PretrainData(train=images / "train.npz", val=images / "val.npz", batch_size=16),
        optim=PretrainOptim(**{"optimizer": "muon", "epochs": 2, "warmup_epochs": 0.5, **optim}),
        run=RunConfig(runs_dir=tmp_path, name=name, accelerator="cpu", precision="32-true"),
    )


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C before the training step of that number, counted from 0."""
    real: Callable[..., float] = module.train_step
    calls = [0]

    def counted(*args: Any) -> float:
        calls[0] += 1
        if calls[0] == number + 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "train_step", counted)


def stopped(cfg: PretrainConfig, after: int) -> Path:
    """The folder of a run that was interrupted after so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, after)
        with pytest.raises(Interrupted):
            pretrain(cfg)
    return cfg.run.runs_dir / "e2vpt" / cfg.run.name


def again(cfg: PretrainConfig, folder: Path, **optim: Any) -> Path:
    return pretrain(
        replace(cfg, optim=replace(cfg.optim, **optim), run=replace(cfg.run, resume=str(folder)))
    )


def names_by_group(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(p): n for n, p in network.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def test_hidden_matrices_and_convolutions_get_muon_the_rest_does_not() -> None:
    network = build_micro_vit(3, embed_dim=64, depth=2, num_heads=1)
    optimizer = build_muon(network.named_parameters(), lr=0.1, weight_decay=0.05)
    hidden, other, plain = names_by_group(network, optimizer)
    blocks = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = [f"patch_embed.proj.{i}.weight" for i in (0, 3, 6, 9)]
    expected += [f"blocks.{i}.{layer}.weight" for i in range(2) for layer in blocks]
    assert hidden == expected
    assert other == ["pos_embed", "head.weight"]
    assert set(plain) == dict(network.named_parameters()).keys() - {*hidden, *other}
    assert all(network.get_parameter(name).ndim == 1 for name in plain)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.05, 0.0]


def test_a_step_sets_the_singular_values_of_matrices_alike() -> None:
    """An orthogonal step of RMS 0.2 lr for a (64, 64) matrix; NAdamW's first one elsewhere."""
    torch.manual_seed(0)
    lr = 0.01
    network = build_micro_vit(3, embed_dim=64, depth=2, num_heads=1)
    optimizer = build_muon(network.named_parameters(), lr=1.0, weight_decay=0.0)
    set_lr(optimizer, lr)  # reaches all three groups
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in network.named_parameters()}
    for name in ("blocks.0.attn.proj.weight", "patch_embed.proj.9.weight"):
        size = max(moved[name].flatten(1).shape)
        values = torch.linalg.svdvals(moved[name].flatten(1)) / (0.2 * lr * size**0.5)
        # Near 1 after five steps of Newton-Schulz; a random square matrix has some near 0.
        assert 0.6 < values[-4] <= values[0] < 1.4, name
    grad = torch.linalg.svdvals(network.get_parameter("blocks.0.attn.proj.weight").grad)
    assert grad[-4] < 0.15 * grad[0]
    # NAdamW's first step of each value has one size, up to the sign.
    bias = moved["head.bias"].abs()
    assert bias.max() - bias.min() < 1e-4 * lr
    assert 0.1 * lr < bias.max() < 3 * lr


def test_two_steps_change_every_weight(tmp_path: Path, images: Path) -> None:
    cfg = config(tmp_path, images, lr=3e-3)
    first = checkpoint.load(stopped(cfg, 0) / "last.ckpt")
    second = checkpoint.load(
        stopped(replace(cfg, run=replace(cfg.run, overwrite=True)), 2) / "last.ckpt"
    )
    assert second["step"] == 2
    network = build_micro_vit(3, embed_dim=64, depth=2, num_heads=1)
    for name, _ in network.named_parameters():
        assert not torch.equal(first["model"][name], second["model"][name]), name


def test_resume_equals_a_straight_run(tmp_path: Path, images: Path) -> None:
    straight = pretrain(config(tmp_path, images, "straight"))
    cfg = config(tmp_path, images)
    folder = stopped(cfg, 2)  # in the middle of the first epoch
    assert load_json(PretrainConfig, folder / "config.json").optim.optimizer == "muon"
    torch.rand(3)
    again(cfg, folder)
    one, other = (checkpoint.load(path / "last.ckpt") for path in (straight, folder))
    assert one["step"] == other["step"] == 6
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    assert json.loads((folder / "model.json").read_text())["config"]["optim"]["optimizer"] == "muon"


def test_another_optimizer_on_resume_is_refused(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(config(tmp_path, images), 2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["pretrain", "--resume", str(folder), "--optim.optimizer", "adamw"]) == 2
    assert capsys.readouterr().err == (
        "error: optim.optimizer: got adamw, expected muon, which the run began with; "
        "add --optim.optimizer muon\n"
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_muon_on_resume_of_an_adamw_run_is_refused(tmp_path: Path, images: Path) -> None:
    cfg = config(tmp_path, images, optimizer="adamw")
    folder = stopped(cfg, 2)
    match = r"^optim\.optimizer: got muon, expected adamw, which the run began with; add --optim"
    with pytest.raises(InputError, match=match):
        again(cfg, folder, optimizer="muon")


def test_a_run_whose_configuration_does_not_name_its_optimizer(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of before the choice: the checkpoint tells, and the option must be given."""
    folder = stopped(config(tmp_path, images), 2)
    old = json.loads((folder / "config.json").read_text())
    del old["optim"]["optimizer"]
    (folder / "config.json").write_text(json.dumps(old))
    state = checkpoint.load(folder / "last.ckpt")
    state["config"] = old
    checkpoint.save(state, folder / "last.ckpt")
    assert main(["pretrain", "--resume", str(folder)]) == 2
    assert "add --optim.optimizer muon" in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(folder), "--optim.optimizer", "muon"]) == 0
    assert load_json(PretrainConfig, folder / "config.json").optim.optimizer == "muon"
