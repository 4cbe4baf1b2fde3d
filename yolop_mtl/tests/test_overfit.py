"""A few generated scenes learnt by heart: every part of the way from files to figures works."""

import json
from pathlib import Path

import pytest

from shared_utils.run_log import read_metrics
from yolop_mtl.cli import main
from yolop_mtl.synth import SynthConfig, generate


@pytest.mark.slow
def test_four_scenes_are_learnt(tmp_path: Path) -> None:
    generate(SynthConfig(out=tmp_path / "scenes", num_train=4, num_val=1, size=(360, 640)))
    # Running statistics begin at 1, far from those of the first layers: after 200 steps what is
    # left of that still spoils the figures.
    options = [
        "--data.root", str(tmp_path / "scenes"), "--data.num-scenes", "4", "1",
        "--data.val-split", "train", "--data.batch-size", "4", "--data.num-workers", "0",
        "--augment.flip", "0", "--augment.scale", "0", "--augment.translate", "0",
        "--augment.hsv", "0", "0", "0", "--optim.epochs", "400", "--optim.ema-decay", "0",
        "--optim.weight-decay", "0", "--optim.warmup-epochs", "10", "--val-every", "200",
        "--accelerator", "cpu", "--model.preset", "small",
    ]  # fmt: skip
    argv = ["train", "synthetic", "--runs-dir", str(tmp_path), "--name", "x", *options]
    assert main(argv) == 0
    metrics = json.loads((tmp_path / "yolop_mtl/x/result.json").read_text())["metrics"]
    assert metrics["mAP50"] > 0.9
    assert metrics["drivable_mIoU"] > 0.95
    assert metrics["lane_IoU"] > 0.6
    rows = read_metrics(tmp_path / "yolop_mtl/x")
    assert rows[-1]["loss"] < rows[0]["loss"] / 5
