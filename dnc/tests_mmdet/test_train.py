"""A detector trains, is measured, goes on, and learns, on generated scenes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dnc.mmdet.__main__ import main
from shared_utils import checkpoint

CONFIG = Path(__file__).parents[1] / "configs" / "digitboxes_faster_rcnn.py"


def tiny(data: Path, *more: str) -> list[str]:
    counts = {"num_train": 8, "num_val": 2, "num_test": 4}
    sizes = {**counts, "size": 64, "digits": "(1,2)", "sides": "(24,30)"}
    scenes = [
        f"{loader}_dataloader.dataset.scenes.{key}={value}"
        for loader in ("train", "val", "test")
        for key, value in sizes.items()
    ]
    return [
        "--data-root", str(data), "--cfg-options", *scenes,
        "model.backbone.base_channels=8", "model.backbone.stem_channels=8",
        "model.neck.in_channels=[8,16,32,64]", "train_dataloader.batch_size=4",
        "train_cfg.max_epochs=2", "train_cfg.val_interval=1", "default_hooks.checkpoint.interval=1",
        "default_hooks.logger.interval=1", "log_level=WARNING", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run folder and data folder of a tiny training."""
    base = tmp_path_factory.mktemp("det")
    options = ["--runs-dir", str(base / "runs"), "--name", "x", *tiny(base / "scenes")]
    assert main([str(CONFIG), *options]) == 0
    return base / "runs" / "dnc" / "x", base / "scenes"


def test_the_run_folder(run: tuple[Path, Path]) -> None:
    result = json.loads((run[0] / "result.json").read_text())
    assert result["metrics"].keys() == {"mAP", "mAP50", "mAP75"}
    assert all(0 <= value <= 1 for value in result["metrics"].values())
    assert result["method"] == "DNCShared2FCBBoxHead"
    assert result["parameters"]["classifier"] == 0
    assert result["data"] == {
        "name": "DigitBoxes", "train_images": 8, "val_images": 2, "test_images": 4,
    }  # fmt: skip
    state = checkpoint.load(run[0] / "epoch_2.pth")  # opens weights-only
    updates = state["state_dict"]["roi_head.bbox_head.fc_cls.updates"]
    assert int(updates[-1].min()) >= 1  # of the background


def test_a_run_goes_on(run: tuple[Path, Path], capsys: Any) -> None:
    more = ["train_cfg.max_epochs=3", "log_level=WARNING"]
    assert main(["--resume", str(run[0]), "--data-root", str(run[1]), "--cfg-options", *more]) == 0
    assert json.loads((run[0] / "result.json").read_text())["epochs"] == 3


def test_wrong_input_is_one_line(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path / "no.py")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_half_precision_on_a_cpu_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main([str(CONFIG), "--amp", "--runs-dir", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: amp: got True without a GPU, expected a GPU: on a CPU")
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_learns_to_find_digits(tmp_path: Path) -> None:
    options = ["--runs-dir", str(tmp_path), "--name", "x", "--data-root", str(tmp_path / "scenes")]
    torch.manual_seed(0)
    assert main([str(CONFIG), *options]) == 0
    metrics = json.loads((tmp_path / "dnc" / "x" / "result.json").read_text())["metrics"]
    assert metrics["mAP50"] >= 0.5
