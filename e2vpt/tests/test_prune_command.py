"""`e2vpt prune`: a finished run is pruned, trained again, and is a run like others."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from e2vpt import start
from e2vpt.cli import main
from e2vpt.config import PruneConfig, TrainConfig
from e2vpt.train import Setup, _Training, prepare, train
from shared_utils import checkpoint
from shared_utils.config import load_json, save_json
from shared_utils.errors import InputError, Interrupted
from shared_utils.run_log import read_metrics

# Tuned parameters of `quick` on 10 classes, counted by hand: width 64, depth 2, one head.
HEAD, KV = 64 * 10 + 10, 2 * 2 * 64
REMOVE = ["--prune.num-tokens", "1", "--prune.num-segments", "3"]
TUNED = HEAD + KV + 2 * 3 * 64 * 5 // 8
CLOCKS = {"seconds", "images_per_second"}


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the training."""
    for name in (
        "plot_curves",
        "pictures.confusion",
        "pictures.predictions",
        "prompt_report.write",
    ):
        monkeypatch.setattr(f"e2vpt.train.{name}", lambda *args: None)


@pytest.fixture(scope="module")
def pruned(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the four prompts and three of eight segments removed; not to be changed."""
    runs = tmp_path_factory.mktemp("runs")
    argv = ["prune", str(digits_run), *REMOVE, "--runs-dir", str(runs), "--name", "less"]
    assert main(argv) == 0
    return runs / "e2vpt" / "less"


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())  # type: ignore[no-any-return]


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what it writes -------------------------------------------------------------------------


def test_it_writes_the_run_folder(pruned: Path, digits_run: Path) -> None:
    names = {path.name for path in pruned.iterdir()}
    of_training = {path.name for path in digits_run.iterdir()} - {"best.ckpt.prev"}
    assert names - {"best.ckpt.prev"} == of_training | {start.IMPORTANCE}
    written, before = result(pruned), result(digits_run)
    assert written.keys() == before.keys()
    assert before["parameters"]["tuned"] == HEAD + KV + 2 * 4 * 64
    assert written["parameters"]["tuned"] == TUNED
    total = before["parameters"]["total"] - before["parameters"]["tuned"] + TUNED
    assert written["parameters"]["total"] == total
    assert written["parameters"]["percent"] == pytest.approx(100 * TUNED / total)
    assert written["metrics"].keys() == {"val_top1", "val_top5", "test_top1", "test_top5"}
    assert written["recipe"] == "digits"
    assert before["prune"] is None
    assert written["prune"] == json.loads((pruned / start.IMPORTANCE).read_text())["prune"]
    tensors = checkpoint.load_weights(pruned / "model.safetensors")[0]
    stored = sum(t.numel() for n, t in tensors.items() if n != "visual.segments")
    assert stored == TUNED  # what was removed is not kept as zeros


def test_it_trains_as_the_run_did(pruned: Path, digits_run: Path) -> None:
    before = load_json(TrainConfig, digits_run / "config.json")
    stored = load_json(TrainConfig, pruned / "config.json")
    assert stored.prune == PruneConfig(source=str(digits_run), num_tokens=1, num_segments=3)
    run = replace(before.run, name="less", runs_dir=pruned.parents[1])
    assert stored == replace(before, prune=stored.prune, run=run)
    assert [row["epoch"] for row in read_metrics(pruned)] == [1, 2]


@pytest.mark.usefixtures("no_pictures")
def test_options_change_how_it_is_pruned_and_trained(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["prune", str(digits_run), "--prune.num-segments", "2", "--prune.of-segments", "4"]
    argv += ["--prune.rewind", "trained", "--prune.per-layer", "--optim.epochs", "1"]
    assert main([*argv, "--runs-dir", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "e2vpt").iterdir()
    assert folder.name.startswith("digits-")
    assert result(folder)["epochs"] == 1
    assert result(folder)["parameters"]["tuned"] == HEAD + KV + 2 * 4 * 32
    assert f"{HEAD + KV + 2 * 4 * 32:,} of " in capsys.readouterr().out
    first = checkpoint.load_weights(folder / start.INITIAL)[0]
    assert first["visual.segments"].shape == (2, 4, 2)


# ---- a run like others ----------------------------------------------------------------------


def test_it_is_evaluated_shown_and_predicted_with(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for which in ("last", "best"):
        assert main(["evaluate", str(pruned), "--which", which, "--accelerator", "cpu"]) == 0
        told = dict(line.split() for line in capsys.readouterr().out.splitlines())
        if which == "last":
            assert float(told["test_top1"]) == pytest.approx(
                result(pruned)["metrics"]["test_top1"], abs=1e-4
            )
    assert main(["info", str(pruned)]) == 0
    told = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["tuned"] == f"{TUNED:,}"
    Image.new("RGB", (9, 9), (200, 0, 0)).save(tmp_path / "a.png")
    argv = ["predict", str(pruned), str(tmp_path / "a.png"), "--output", str(tmp_path / "p")]
    assert main(argv) == 0
    assert len((tmp_path / "p" / "predictions.csv").read_text().splitlines()) == 2


def test_it_is_exported(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(pruned), "--output", str(tmp_path / "less.onnx")]) == 0
    assert "onnxruntime agrees with PyTorch" in capsys.readouterr().out
    assert (tmp_path / "less.onnx").is_file()


@pytest.mark.usefixtures("no_pictures")
def test_it_is_pruned_again_from_its_own_start(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["prune", str(pruned), "--runs-dir", str(tmp_path), "--name", "least"]
    assert main([*argv, "--prune.num-tokens", "2"]) == 0
    folder = tmp_path / "e2vpt" / "least"
    assert result(folder)["parameters"]["tuned"] == HEAD + KV + 2 * 1 * 64 * 5 // 8
    less, least = (checkpoint.load_weights(place / start.INITIAL)[0] for place in (pruned, folder))
    rows = less["visual.weight.0"].flatten(1).tolist()
    (row,) = least["visual.weight.0"].flatten(1).tolist()
    assert row in rows
    segments = less["visual.segments"][0, rows.index(row)]
    assert torch.equal(least["visual.segments"][0, 0], segments)
    error = failure([*argv, "--overwrite", "--prune.num-segments", "1"], capsys)
    assert "got prompts whose segments are cut, expected whole prompts; prune tokens" in error
    assert result(folder)["epochs"] == 2  # the run of that name stays


def test_the_second_pruning_does_not_inherit_how_the_first_was_done(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_json(TrainConfig, digits_run / "config.json")
    options = {"num_tokens": 1, "random": True, "rewind": "trained", "per_layer": True}
    first = replace(before, prune=PruneConfig(source="x", **options))
    save_json(first, tmp_path / "config.json")
    ran: list[TrainConfig] = []
    monkeypatch.setattr("e2vpt.train.train", ran.append)
    assert main(["prune", str(tmp_path), "--prune.num-tokens", "2"]) == 0
    assert ran[0].prune == PruneConfig(source=str(tmp_path), num_tokens=2)


# ---- wrong words ----------------------------------------------------------------------------


def unfinished(run: Path) -> None:
    for name in ("model.json", "model.safetensors", "result.json"):
        (run / name).unlink()


def no_config(run: Path) -> None:
    (run / "config.json").unlink()


def nothing(run: Path) -> None:
    """As it is."""


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (nothing, [], "error: prune.num_tokens: got 0, and no segments either, expected something"),
        (nothing, ["--prune.num-tokens", "4"], "error: num_tokens: got 4, expected 0 to 3"),
        (nothing, ["--prune.num-tokens", "-1"], "error: prune.num_tokens: got -1, expected 0 or"),
        (nothing, ["--prune.num-segments", "8"], "error: prune.num_segments: got 8, expected less"),
        (nothing, ["--prune.num-token", "1"], "did you mean '--prune.num-tokens'?"),
        (
            nothing,
            [*REMOVE, "--model.num-kv-prompts", "3"],
            "error: model.num_kv_prompts: got 3, expected 2, as in ",
        ),
        (unfinished, REMOVE, "model.json: got no such file, expected a saved E²VPT model"),
        (no_config, REMOVE, "config.json: got no such file, expected a saved configuration"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_is_one_line(
    digits_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    options: list[str],
    message: str,
) -> None:
    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    change(run)
    argv = ["prune", str(run), *options, "--runs-dir", str(tmp_path / "runs")]
    assert message in failure(argv, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prune"], "error: RUN: got nothing, expected a finished run folder first; "),
        (["prune", *REMOVE], "error: RUN: got nothing, expected a finished run folder first; "),
        (["prune", "nowhere", *REMOVE], "error: nowhere/config.json: got no such file"),
        (["prune", "--resume", "nowhere"], "error: nowhere/config.json: got no such file"),
        (
            ["train", "digits", "--prune.num-tokens", "1"],
            "error: prune.num_tokens: got 1 without prune.source, expected the run whose prompts",
        ),
    ],
)
def test_a_run_must_be_named(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_Training, "run", None)
    assert failure(argv, capsys).startswith(message)
    assert not any(tmp_path.iterdir())


def test_help_shows_the_defaults_of_the_run(
    digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, epochs in (([], 50), ([str(digits_run)], 2)):
        with pytest.raises(SystemExit) as stop:
            main(["prune", *argv, "--help"])
        assert stop.value.code == 0
        told = " ".join(capsys.readouterr().out.split())
        assert f"(default: {epochs})" in told
        assert "--prune.num-tokens" in told


# ---- going on -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup(digits_run: Path) -> Setup:
    return prepare(load_json(TrainConfig, digits_run / "config.json"))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = _Training._step

    def stepping(self: _Training, *batch: Tensor) -> float:
        if self.step == step:
            raise KeyboardInterrupt
        return real(self, *batch)

    monkeypatch.setattr(_Training, "_step", stepping)


@pytest.mark.usefixtures("no_pictures")
def test_resume_goes_on_with_the_runs_own_options(
    digits_run: Path,
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "e2vpt" / "less"
    argv = ["prune", str(digits_run), *REMOVE, "--runs-dir", str(tmp_path), "--name", "less"]
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert main(argv) == 130
    assert capsys.readouterr().err.endswith(f"go on with: e2vpt train --resume {folder}\n")
    before = contents(folder)
    error = failure(["prune", "--resume", str(folder), "--prune.num-tokens", "2"], capsys)
    assert error == "error: prune.num_tokens: got 2, expected 1, as before; leave it\n"
    assert contents(folder) == before
    assert "the recipe of" in failure([*argv, "--resume", str(folder)], capsys)
    assert main(["prune", f"--resume={folder}"]) == 0
    assert result(folder)["metrics"] == result(pruned)["metrics"]
    both = [checkpoint.load_weights(f / "model.safetensors")[0] for f in (folder, pruned)]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


@pytest.mark.parametrize(
    "options", [{}, {"per_layer": True, "rewind": "trained"}, {"compat": True}, {"random": True}]
)
def test_a_pruned_run_goes_on_as_if_never_stopped(
    setup: Setup,
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    cfg = load_json(TrainConfig, digits_run / "config.json")
    prune = PruneConfig(source=str(digits_run), num_tokens=1, num_segments=2, **options)
    cfg = replace(cfg, prune=prune)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    train(cfg, setup, straight)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)  # of three in each of two epochs
        with pytest.raises(Interrupted):
            train(cfg, setup, stopped)
    scores = (stopped / start.IMPORTANCE).read_text()
    monkeypatch.setattr(start, "importance", None)  # it is not scored again
    monkeypatch.setattr(start, "random_scores", None)
    train(replace(cfg, run=replace(cfg.run, resume=str(stopped))), setup, stopped)
    a, b = (checkpoint.load_weights(f / "model.safetensors")[0] for f in (straight, stopped))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [
        [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_metrics(folder)]
        for folder in (straight, stopped)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2
    assert (stopped / start.IMPORTANCE).read_text() == scores
    assert result(straight)["metrics"] == result(stopped)["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_segments": 2}, "num_segments: got 2, expected 3, as before; leave it"),
        ({"rewind": "reinit"}, "rewind: got reinit, expected init, as before; leave it"),
        ({"source": "other"}, "source: got other, expected done, as before; leave it"),
    ],
)
def test_a_pruned_run_is_not_pruned_otherwise_on_resume(
    setup: Setup, pruned: Path, options: dict[str, Any], message: str
) -> None:
    cfg = load_json(TrainConfig, pruned / "config.json")
    cfg = replace(cfg, run=replace(cfg.run, resume=str(pruned)))
    before = contents(pruned)
    with pytest.raises(InputError, match=f"^prune.{message}$"):
        train(replace(cfg, prune=replace(cfg.prune, **options)), setup, pruned)
    assert contents(pruned) == before


def test_a_pruned_run_goes_on_when_its_source_has_moved(
    setup: Setup, pruned: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pruned, tmp_path / "less"))
    cfg = load_json(TrainConfig, folder / "config.json")
    moved = replace(cfg.prune, source="elsewhere/done")
    train(replace(cfg, prune=moved, run=replace(cfg.run, resume=str(folder))), setup, folder)
    assert result(folder)["metrics"] == result(pruned)["metrics"]


def test_a_plain_run_is_not_pruned_on_resume(
    digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failure(["train", "--resume", str(digits_run), "--prune.source", "other"], capsys)
    assert error == "error: prune.source: got other, expected nothing, as before; leave it\n"
