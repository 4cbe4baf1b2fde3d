"""A run from a configuration to its folder: files, result, resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared_utils import checkpoint
from shared_utils.run_log import read_metrics
from yolop_mtl import model_io, report, train
from yolop_mtl.cli import main
from yolop_mtl.train import _Training

FILES = {
    "config.json", "metrics.jsonl", "last.ckpt", "last.ckpt.prev", "best.ckpt",
    "model.safetensors", "model.json", "result.json", "curves.png", "predictions.png",
    "train_images.png", "boxes.png", "lanes.png", "tensorboard",
}  # fmt: skip
TERMS = {
    "detection": {"loss_box", "loss_obj", "loss_cls"},
    "drivable": {"loss_drivable"},
    "lane": {"loss_lane_focal", "loss_lane_dice", "loss_lane_iou"},
}
FIGURES = {
    "detection": {"mAP50", "mAP50_95", "precision", "recall"},
    "drivable": {"drivable_mIoU"},
    "lane": {"lane_IoU", "lane_accuracy", "lane_f1"},
}


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are looked at in the run that tests share; drawing them takes the longest."""
    monkeypatch.setattr(report, "plot_curves", lambda *args: None)
    monkeypatch.setattr(train, "write_curves", lambda *args: None)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def run(tmp_path: Path, quick: list[str], *options: str, name: str = "x") -> Path:
    argv = ["train", "synthetic", "--runs-dir", str(tmp_path), "--name", name, *quick, *options]
    assert main(argv) == 0
    return tmp_path / "yolop_mtl" / name


def test_the_run_folder(quick_run: Path) -> None:
    assert {path.name for path in quick_run.iterdir()} - {"best.ckpt.prev"} == FILES
    result = read(quick_run / "result.json")
    assert result["project"] == "yolop_mtl"
    assert FIGURES["detection"] | FIGURES["drivable"] | FIGURES["lane"] <= result["metrics"].keys()
    assert {"legacy_mAP50", "legacy_lane_accuracy", "fitness"} <= result["metrics"].keys()
    assert "legacy_lane_f1" not in result["metrics"]
    assert result["data"] == {
        "name": "scenes", "train_images": 6, "val_images": 3, "test_images": 0,
    }  # fmt: skip
    assert result["parameters"]["percent"] == 100
    for key in ("command", "seconds", "epochs", "images_per_second", "peak_memory_bytes", "device",
                "precision", "processes", "versions", "recipe", "seed", "name"):  # fmt: skip
        assert key in result
    rows = read_metrics(quick_run)
    assert [(row["step"], row["epoch"]) for row in rows] == [(3, 1), (6, 2)]
    for row in rows:
        terms = set().union(*TERMS.values())
        assert terms | {"loss", "lr", "seconds", "images_per_second", "lane_f1"} <= row.keys()
        assert row["loss"] == pytest.approx(sum(row[term] for term in terms), rel=1e-5)
    best = max(rows, key=lambda row: float(row["fitness"]))
    assert result["metrics"]["fitness"] == pytest.approx(best["fitness"])
    assert checkpoint.load(quick_run / "last.ckpt")["epoch"] == 2  # opens weights-only


def test_the_saved_network_is_the_one_that_was_measured(quick_run: Path, tmp_path: Path) -> None:
    best = checkpoint.load(quick_run / "best.ckpt")
    deployed = model_io.load(quick_run)
    for name, tensor in deployed.model.state_dict().items():
        assert tensor.equal(best["ema"]["model"][name]), name
    assert (deployed.class_names, deployed.img_size) == (("vehicle",), (64, 96))
    argv = ["val", str(quick_run), "--accelerator", "cpu", "--num-workers", "0"]
    assert main([*argv, "--batch-size", "2", "--out", str(tmp_path / "val")]) == 0
    again = read(tmp_path / "val/val.json")["metrics"]
    metrics = read(quick_run / "result.json")["metrics"]
    assert again.keys() == metrics.keys() - {"fitness"}
    for name, value in again.items():
        assert value == pytest.approx(metrics[name], abs=1e-4), name


def test_two_and_two_epochs_are_four(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--optim.epochs", "4", "--optim.accumulate", "2", "--augment.mosaic", "1",
            "--augment.close-mosaic", "1", "--optim.optimizer", "sgd", "--optim.lr", "0.01",
            "--loss.is-learned"]  # fmt: skip
    straight = run(tmp_path, quick, *more, name="straight")
    epoch = _Training._epoch

    def stopping(self: _Training, number: int, bar: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    with monkeypatch.context() as patch:
        patch.setattr(_Training, "_epoch", stopping)
        argv = ["train", "synthetic", "--runs-dir", str(tmp_path), "--name", "halves"]
        assert main([*argv, *quick, *more]) == 130
    halves = tmp_path / "yolop_mtl" / "halves"
    assert not (halves / "result.json").exists()
    assert main(["train", "--resume", str(halves)]) == 0
    one, other = (checkpoint.load(folder / "last.ckpt") for folder in (straight, halves))
    assert one["ema"]["updates"] == one["step"] == 8  # batches 2 and 1 of each epoch
    for part in ("model", "loss_weights"):
        for name, tensor in one[part].items():
            assert tensor.equal(other[part][name]), name
    for name, tensor in one["ema"]["model"].items():
        assert tensor.equal(other["ema"]["model"][name]), name
    timed = {"seconds", "images_per_second"}
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(folder)]
        for folder in (straight, halves)
    ]
    assert rows[0] == rows[1]
    both = [read(folder / "result.json")["metrics"] for folder in (straight, halves)]
    assert both[0] == both[1]
