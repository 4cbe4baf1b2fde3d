"""Runs with options: tasks, anchors, weights, parts; and what ends a run early."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shared_utils import checkpoint
from shared_utils.run_log import read_metrics
from yolop_mtl import model_io, report, train
from yolop_mtl.cli import main
from yolop_mtl.evaluate import Evaluation
from yolop_mtl.train import _Training

ONE_LINE = re.compile(r"error: [^\n]+?: got [^\n]+?, expected [^\n]+; [^\n]+\n")


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are looked at in the run that tests share; drawing them takes the longest."""
    monkeypatch.setattr(report, "plot_curves", lambda *args: None)
    monkeypatch.setattr(train, "write_curves", lambda *args: None)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def run(tmp_path: Path, quick: list[str], *options: str) -> Path:
    argv = ["train", "synthetic", "--runs-dir", str(tmp_path), "--name", "x", *quick, *options]
    assert main(argv) == 0
    return tmp_path / "yolop_mtl" / "x"


def fixed(*args: Any, **kwargs: Any) -> Evaluation:
    """In the place of an evaluation where its figures do not matter."""
    return Evaluation({"mAP50_95": 0.25, "drivable_mIoU": 0.5, "lane_f1": 0.1}, None, None, [])


def test_a_task_that_is_off_has_no_terms_and_no_figures(tmp_path: Path, quick: list[str]) -> None:
    folder = run(tmp_path, quick, "--model.tasks", "drivable", "--optim.epochs", "1")
    row, metrics = read_metrics(folder)[-1], read(folder / "result.json")["metrics"]
    assert "loss_drivable" in row
    for word in ("box", "obj", "cls", "lane"):
        assert not any(word in name for name in row), word
    drawn = {name for name in metrics if "drivable" not in name}
    assert drawn == {"fitness"}
    names = model_io.load(folder).model.state_dict()
    assert not any(name.startswith(("detection", "lane")) for name in names)


def test_options(tmp_path: Path, quick: list[str], quick_run: Path, capsys: Any) -> None:
    """Fitted anchors, weights to start from, a frozen part, clipping, bf16."""
    folder = run(
        tmp_path, quick, "--model.anchors", "auto", "--optim.freeze", "backbone",
        "--model.weights", str(quick_run / "model.safetensors"), "--optim.epochs", "1",
        "--optim.clip-grad", "1", "--precision", "bf16-mixed", "--no-channels-last",
    )  # fmt: skip
    told = capsys.readouterr().out
    assert re.search(r"model\.safetensors: \d+ tensors loaded, 0 missing, 0 unexpected", told)
    assert "anchors fitted to" in told
    deployed = model_io.load(folder)
    assert read(folder / "model.json")["anchors"][2][2] != [459, 401]
    start = model_io.load(quick_run).model.backbone.state_dict()
    for name, tensor in deployed.model.backbone.state_dict().items():
        assert tensor.equal(start[name]), name
    result = read(folder / "result.json")
    assert 0 < result["parameters"]["percent"] < 100
    assert result["precision"] == "bf16-mixed"


def test_training_ends_where_nothing_gets_better(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "evaluate", fixed)
    folder = run(tmp_path, quick, "--optim.epochs", "9", "--optim.patience", "2")
    assert [row["fitness"] for row in read_metrics(folder)] == [pytest.approx(0.28)] * 3
    assert read(folder / "result.json")["epochs"] == 3
    assert checkpoint.load(folder / "best.ckpt")["epoch"] == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(train, "evaluate", fixed)
    update = _Training._update

    def ruin(self: _Training) -> None:
        update(self)
        if self.step == 4:
            with torch.no_grad():
                self.learner.model.backbone.stem[0].conv.weight.fill_(torch.nan)

    monkeypatch.setattr(_Training, "_update", ruin)
    argv = ["train", "synthetic", "--runs-dir", str(tmp_path), "--name", "x", *quick]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert ONE_LINE.fullmatch(error), error
    assert re.search(
        r"error: loss: got nan in epoch 2, step 5, expected a finite loss; lower", error
    )
    folder = tmp_path / "yolop_mtl" / "x"
    state = checkpoint.load(folder / "last.ckpt")
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    monkeypatch.setattr(_Training, "_update", update)
    assert main(["train", "--resume", str(folder), "--optim.lr", "1e-4"]) == 0
    assert [row["epoch"] for row in read_metrics(folder)] == [1, 2]


def test_a_run_of_a_version_that_lacked_an_option_goes_on(quick_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(quick_run, folder)
    config = read(folder / "config.json")
    del config["model"]["lane_upsample"]
    (folder / "config.json").write_text(json.dumps(config))
    state = checkpoint.load(folder / "last.ckpt")
    del state["config"]["model"]["lane_upsample"]
    checkpoint.save(state, folder / "last.ckpt")
    card = read(folder / "model.json")
    assert card["model"].pop("lane_upsample") == "deconv"
    (folder / "model.json").write_text(json.dumps(card))
    assert main(["train", "--resume", str(folder), "--optim.epochs", "3"]) == 0
    assert read_metrics(folder)[-1]["epoch"] == 3
    argv = ["train", "--resume", str(folder), "--model.lane-upsample", "nearest"]
    assert main(argv) == 2


def test_a_run_goes_on_as_what_it_was(quick_run: Path, capsys: Any) -> None:
    for option, value, message in (
        ("--model.preset", "small", "model.preset: got small, expected nano, as before; leave it"),
        ("--optim.optimizer", "sgd", "optim.optimizer: got sgd, expected adamw, as before"),
        ("--optim.freeze", "neck", r"optim.freeze: got ['neck'], expected [], as before"),
    ):
        assert main(["train", "--resume", str(quick_run), option, value]) == 2
        assert message in capsys.readouterr().err
