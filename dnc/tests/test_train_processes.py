"""A run of two processes as torchrun starts them: one folder, equal ranks, and how it goes on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dnc import model_io, train
from dnc.cli import main
from shared_utils import checkpoint
from shared_utils.run_log import read_metrics

MEMORY = "head.memory."


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


def spy(folder: str, argv: list[str]) -> int:
    """What one of the processes does: the command, and at each checkpoint its own state aside."""
    save = train._Training._save

    def watched(self: Any, *rest: Any) -> None:
        save(self, *rest)
        name = f"{self.epoch}-{self.fabric.global_rank}.pt"
        torch.save(self.network.state_dict(), Path(folder) / name)

    train._Training._save = watched  # type: ignore[method-assign]
    return main(argv)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, quick: list[str]) -> Path:
    """A finished run of two epochs, with the states of both ranks beside it; not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    # 45 images: each rank has 23, in batches of 20 and 3; evaluated are 23 and 22.
    options = [*quick, "--data.limit", "45", "--data.crop", "pad"]
    argv = ["train", "digits", "--runs-dir", str(folder), "--name", "run", *options]
    done = two_processes(__file__, str(folder), *argv)  # this file is also the program
    assert done.returncode == 0, done.stderr
    (folder / "told.txt").write_text(done.stdout)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def state_of(place: Path, epoch: int, rank: int) -> dict[str, torch.Tensor]:
    return dict(torch.load(place / f"{epoch}-{rank}.pt", weights_only=True))


def test_one_run_folder_and_one_voice(place: Path) -> None:
    assert [path.parent.name for path in place.rglob("result.json")] == ["run"]
    assert (place / "told.txt").read_text().count("run folder") == 1
    result = read(place / "dnc" / "run" / "result.json")
    assert result["processes"] == 2
    assert result["data"]["train_images"] == 45
    rows = read_metrics(place / "dnc" / "run")
    assert [(row["step"], row["epoch"]) for row in rows] == [(2, 1), (4, 2)]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_both_ranks_hold_the_same_network_and_each_its_own_memory(place: Path, epoch: int) -> None:
    first, second = (state_of(place, epoch, rank) for rank in range(2))
    assert first.keys() == second.keys()
    assert {"head.centroids", "head.updates", "head.usage"} < first.keys()
    for name, tensor in first.items():
        if not name.startswith(MEMORY):
            assert torch.equal(tensor, second[name]), name
    filled = epoch > 0
    assert bool(first["head.updates"].any()) == filled
    assert torch.equal(first[f"{MEMORY}indices"], second[f"{MEMORY}indices"]) == (not filled)


def test_the_checkpoint_has_the_network_once_and_the_memory_of_each(place: Path) -> None:
    state = checkpoint.load(place / "dnc" / "run" / "last.ckpt")
    ranks = [state_of(place, 2, rank) for rank in range(2)]
    assert state["model"].keys() == {name for name in ranks[0] if not name.startswith(MEMORY)}
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, ranks[0][name]), name
    assert len(state["processes"]) == 2
    for own, told in zip(ranks, state["processes"], strict=True):
        assert told["memory"].keys() == {name for name in own if name.startswith(MEMORY)}
        for name, tensor in told["memory"].items():
            assert torch.equal(tensor, own[name]), name
    noise = [told["rng"]["torch"] for told in state["processes"]]
    assert not torch.equal(*noise)


def test_what_was_saved_is_what_was_tested(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "dnc" / "run"
    classifier = model_io.load(folder)
    assert classifier.head.centroids.shape == (10, 2, 512)
    assert classifier.anchors is not None
    assert len(classifier.anchors.places()) == 20
    metrics = read(folder / "result.json")["metrics"]
    for split in ("test", "val"):
        capsys.readouterr()
        argv = ["evaluate", str(folder), "--split", split, "--accelerator", "cpu"]
        assert main(argv) == 0  # by one process
        for line in capsys.readouterr().out.splitlines():
            name, value = line.split()
            if name in metrics:
                assert float(value) == pytest.approx(metrics[name], abs=5e-5)


def test_two_processes_go_on_to_the_bit(place: Path, tmp_path: Path) -> None:
    """From the checkpoint of the first epoch to that of the second, as without a stop."""
    folder = tmp_path / "half"
    shutil.copytree(place / "dnc" / "run", folder)
    (folder / "last.ckpt.prev").replace(folder / "last.ckpt")
    (folder / "result.json").unlink()
    assert checkpoint.load(folder / "last.ckpt")["epoch"] == 1
    done = two_processes("-m", "dnc", "train", "--resume", str(folder))
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout
    one, other = (checkpoint.load(run / "last.ckpt") for run in (place / "dnc" / "run", folder))
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    for own, told in zip(one["processes"], other["processes"], strict=True):
        for name, tensor in own["memory"].items():
            assert torch.equal(tensor, told["memory"][name]), name
    results = [read(run / "result.json") for run in (place / "dnc" / "run", folder)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[1]["processes"] == 2


def test_one_process_goes_on_and_says_what_differs(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "one"
    shutil.copytree(place / "dnc" / "run", folder)
    capsys.readouterr()
    assert main(["train", "--resume", str(folder), "--optim.epochs", "3"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "warning: resumed with 1 processes instead of 2: random numbers differ, and the" in told
    state = checkpoint.load(folder / "last.ckpt")
    assert (state["epoch"], len(state["processes"])) == (3, 1)
    assert read(folder / "result.json")["processes"] == 1
    pushed = state["processes"][0]["memory"][f"{MEMORY}pushed"]
    assert int(pushed.sum()) == 45  # of the third epoch alone


if __name__ == "__main__":
    sys.exit(spy(sys.argv[1], sys.argv[2:]))
