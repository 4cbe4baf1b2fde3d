"""A run from a configuration to its folder: files, results, resume, heads, averages, anchors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dnc import model_io
from dnc.cli import main
from dnc.config import OptimConfig
from dnc.deployed import Deployed
from dnc.optim import lr_at
from dnc.train import _Training
from shared_utils import checkpoint
from shared_utils.run_log import read_metrics

FILES = {
    "config.json", "metrics.jsonl", "last.ckpt", "last.ckpt.prev", "best.ckpt",
    "model.safetensors", "model.json", "result.json", "curves.png", "confusion.png",
    "anchors.png", "tensorboard",
}  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def run(tmp_path: Path, quick: list[str], *options: str, name: str = "x") -> Path:
    argv = ["train", "digits", "--runs-dir", str(tmp_path), "--name", name, *quick, *options]
    assert main(argv) == 0
    return tmp_path / "dnc" / name


def test_the_run_folder(digits_run: Path) -> None:
    assert {path.name for path in digits_run.iterdir()} - {"best.ckpt.prev"} == FILES
    result = read(digits_run / "result.json")
    assert result["project"] == "dnc"
    assert result["metrics"].keys() == {"val_top1", "val_top5", "test_top1", "test_top5"}
    assert result["before_anchoring"].keys() == result["metrics"].keys()
    assert result["parameters"]["classifier"] == 0
    assert result["data"] == {
        "name": "digits", "train_images": 60, "val_images": 60, "test_images": 60, "skipped": 0,
    }  # fmt: skip
    for key in ("command", "seconds", "epochs", "images_per_second", "peak_memory_bytes", "device",
                "precision", "processes", "versions", "recipe", "seed", "collapse"):  # fmt: skip
        assert key in result
    rows = read_metrics(digits_run)
    assert [(row["step"], row["epoch"]) for row in rows] == [(3, 1), (6, 2)]
    for key in ("loss_dnc", "lr", "val_loss", "val_top1", "centroid_cosine", "centroid_usage",
                "centroid_unused", "centroid_movement", "centroid_purity"):  # fmt: skip
        assert key in rows[-1]
    watched = {name for name in rows[-1] if name.startswith("centroid_")}
    assert result["collapse"].keys() == watched
    assert result["collapse"]["centroid_cosine"] == rows[-1]["centroid_cosine"]
    state = checkpoint.load(digits_run / "last.ckpt")  # opens weights-only
    assert state["epoch"] == 2


def test_the_saved_classifier_is_the_one_that_was_tested(
    digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(digits_run), "--accelerator", "cpu"]) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    result = read(digits_run / "result.json")
    assert told["test_top1"] == f"{result['metrics']['test_top1']:.4f}"
    classifier = model_io.load(digits_run)
    tensors, _ = checkpoint.load_weights(digits_run / "model.safetensors")
    assert not any(name.startswith(("head.memory", "head.usage")) for name in tensors)
    assert classifier.anchors is not None
    assert len(classifier.anchors.places()) == 20
    labels = read(digits_run / "model.json")["class_names"]
    assert labels == [str(i) for i in range(10)]


@pytest.mark.parametrize("options", [[], ["--optim.ema-decay", "0.9"]], ids=["plain", "averaged"])
def test_two_and_two_epochs_are_four(
    tmp_path: Path, quick: list[str], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*options, "--optim.epochs", "4", "--data.crop", "pad", "--optim.schedule", "step"]
    straight = run(tmp_path, quick, *more, name="straight")
    epoch = _Training._epoch

    def stopping(self: _Training, number: int, bar: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    with monkeypatch.context() as patch:
        patch.setattr(_Training, "_epoch", stopping)
        argv = ["train", "digits", "--runs-dir", str(tmp_path), "--name", "halves", *quick, *more]
        assert main(argv) == 130
    halves = tmp_path / "dnc" / "halves"
    assert not (halves / "result.json").exists()
    assert main(["train", "--resume", str(halves)]) == 0
    one, other = (checkpoint.load(folder / "last.ckpt") for folder in (straight, halves))
    assert one["model"].keys() == other["model"].keys()
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    for name, tensor in one["processes"][0]["memory"].items():
        assert torch.equal(tensor, other["processes"][0]["memory"][name]), name
    both = [read(folder / "result.json")["metrics"] for folder in (straight, halves)]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("options", "classifier", "term"),
    [
        (["--model.head", "softmax"], 5130, "loss_ce"),
        # 32 pixels: at 16 the last stage convolves a map of 1 x 1 with stride 2, where oneDNN's
        # bf16 weight gradient (torch 2.13, AMX) reads memory it never wrote: nan by chance.
        (["--model.head", "softmax", "--precision", "bf16-mixed", "--data.img-size", "32"],
         5130, "loss_ce"),
        (["--model.head", "cosine"], 5120, "loss_ce"),
        (["--model.memory", "batch"], 0, "loss_dnc"),
        (["--model.memory", "bank", "--model.memory-size", "2"], 0, "loss_dnc"),
        (["--model.assignment", "gumbel"], 0, "loss_dnc"),
        (["--model.logit-norm", "affine"], 20, "loss_dnc"),
        (["--data.mixup", "0.5", "--data.cutmix", "1", "--optim.label-smoothing", "0.1",
          "--optim.clip-grad", "1", "--data.randaugment", "--data.erasing", "0.5"], 0, "loss_dnc"),
        (["--anchor.epochs", "1", "--optim.ema-decay", "0.5"], 0, "loss_dnc"),
    ],
    ids=["softmax", "softmax-bf16", "cosine", "batch", "bank", "gumbel", "affine", "mixed",
         "anchored"],
)  # fmt: skip
def test_options_of_the_method(
    tmp_path: Path, quick: list[str], options: list[str], classifier: int, term: str
) -> None:
    folder = run(tmp_path, quick, *options)
    result = read(folder / "result.json")
    assert result["parameters"]["classifier"] == classifier
    assert 0 < read_metrics(folder)[-1][term] < 10
    assert (folder / "anchors.png").exists() == (term == "loss_dnc")
    assert ("before_anchoring" in result) == (
        term == "loss_dnc" and "--anchor.epochs" not in options
    )


def test_anchors_stay_true_while_the_network_moves(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    scores = Deployed.scores

    def watched(self: Deployed, *args: Any) -> dict[str, float]:
        if self.anchors is not None:
            images = self.splits.train.plain()
            for c, k, index in self.anchors.places():
                z = self.classifier.embed(images[index][0][None])[0]
                seen.append(float(self.network.head.centroids[c, k] @ z))
        return scores(self, *args)

    monkeypatch.setattr(Deployed, "scores", watched)
    folder = run(tmp_path, quick, "--anchor.epochs", "2", "--optim.epochs", "3")
    assert len(seen) >= 3 * 20
    assert min(seen) >= 1 - 1e-4
    moved = [row["centroid_movement"] for row in read_metrics(folder)]
    assert moved[-1] == pytest.approx(0, abs=0.1)  # within an epoch they are left alone


def test_a_loss_that_is_nan_stops_the_run_and_keeps_the_last_state(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "digits", "--runs-dir", str(tmp_path), "--name", "x", *quick]
    assert main([*argv, "--optim.lr", "1e30", "--optim.optimizer", "sgd"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "lower --optim.lr and go on with --resume" in error
    assert error.count("\n") == 1
    state = checkpoint.load(tmp_path / "dnc" / "x" / "last.ckpt")
    assert all(bool(torch.isfinite(t).all()) for t in state["model"].values())


def test_what_cannot_change_when_a_run_goes_on(
    digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--resume", str(digits_run)]
    assert main([*argv, "--model.num-centroids", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.num_centroids: got 3, expected 2, as before; leave it")


def test_few_images_of_a_class_are_told(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, quick, "--model.num-centroids", "9")
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: 10 classes have fewer images than sub-centroids; the spare ones are not" in out


# ---- learning rates --------------------------------------------------------------------------


def test_schedules() -> None:
    def rates(**options: Any) -> list[float]:
        cfg = OptimConfig(lr=1.0, epochs=4, **options)
        return [lr_at(cfg, step, 2) for step in range(8)]

    assert rates(schedule="step", milestones=(1, 3)) == pytest.approx(
        [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]
    )
    assert rates(schedule="exponential", gamma=0.5) == pytest.approx(
        [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    )
    cosine = rates(warmup_epochs=1, final_lr=0.1)
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert cosine[5] == pytest.approx(0.55)
    assert cosine == [*cosine[:3], *sorted(cosine[3:], reverse=True)]
    assert cosine[-1] > 0.1
