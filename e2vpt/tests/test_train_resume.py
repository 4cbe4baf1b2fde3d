"""Training runs that are repeated, go on after a stop, or are spoilt."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from e2vpt.cli import main
from e2vpt.config import TrainConfig
from e2vpt.train import _Training, train
from shared_utils import checkpoint
from shared_utils.errors import InputError, Interrupted

from .train_runs import STEPS, assert_same_run, at_step, config, result, resume, rows, stop, weights


@pytest.fixture
def interrupted(
    tmp_path: Path, tiny_backbones: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[TrainConfig, Path]:
    """A run of four epochs, stopped in the third."""
    cfg = config(tmp_path, tiny_backbones[0], "stopped", epochs=4)
    with monkeypatch.context() as patch:
        at_step(patch, 2 * STEPS + 1, stop)
        with pytest.raises(Interrupted, match=r"^e2vpt train --resume .*stopped$"):
            train(cfg)
    return cfg, tmp_path / "e2vpt" / "stopped"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_backbones: tuple[Path, Path]) -> Path:
    """The same run without a stop."""
    return train(config(tmp_path_factory.mktemp("straight"), tiny_backbones[0], epochs=4))


# ---- the same run ---------------------------------------------------------------------------


def test_resumed_two_and_two_epochs_equal_four(
    interrupted: tuple[TrainConfig, Path], straight: Path
) -> None:
    cfg, folder = interrupted
    assert [row["epoch"] for row in rows(folder)] == [1, 2]
    assert not (folder / "result.json").exists()
    torch.rand(5)  # another random state than the one that the run had
    assert resume(cfg, folder) == folder
    assert_same_run(folder, straight)
    assert [row["step"] for row in rows(folder)] == [3, 6, 9, 12]
    assert result(folder)["epochs"] == 4


def test_same_seed_gives_the_same_run_and_another_seed_another(
    tmp_path: Path, tiny_backbones: tuple[Path, Path], straight: Path
) -> None:
    again = train(config(tmp_path, tiny_backbones[0], "again", epochs=4))
    assert_same_run(again, straight)
    other = train(config(tmp_path, tiny_backbones[0], "other", epochs=4, run={"seed": 1}))
    assert rows(other) != rows(straight)


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, tiny_backbones: tuple[Path, Path], augment: str
) -> None:
    folders = [
        train(
            config(
                tmp_path,
                tiny_backbones[0],
                f"workers-{count}",
                data={"num_workers": count, "augment": augment},
            )
        )
        for count in (0, 2)
    ]
    assert_same_run(*folders)


def test_each_epoch_has_an_order_of_its_own_and_every_image(
    tmp_path: Path, tiny_backbones: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    real = _Training._step

    def keep(self: _Training, images: torch.Tensor, labels: torch.Tensor) -> float:
        seen.extend(images.double().sum((1, 2, 3)).tolist())  # tells one image from another
        return real(self, images, labels)

    monkeypatch.setattr(_Training, "_step", keep)
    train(config(tmp_path, tiny_backbones[0]))
    first, second = seen[:40], seen[40:]
    assert len(set(first)) == len(second) == 40
    assert sorted(first) == sorted(second)
    assert first != second


def test_its_config_is_enough_to_run_again(
    interrupted: tuple[TrainConfig, Path], straight: Path, tmp_path: Path
) -> None:
    from shared_utils.config import load_json

    cfg, folder = interrupted
    resume(cfg, folder)
    stored = load_json(TrainConfig, folder / "config.json")
    assert stored == cfg  # no --resume in it, which would not run but go on
    again = train(replace(stored, run=replace(stored.run, name="again")))
    assert_same_run(again, straight)


# ---- checkpoints ----------------------------------------------------------------------------


def test_best_checkpoint_is_the_best_epochs(straight: Path) -> None:
    scores = [row["val_top1"] for row in rows(straight)]
    best = checkpoint.load(straight / "best.ckpt")
    assert best["best"] == max(scores)
    assert best["epoch"] == 1 + scores.index(max(scores))  # the first of equals
    assert checkpoint.load(straight / "last.ckpt")["epoch"] == 4


def test_checkpoint_keys(straight: Path) -> None:
    state = checkpoint.load(straight / "last.ckpt")
    assert state.keys() == {
        "model", "optimizer", "scaler", "rng", "epoch", "step", "best", "backbone", "config",
        "spec",
    }  # fmt: skip
    prompts = {f"{kind}.{layer}" for kind in ("visual.weight", "kv.key") for layer in range(2)}
    assert state["model"].keys() == prompts | {"head.weight", "head.bias"}
    deployed = weights(straight)
    assert state["model"].keys() == deployed.keys()
    assert all(torch.equal(state["model"][name], deployed[name]) for name in deployed)


# ---- going on, and what prevents it ---------------------------------------------------------


def test_a_finished_run_resumes_to_its_result(
    tmp_path: Path, tiny_backbones: tuple[Path, Path]
) -> None:
    cfg = config(tmp_path, tiny_backbones[0])
    folder = train(cfg)
    scores, tensors, lines = result(folder)["metrics"], weights(folder), rows(folder)
    (folder / "result.json").unlink()
    resume(cfg, folder)
    assert result(folder)["metrics"] == scores
    assert rows(folder) == lines
    assert all(torch.equal(tensors[n], t) for n, t in weights(folder).items())


def test_more_epochs_on_resume(tmp_path: Path, tiny_backbones: tuple[Path, Path]) -> None:
    cfg = config(tmp_path, tiny_backbones[0])
    folder = train(cfg)
    resume(cfg, folder, epochs=3)
    assert [row["epoch"] for row in rows(folder)] == [1, 2, 3]
    assert result(folder)["epochs"] == 3


def test_a_truncated_checkpoint_falls_back_on_the_one_before(
    interrupted: tuple[TrainConfig, Path], straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, folder = interrupted
    last = folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-2000])
    resume(cfg, folder)
    told = capsys.readouterr().out
    assert f"warning: {last}: got " in told
    assert "going on from last.ckpt.prev" in " ".join(told.split())
    assert_same_run(folder, straight)  # epoch 2 was trained again


def test_both_checkpoints_damaged_is_one_error(interrupted: tuple[TrainConfig, Path]) -> None:
    cfg, folder = interrupted
    for name in ("last.ckpt", "last.ckpt.prev"):
        (folder / name).write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match=r"last\.ckpt: got .*damaged"):
        resume(cfg, folder)


def refused(
    cfg: TrainConfig, folder: Path, match: str, model: dict[str, Any], **optim: Any
) -> None:
    """Resuming with these options is refused, and all files stay as they are."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=match):
        resume(replace(cfg, model=replace(cfg.model, **model)), folder, **optim)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_resume_on_another_backbone_is_refused(
    interrupted: tuple[TrainConfig, Path], tiny_backbones: tuple[Path, Path]
) -> None:
    refused(
        *interrupted,
        r"^model\.backbone: got weights \w{12}, expected \w{12}, those the run began with; ",
        {"backbone": str(tiny_backbones[1])},
    )


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"method": "vpt-deep"}, r"last\.ckpt: got an unexpected tensor 'kv\.key\.0'"),
        ({"num_visual_prompts": 5}, r"visual\.weight\.0: got shape \(4, 64\), expected \(5, 64\)"),
        ({"num_kv_prompts": 3}, r"kv\.key\.0: got shape \(1, 2, 64\), expected \(1, 3, 64\)"),
        ({"kv_deep": False}, r"last\.ckpt: got an unexpected tensor 'kv\.key\.1'"),
        ({"share_kv": False}, r"last\.ckpt: got no tensor 'kv\.value\.0'"),
    ],
)  # fmt: skip
def test_resume_of_another_model_is_refused(
    interrupted: tuple[TrainConfig, Path], model: dict[str, Any], match: str
) -> None:
    refused(*interrupted, match, model)


