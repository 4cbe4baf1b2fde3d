"""Two processes as torchrun starts them: gradients of one, one run folder, all images measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from shared_utils import checkpoint
from shared_utils.run_log import read_metrics
from yolop_mtl.assemble import build_losses, build_network
from yolop_mtl.cli import main
from yolop_mtl.config import DataConfig, LossConfig, ModelConfig, RunConfig
from yolop_mtl.devices import launch_fabric
from yolop_mtl.learner import Learner
from yolop_mtl.targets import ImageTargets, Targets, collate_targets

SIZE = (64, 128)


def two_processes(*program: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *launcher, *program],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def images_of(numbers: range) -> tuple[Tensor, Targets]:
    """Images with as many positives and labelled pixels each, so that means of means are means."""
    images, items = [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        images.append(torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8))
        boxes = torch.tensor([[45.0 + 32 * (number % 2), 35.0, 30.0, 20.0]])
        drivable, lane = torch.zeros(SIZE), torch.zeros(SIZE)
        drivable[30 + number :] = 1
        lane[:, 10 * number : 10 * number + 4] = 1
        items.append(ImageTargets(boxes, torch.tensor([0]), drivable=drivable, lane=lane))
    return torch.stack(images), collate_targets(items, SIZE)


def gradients(fabric: Fabric, numbers: range) -> dict[str, Tensor]:
    """Of a network whose norms have running statistics, on these images."""
    torch.manual_seed(0)
    model = build_network(ModelConfig(preset="nano"), DataConfig(img_size=SIZE), num_classes=1)
    network = Learner(model, *build_losses(LossConfig(assign="plain"), model, SIZE))
    module: Any = fabric.setup(network)
    module.eval()
    fabric.backward(module(*images_of(numbers))[0])
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def program(folder: str, argv: list[str]) -> int:
    """What one of the processes does: gradients of its half of the images, then the command."""
    fabric = launch_fabric(RunConfig(accelerator="cpu"))
    found = gradients(fabric, range(2 * fabric.global_rank, 2 * fabric.global_rank + 2))
    torch.save(found, Path(folder) / f"{fabric.global_rank}.pt")
    return main(argv)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, quick: list[str]) -> Path:
    """Gradients of both ranks and a finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    options = [*quick, "--data.batch-size", "1", "--optim.epochs", "1"]
    argv = ["train", "synthetic", "--runs-dir", str(folder), "--name", "run", *options]
    done = two_processes(__file__, str(folder), *argv)  # this file is also the program
    assert done.returncode == 0, done.stderr
    (folder / "told.txt").write_text(done.stdout)
    return folder


def test_gradients_of_two_processes_are_those_of_one(place: Path) -> None:
    first, second = (torch.load(place / f"{rank}.pt", weights_only=True) for rank in range(2))
    whole = gradients(launch_fabric(RunConfig(accelerator="cpu")), range(4))
    assert whole.keys() == first.keys()
    for name, grad in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_one_run_folder_and_one_voice(place: Path) -> None:
    assert [path.parent.name for path in place.rglob("result.json")] == ["run"]
    assert (place / "told.txt").read_text().count("run folder") == 1
    result = json.loads((place / "yolop_mtl/run/result.json").read_text())
    assert result["processes"] == 2
    assert result["data"]["train_images"] == 6
    rows = read_metrics(place / "yolop_mtl/run")
    assert [(row["step"], row["epoch"]) for row in rows] == [(3, 1)]
    state = checkpoint.load(place / "yolop_mtl/run/last.ckpt")
    assert len(state["rng"]) == 2


def test_figures_are_of_the_images_of_both(place: Path) -> None:
    metrics = json.loads((place / "yolop_mtl/run/result.json").read_text())["metrics"]
    argv = ["val", str(place / "yolop_mtl/run"), "--accelerator", "cpu", "--num-workers", "0"]
    assert main([*argv, "--out", str(place / "val")]) == 0  # by one process
    again = json.loads((place / "val/val.json").read_text())["metrics"]
    assert again.keys() == metrics.keys() - {"fitness"}
    for name, value in again.items():
        assert value == pytest.approx(metrics[name], abs=1e-4), name


if __name__ == "__main__":
    sys.exit(program(sys.argv[1], sys.argv[2:]))
