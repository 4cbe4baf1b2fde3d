"""What the commands say to wrong words and wrong data: one line, and nothing saved is lost."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from e2vpt.cli import main
from e2vpt.train import _Training

from .commands import contents, failure, write_images

# ---- wrong words ----------------------------------------------------------------------------


PRETRAIN = ["pretrain", "tiny-imagenet-32"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], ["command: got 'trian'", "did you mean 'train'?"]),
        (["zzz"], ["command: got 'zzz'", "there are bench, data, evaluate"]),
        (["train"], ["recipe: got ", "digits"]),
        (["train", "digit"], ["recipe: got 'digit'", "did you mean 'digits'?"]),
        (["train", "--optim.lr", "1"], ["recipe: got "]),
        (["train", "digits", "--optim.lrr", "1"], ["--optim.lrr: got", "mean '--optim.lr'?"]),
        (["train", "digits", "--overwrit"], ["--overwrit: got", "--overwrite"]),
        (["train", "digits", "--optim.lr", "fast"], ["optim.lr: got ", "fast"]),
        (["train", "digits", "--optim.epochs", "1.5"], ["optim.epochs: got ", "1.5"]),
        (["train", "digits", "--optim.lr", "-1"], ["optim.lr: got -1.0, expected more than 0"]),
        (["train", "digits", "--optim.lr", "nan"], ["optim.lr: got nan"]),
        (["train", "digits", "--optim.weight-decay", "inf"], ["optim.weight_decay: got inf"]),
        (["train", "digits", "--optim.epochs", "1", "--optim.warmup-epochs", "2"],
         ["optim.warmup_epochs: got 2", "expected at most optim.epochs (1)"]),
        (["train", "digits", "--model.method", "lore"], ["model.method: got ", "lore", "vpt-deep"]),
        (["train", "digits", "--model.prompt-dropout", "1"], ["model.prompt_dropout: got 1.0"]),
        (["train", "digits", "--data.batch-size", "0"], ["data.batch_size: got 0"]),
        (["train", "digits", "--data.resize", "squash"], ["data.augment: got crop"]),
        (["train", "digits", "--data.source"], ["data.source: got "]),
        (["train", "digits", "more"], ["got ", "more"]),
        (["train", "digits", "--seed", "-1"], ["seed: got -1, expected 0 to"]),
        (["train", "digits", "--devices", "0"], ["devices: got 0"]),
        (["train", "digits", "--model.backbone", "vit_bse_patch16_224"],
         ["model.backbone: got vit_bse_patch16_224", "vit_base_patch16_224"]),
        (["train", "digits", "--model.backbone", "x.pth"], ["model.architecture: got nothing"]),
        (["train", "digits", "--data.img-size", "30"], ["data.img_size: got 30x30"]),
        (["train", "--resume", "nowhere"], ["nowhere", "check the path"]),
        (["train", "images"], ["vit_base_patch16_224.augreg_in21k", "--model.backbone FILE"]),
        (["train", "images-micro"], ["data.source: got 'images', which is not there"]),
        (PRETRAIN, ["train.npz", "which is not there"]),
        (["pretrain", "tiny"], ["recipe: got 'tiny'", "tiny-imagenet-32"]),
        ([*PRETRAIN, "--model.embed-dim", "100"], ["model.embed_dim: got 100"]),
        ([*PRETRAIN, "--optim.clip-norm", "nan"], ["optim.clip_norm: got nan"]),
        ([*PRETRAIN, "--data.mix-prob", "2"], ["data.mix_prob: got 2"]),
        (["evaluate", "nowhere"], ["nowhere/config.json: got no such file"]),
        (["evaluate"], ["got "]),
        (["evaluate", "x", "--split", "tset"], ["split: got ", "tset", "val"]),
        (["predict", "nowhere", "x.png"], ["nowhere/model.json: got no such file"]),
        (["predict", "nowhere", "x.png", "--batch-size", "0"], ["batch_size: got 0"]),
        (["export", "nowhere"], ["nowhere/model.json: got no such file"]),
        (["data", "chek"], ["data: got 'chek', expected check"]),
        (["data", "check", "vatb", "x"], ["got 'vatb', expected one of vtab, fgvc"]),
        (["data", "check", "vtab", "nowhere"], ["folder: got nothing of vtab in 'nowhere'"]),
        (["train", "vtab-cifr"], ["recipe: got 'vtab-cifr'", "did you mean 'vtab-cifar'?"]),
        (["info", "vit_nowhere"], ["model.backbone: got vit_nowhere"]),
        (["info", "resnet18"], ["backbone: got class timm.models.resnet.ResNet"]),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line(
    argv: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(_Training, "run", None)  # not the whole recipe, should it be taken
    if argv[:2] == ["train", "images"]:
        monkeypatch.setattr("e2vpt.backbones._from_hub", offline)
    error = failure(argv, capsys)
    for part in parts:
        assert part in error
    assert not any(tmp_path.iterdir())  # no run folder for a run that did not start


def offline(*args: Any) -> str:
    raise OSError("no network")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["train", "predict"])
def test_a_device_that_is_not_there(
    command: str, digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "train":
        error = failure(
            ["train", "digits", "--accelerator", "gpu", "--runs-dir", str(tmp_path)], capsys
        )
        assert error.startswith("error: accelerator and devices: got gpu and 1")
    else:
        (image,) = write_images(tmp_path / "i", {"a": 1}).rglob("*.png")
        argv = ["predict", str(digits_run), str(image), "--device", "cuda"]
        assert failure(argv, capsys).startswith("error: device: got 'cuda' (")


# ---- wrong data -----------------------------------------------------------------------------


def nothing(folder: Path) -> Path:
    return folder / "absent"


def empty(folder: Path) -> Path:
    return folder


def one_class(folder: Path) -> Path:
    return write_images(folder, {"cat": 4})


def other_classes(folder: Path) -> Path:
    write_images(folder / "train", {"cat": 4, "dog": 4})
    write_images(folder / "val", {"cat": 4, "god": 4})
    return folder


def corrupt(folder: Path) -> Path:
    write_images(folder, {"cat": 6, "dog": 6})
    file = folder / "dog" / "03.png"
    file.write_bytes(file.read_bytes()[:60])
    return folder


def label_out_of_range(folder: Path) -> Path:
    file = folder / "set.npz"
    data = np.frombuffer(b"x" * 8, dtype=np.uint8)
    np.savez(file, jpeg=data, offsets=np.arange(5) * 2, label=[0, 1, 2, 1], classes=["a", "b"])
    return file


def unknown_label(folder: Path) -> Path:
    write_images(folder, {"cat": 2})
    for split, label in (("train", "cat"), ("val", "bird")):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", "label"], ["cat/00.png", label]])
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, r"error: data\.source: got '.*absent', which is not there, expected digits, a"),
        (empty, r"error: data\.source: got an empty folder '.*x', expected "),
        (one_class, r"error: data\.source: got one class only \(cat\) in '.*x', expected two"),
        (other_classes, r"got other classes in '.*val' than in train \(only in train: dog; not in"),
        (corrupt, r"error: data\.source: got 1 unreadable image: .*dog/03\.png \(.*--data\.skip-"),
        (label_out_of_range, r"set\.npz: got label 2 of image 2, expected 0 to 1, as there are 2"),
        (unknown_label, r"got label 'bird' in .*val\.csv line 2, expected a class of train\.csv"),
    ],
)  # fmt: skip
def test_wrong_data_is_one_line_and_nothing_saved_is_lost(
    make: Callable[[Path], Path],
    message: str,
    tmp_path: Path,
    quick: list[str],
    digits_run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "x").mkdir()
    source = make(tmp_path / "x")
    before = contents(digits_run)
    # The worst that can be asked for: to throw away the run of that name.
    argv = ["train", "images-micro", *quick, "--data.source", str(source), "--overwrite"]
    argv += ["--runs-dir", str(digits_run.parents[1]), "--name", digits_run.name]
    assert re.search(message, failure(argv, capsys))
    argv = ["evaluate", str(digits_run), "--source", str(source)]
    assert re.search(message, failure(argv, capsys))
    assert contents(digits_run) == before


def test_bad_images_can_be_left_out(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = corrupt(tmp_path / "x")
    argv = ["train", "images-micro", *quick, "--data.source", str(source), "--data.skip-bad"]
    assert main([*argv, "--runs-dir", str(tmp_path), "--name", "y"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"left out, unreadable: {source / 'dog' / '03.png'}" in told
    result = json.loads((tmp_path / "e2vpt" / "y" / "result.json").read_text())
    assert result["data"]["skipped_images"] == 1
    images = sum(result["data"][f"{split}_images"] for split in ("train", "val", "test"))
    assert images == 11
    assert "test_top5" not in result["metrics"]  # of two classes it says nothing


def test_evaluate_a_split_that_is_not_there(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "x" / "train", {"cat": 6, "$dog_$ü": 6})
    argv = ["train", "images-micro", *quick, "--data.source", str(tmp_path / "x")]
    assert main([*argv, "--runs-dir", str(tmp_path), "--name", "y"]) == 0
    folder = tmp_path / "e2vpt" / "y"
    scores = json.loads((folder / "result.json").read_text())["metrics"]
    assert scores.keys() == {"val_top1"}
    assert (folder / "confusion.png").stat().st_size > 5000  # of val; with a name full of signs
    error = failure(["evaluate", str(folder)], capsys)
    assert error.startswith("error: split: got 'test', which ")
    assert main(["evaluate", str(folder), "--split", "val"]) == 0
