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


# ---- segmentation ----------------------------------------------------------------------------

SEG_CONFIG = Path(__file__).parents[1] / "configs" / "digitscenes_fcn.py"
SOFTMAX_CONFIG = SEG_CONFIG.with_stem("digitscenes_fcn_softmax")


def tiny_seg(data: Path, *more: str) -> list[str]:
    """Options that make the embedded config a matter of seconds."""
    counts = {"num_train": 32, "num_val": 3, "num_test": 4}
    sizes = {**counts, "size": 48, "digits": "(2,3)", "sides": "(16,24)"}
    scenes = [
        f"{loader}_dataloader.dataset.scenes.{key}={value}"
        for loader in ("train", "val", "test")
        for key, value in sizes.items()
    ]
    return [
        "--data-root", str(data), "--cfg-options", *scenes,
        "model.backbone.base_channels=8", "model.backbone.stem_channels=8",
        "model.decode_head.in_channels=[16,64]", "model.decode_head.channels=16",
        "model.decode_head.num_centroids=2", "model.data_preprocessor.size=(48,48)",
        "train_dataloader.dataset.pipeline.2.crop_size=(48,48)",
        "train_dataloader.batch_size=2", "train_cfg.max_iters=4", "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=2", "default_hooks.logger.interval=1",
        "log_level=WARNING", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def seg_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny scenes are, or will be."""
    return tmp_path_factory.mktemp("seg") / "scenes"


@pytest.fixture(scope="session")
def seg_run(tmp_path_factory: pytest.TempPathFactory, seg_data: Path) -> Path:
    """A finished run of the embedded config in small, not to be changed."""
    runs = tmp_path_factory.mktemp("seg-runs")
    words = ["seg", "train", str(SEG_CONFIG), "--runs-dir", str(runs), "--name", "run"]
    assert main([*words, *tiny_seg(seg_data)]) == 0
    return runs / "dnc" / "run"