def test_resume_with_another_optimizer_is_refused(interrupted: tuple[TrainConfig, Path]) -> None:
    match = r"^optim\.optimizer: got sgd, expected adamw, as before; "
    refused(*interrupted, match, {}, optimizer="sgd")


def test_resume_takes_up_a_new_weight_decay(
    interrupted: tuple[TrainConfig, Path], straight: Path
) -> None:
    cfg, folder = interrupted
    resume(cfg, folder, weight_decay=0.5)
    groups = checkpoint.load(folder / "last.ckpt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert rows(folder)[:2] == rows(straight)[:2]
    assert rows(folder)[3] != rows(straight)[3]


# ---- a loss that is no number ---------------------------------------------------------------


def finite(path: Path) -> bool:
    state = checkpoint.load(path)
    moments = [t for s in state["optimizer"]["state"].values() for t in s.values()]
    tensors = [*state["model"].values(), *moments]
    return len(tensors) > 4 and all(bool(torch.isfinite(t).all()) for t in tensors)


def test_a_rate_that_is_far_too_high(
    interrupted: tuple[TrainConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = interrupted
    good = (folder / "last.ckpt").read_bytes()
    options = ["train", "--resume", str(folder)]
    assert main([*options, "--optim.lr", "1e30"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(
        ("error: loss_ce: got nan at step 7", "error: loss_ce: got inf at step 7")
    )
    assert f"lower --optim.lr and go on with --resume {folder}" in error
    assert (folder / "last.ckpt").read_bytes() == good
    assert finite(folder / "last.ckpt")
    assert main([*options, "--optim.lr", "0.05"]) == 0  # what the message says to do


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (math.nan, r"^head\.weight: got nan or inf after step 6, expected finite weights; lower "),
        (3e38, r"^logits: got nan or inf on the val images after step 6, expected finite ones; "),
    ],
)
def test_weights_ruined_by_an_epochs_last_step_are_not_saved(
    tmp_path: Path,
    tiny_backbones: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    match: str,
) -> None:
    def ruin(run: _Training) -> None:
        with torch.no_grad():
            run.network.head.weight.fill_(value)

    at_step(monkeypatch, 2 * STEPS - 1, ruin, after=True)
    with pytest.raises(InputError, match=match):
        train(config(tmp_path, tiny_backbones[0], epochs=3, run={"precision": "32-true"}))
    folder = tmp_path / "e2vpt" / "run"
    assert checkpoint.load(folder / "last.ckpt")["epoch"] == 1
    assert finite(folder / "last.ckpt")
    assert len(rows(folder)) == 1


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path,
    tiny_backbones: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    no_room: Any,
) -> None:
    cfg = config(tmp_path, tiny_backbones[0], epochs=3)
    folder = tmp_path / "e2vpt" / "run"
    real = _Training._save

    def save(self: _Training, *args: Any) -> None:
        if self.epoch < 2:
            return real(self, *args)
        with no_room():
            return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_Training, "_save", save)
        with pytest.raises(InputError, match=r"last\.ckpt: got a full disk.*--resume$"):
            train(cfg)
    assert checkpoint.load(folder / "last.ckpt")["epoch"] == 1
    resume(cfg, folder)
    assert result(folder)["metrics"]["test_top1"] >= 0
