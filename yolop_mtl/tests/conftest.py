"""What tests of several modules share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from yolop_mtl import build_model, model_io
from yolop_mtl.cli import main
from yolop_mtl.config import DataConfig, ModelConfig
from yolop_mtl.synth import SynthConfig, generate

from .networks import enliven

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def papers_data() -> Path:
    """The folder of real public data; without it the tests that use it are skipped."""
    folder = Path(os.environ.get("PAPERS_DATA") or ROOT / "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no real data: '{folder}' is absent (PAPERS_DATA names another folder)")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    """One thread: more cost tiny tensors much time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def driving_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few small generated scenes in BDD100K's form, not to be changed."""
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    generate(SynthConfig(out=root, num_train=6, num_val=3, size=(120, 160)))
    return root


@pytest.fixture(scope="session")
def quick(driving_scenes: Path) -> list[str]:
    """Options that make recipe synthetic a matter of seconds."""
    return [
        "--data.root", str(driving_scenes), "--data.num-scenes", "6", "3",
        "--data.scene-size", "120", "160", "--data.img-size", "64", "96",
        "--data.batch-size", "2", "--data.num-workers", "0", "--optim.epochs", "2",
        "--accelerator", "cpu", "--precision", "32-true", "--val-every", "1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory, quick: list[str]) -> Path:
    """A finished run, not to be changed."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["train", "synthetic", "--runs-dir", str(runs), "--name", "run", *quick]) == 0
    return runs / "yolop_mtl" / "run"


# ---- exported files --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a network of three classes, whose random weights find boxes; not to be changed."""
    folder = tmp_path_factory.mktemp("lively")
    torch.manual_seed(0)
    net = enliven(build_model("nano", num_classes=3))
    for output in net.detection.outputs:
        torch.nn.init.normal_(output.weight, std=1.0)
        torch.nn.init.zeros_(output.bias)
    config, data = ModelConfig(preset="nano"), DataConfig(img_size=(64, 96))
    model_io.save(net, folder, config=config, data=data, class_names=("car", "bus", "tram"))
    return folder


@pytest.fixture(scope="session")
def with_nms(tmp_path_factory: pytest.TempPathFactory, lively: Path) -> Path:
    """The same as ONNX of a fixed size, with suppression inside."""
    out = tmp_path_factory.mktemp("nms")
    argv = ["export", str(lively), "--out", str(out), "--nms", "--img-size", "64", "96"]
    assert main(argv) == 0
    return out / "model_nms.onnx"
