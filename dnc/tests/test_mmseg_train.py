"""`dnc seg train` through mmengine's Runner: run folder, resume, averages, wrong input."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS

from dnc.cli import main
from dnc.mmseg import checkpoints

from .conftest import SEG_CONFIG, SOFTMAX_CONFIG, tiny_seg
from .seg_data import batch, build, classifier, model_config, samples

ONE_LINE = re.compile(r"error: [^\n]+?: got [^\n]+?, expected [^\n]+; [^\n]+\n")


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["seg", *argv]) == 2
    error = capsys.readouterr().err
    assert ONE_LINE.fullmatch(error), error
    return error


def run_it(runs: Path, name: str, data: Path, *more: str, words: tuple[str, ...] = ()) -> Path:
    argv = ["seg", "train", str(SEG_CONFIG), "--runs-dir", str(runs), "--name", name, *words]
    assert main([*argv, *tiny_seg(data, *more)]) == 0
    return runs / "dnc" / name


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


# ---- the run folder --------------------------------------------------------------------------


def test_the_run_folder(seg_run: Path) -> None:
    names = {path.name for path in seg_run.iterdir() if path.is_file()}
    assert names - {"anchors.pth"} == {  # which explaining this run adds
        "config.json", "digitscenes_fcn.py", "iter_2.pth", "iter_4.pth", "last_checkpoint",
        "metrics.jsonl", "result.json", "curves.png", "predictions.png",
    }  # fmt: skip
    result = json.loads((seg_run / "result.json").read_text())
    assert result["metrics"].keys() == {"mIoU", "aAcc", "mAcc"}
    assert all(0 <= value <= 1 for value in result["metrics"].values())
    assert (result["project"], result["name"], result["recipe"]) == (
        "dnc", "run", "digitscenes_fcn",
    )  # fmt: skip
    assert result["method"] == "DNCFCNHead"
    assert result["parameters"]["classifier"] == 0
    assert result["data"] == {
        "name": "DigitScenes", "train_images": 32, "val_images": 3, "test_images": 4,
    }  # fmt: skip
    assert (result["iterations"], result["processes"], result["device"]) == (4, 1, "cpu")
    assert {"torch", "mmseg", "mmengine"} <= result["versions"].keys()
    rows = [json.loads(line) for line in (seg_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "mIoU" in row] == [2, 4]
    assert not (seg_run / "tensorboard").exists()


def test_its_checkpoint_opens_weights_only_and_holds_no_classifier(seg_run: Path) -> None:
    state = torch.load(seg_run / "iter_4.pth", weights_only=True)
    assert state["meta"]["iter"] == 4
    names = [key for key in state["state_dict"] if key.startswith("decode_head.")]
    assert not [key for key in names if "conv_seg" in key]
    assert bool(state["state_dict"]["decode_head.classifier.seeded"].any())
    assert int(state["state_dict"]["decode_head.classifier.updates"].sum()) > 0


# ---- going on --------------------------------------------------------------------------------


@HOOKS.register_module(name="StopAfterTwo")
class StopAfterTwo(Hook):
    """Ctrl-C in the second step, the last one before a checkpoint."""

    def after_train_iter(self, runner: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        if runner.iter == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_resumed_run_is_the_run(
    tmp_path: Path, seg_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = run_it(tmp_path, "straight", seg_data)
    config = tmp_path / "stopping.py"
    config.write_text(
        f"_base_ = {str(SEG_CONFIG)!r}\n"
        "custom_hooks = [dict(type='CentroidHook'), dict(type='RandomStateHook'),\n"
        "    dict(type='PlainCheckpointHook'), dict(type='StopAfterTwo')]\n"
    )
    words = ["seg", "train", str(config), "--runs-dir", str(tmp_path), "--name", "stopped"]
    capsys.readouterr()
    assert main([*words, *tiny_seg(seg_data)]) == 130
    folder = tmp_path / "dnc" / "stopped"
    told = capsys.readouterr().err
    assert f"state saved; go on with: dnc seg train --resume {folder}" in told
    assert not (folder / "iter_4.pth").exists()
    # Without the hook that stops it.
    (folder / "stopping.py").write_text(
        (folder / "stopping.py").read_text().replace("dict(type='StopAfterTwo'),", "")
    )
    assert main(["seg", "train", "--resume", str(folder)]) == 0
    one, other = weights(straight / "iter_4.pth"), weights(folder / "iter_4.pth")
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert json.loads((folder / "result.json").read_text())["iterations"] == 4


def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, seg_data: Path
) -> None:
    folder = run_it(tmp_path, "cut", seg_data)
    last = folder / "iter_4.pth"
    before = weights(last)
    last.write_bytes(last.read_bytes()[:1000])
    assert main(["seg", "train", "--resume", str(folder)]) == 0
    again = weights(last)
    assert all(torch.equal(before[key], again[key]) for key in before)


def test_averaged_weights_have_unit_sub_centroids(tmp_path: Path, seg_data: Path) -> None:
    config = tmp_path / "average.py"
    config.write_text(
        f"_base_ = {str(SEG_CONFIG)!r}\n"
        "custom_hooks = [dict(type='CentroidHook'), dict(type='PlainCheckpointHook'),\n"
        "    dict(type='EMAHook', momentum=0.5, update_buffers=True)]\n"
    )
    argv = ["seg", "train", str(config), "--runs-dir", str(tmp_path), "--name", "average"]
    assert main([*argv, *tiny_seg(seg_data)]) == 0
    state = torch.load(tmp_path / "dnc" / "average" / "iter_4.pth", weights_only=True)
    key = "decode_head.classifier.centroids"
    averaged, latest = state["state_dict"][key], state["ema_state_dict"][f"module.{key}"]
    for points in (averaged, latest):
        norms = points.norm(dim=2)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0)
    assert not torch.equal(averaged, latest)
    counts = "decode_head.classifier.updates"
    assert torch.equal(state["state_dict"][counts], state["ema_state_dict"][f"module.{counts}"])


def test_without_averaged_buffers_the_latest_sub_centroids_go_along(
    tmp_path: Path, seg_data: Path
) -> None:
    config = tmp_path / "latest.py"
    config.write_text(
        f"_base_ = {str(SEG_CONFIG)!r}\n"
        "custom_hooks = [dict(type='CentroidHook'), dict(type='PlainCheckpointHook'),\n"
        "    dict(type='EMAHook', momentum=0.5)]\n"
    )
    argv = ["seg", "train", str(config), "--runs-dir", str(tmp_path), "--name", "latest"]
    assert main([*argv, *tiny_seg(seg_data)]) == 0
    state = torch.load(tmp_path / "dnc" / "latest" / "iter_4.pth", weights_only=True)
    key = "decode_head.classifier.centroids"
    assert torch.equal(state["state_dict"][key], state["ema_state_dict"][f"module.{key}"])


# ---- start from somewhere --------------------------------------------------------------------


def test_a_softmax_run_starts_one_with_sub_centroids(tmp_path: Path, seg_data: Path) -> None:
    extra = [word for word in tiny_seg(seg_data) if "num_centroids" not in word]
    argv = ["seg", "train", str(SOFTMAX_CONFIG), "--runs-dir", str(tmp_path), "--name", "softmax"]
    assert main([*argv, *extra]) == 0
    path = tmp_path / "dnc" / "softmax" / "iter_4.pth"
    run_it(tmp_path, "dnc", seg_data, f"load_from={path}")
    made = weights(tmp_path / "dnc" / "dnc" / "iter_4.pth")
    assert bool(made["decode_head.classifier.seeded"].any())


# ---- wrong input -----------------------------------------------------------------------------


def test_errors_of_one_line(
    seg_run: Path, seg_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(SEG_CONFIG), "--runs-dir", str(seg_run.parents[1])]
    tiny = tiny_seg(seg_data)
    assert "--name: got run, which exists" in failure([*words, "--name", "run", *tiny], capsys)
    assert "config: got nothing" in failure(["train"], capsys)
    assert "seed: got -1" in failure([*words, "--seed", "-1"], capsys)
    assert "command: got 'trian'" in failure(["trian"], capsys)
    assert "no such file" in failure(["train", str(tmp_path / "gone.py")], capsys)
    assert "config.json: got no such file" in failure(["train", "--resume", str(tmp_path)], capsys)
    wrong = tiny_seg(seg_data, "model.decode_head.out_channels=1")
    told = "out_channels: got 1, expected 11, as num_classes"
    new = ["train", str(SEG_CONFIG), "--runs-dir", str(tmp_path)]
    assert told in failure([*new, *wrong], capsys)
    wrong = tiny_seg(seg_data, "model.decode_head.num_classes=12")
    assert "num_classes: got 12, expected 11" in failure([*new, *wrong], capsys)
    foreign = tmp_path / "foreign.pth"
    torch.save({"state_dict": {}, "object": copy.copy}, foreign)
    wrong = tiny_seg(seg_data, f"load_from={foreign}")
    assert "got more than tensors and plain data" in failure([*new, *wrong], capsys)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["seg", "--help"])
    told = capsys.readouterr().out
    for name in ("train", "evaluate", "predict", "explain", "fit"):
        assert f"\n  {name} " in told
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["seg", name, "--help"])
        assert f"usage: dnc seg {name}" in capsys.readouterr().out


# ---- several processes -----------------------------------------------------------------------


def two_processes(store: str, own_rank: int) -> None:
    """Two steps under mmengine's wrapper, the second with nothing to learn from on one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=own_rank, world_size=2)
    model = build(model_config())
    wrapped = MMDistributedDataParallel(module=model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for turn in range(3):
        images, labels = batch(10 * turn + own_rank)
        if turn == 1 and own_rank == 1:
            labels = torch.full_like(labels, 255)
        losses = wrapped(images, samples(labels), mode="loss")
        optimizer.zero_grad()
        losses["decode.loss_ce"].backward()
        optimizer.step()
        classifier(model).update()
    for tensor in (classifier(model).centroids, classifier(model).updates.float()):
        parts = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(parts, tensor)
        assert torch.equal(*parts)
    assert int(classifier(model).updates.max()) == 3
    dist.barrier()


def test_two_processes_without_looking_for_unused_parameters(tmp_path: Path) -> None:
    code = (
        "import sys; from dnc.tests.test_mmseg_train import two_processes; "
        "two_processes(sys.argv[1], int(sys.argv[2]))"
    )
    # Found as the namespace package that pytest sees too.
    root = Path(__file__).parents[2]
    script = tmp_path / "go.py"
    script.write_text(
        "import importlib.util, sys, types\n"
        f"tests = {str(root / 'dnc' / 'tests')!r}\n"
        "package = types.ModuleType('dnc.tests'); package.__path__ = [tests]\n"
        "import dnc; sys.modules['dnc.tests'] = package\n" + code + "\n"
    )
    store = f"file://{tmp_path / 'store'}"
    both = [
        subprocess.Popen(
            [sys.executable, str(script), store, str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in both:
        told, _ = process.communicate(timeout=600)
        assert process.returncode == 0, told


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path, seg_data: Path) -> None:
    argv = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "dnc", "seg", "train", str(SEG_CONFIG), "--runs-dir", str(tmp_path),
        "--name", "two", *tiny_seg(seg_data),
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "dnc" / "two" / "result.json").read_text())
    assert result["processes"] == 2
    assert checkpoints.load(tmp_path / "dnc" / "two" / "iter_4.pth")["meta"]["iter"] == 4
