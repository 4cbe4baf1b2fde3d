"""Runs that several tests look at, each made once."""

from pathlib import Path

import pytest

from dnc.cli import main

QUICK = [
    "--data.limit", "60", "--data.batch-size", "20", "--data.img-size", "16",
    "--optim.epochs", "2", "--optim.warmup-epochs", "0", "--accelerator", "cpu",
    "--precision", "32-true", "--model.num-centroids", "2", "--model.memory-size", "8",
]  # fmt: skip


@pytest.fixture(scope="session")
def quick() -> list[str]:
    """Options that make recipe digits a matter of seconds."""
    return QUICK


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["train", "digits", "--runs-dir", str(runs), "--name", "run", *QUICK]) == 0
    return runs / "dnc" / "run"
