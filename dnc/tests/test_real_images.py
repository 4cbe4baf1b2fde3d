"""Oracle 32 on real images: sub-centroids beside softmax at equal budget."""

import json
import os
from pathlib import Path

import pytest

from dnc.cli import main

BUDGET = (
    "--data.num-train 10000 --data.num-val 2000 --data.num-test 20000 --data.batch-size 128 "
    "--model.encoder test_resnet --model.stem imagenet --model.embed-norm --optim.lr 0.1 "
    "--optim.epochs 12 --precision bf16-mixed --anchor.skip --seed 0"
)
HEADS = {
    "softmax": "--model.head softmax",
    "dnc": "--model.no-warm-start --model.correct-only-after 300",
}


@pytest.mark.slow
def test_dnc_is_within_1_5_points_of_softmax(tmp_path: Path) -> None:
    """CIFAR-10 (JPEG copy), ResNet of 0.37 million weights."""
    folder = Path(os.environ.get("PAPERS_DATA") or Path(__file__).parents[2] / "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no real data: '{folder}' is absent (PAPERS_DATA names another folder)")
    images = folder / "cifar10_jpeg" / "train.npz"
    found = {}
    for name, options in HEADS.items():
        argv = ["train", "images", "--runs-dir", str(tmp_path), "--name", name]
        argv += ["--data.source", str(images), *BUDGET.split(), *options.split()]
        assert main(argv) == 0
        result = json.loads((tmp_path / "dnc" / name / "result.json").read_text())
        found[name] = result["metrics"]["test_top1"]
    assert found["softmax"] > 0.55
    assert found["dnc"] > found["softmax"] - 0.015
