"""The commands as a user meets them: files, results, help, errors of one line."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from e2vpt import cli
from e2vpt.bench import BenchConfig
from e2vpt.cli import main
from e2vpt.config import TrainConfig
from e2vpt.data_check import CheckConfig
from e2vpt.pretrain_config import PretrainConfig
from e2vpt.recipes import RECIPES
from e2vpt.search_config import SearchConfig
from e2vpt.train import _Training
from shared_utils import checkpoint

RUN_FILES = {
    "config.json", "metrics.jsonl", "last.ckpt", "last.ckpt.prev", "best.ckpt",
    "model.safetensors", "model.json", "result.json", "initial.safetensors",
    "curves.png", "confusion.png", "predictions.png", "prompts.png", "prompts.json", "tensorboard",
}  # fmt: skip
ONE_LINE = re.compile(r"error: [^\n]+?: got [^\n]+?, expected [^\n]+; [^\n]+\n")


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that the user must word otherwise."""
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert ONE_LINE.fullmatch(error), error
    return error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_images(folder: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """A folder per class with so many images, each class of a colour of its own."""
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        colour = np.random.default_rng(sum(map(ord, name))).integers(0, 200, 3)
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(colour + rng.integers(0, 55, (20, 24, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:02d}.png")
    return folder


# ---- train and evaluate ---------------------------------------------------------------------


def test_run_folder_holds_exactly_the_promised_files(digits_run: Path) -> None:
    found = {path.name for path in digits_run.iterdir()}
    assert found - {"best.ckpt.prev"} == RUN_FILES
    for path in digits_run.rglob("*"):
        assert path.is_dir() or path.stat().st_size > 0, path
    (events,) = (digits_run / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents")
    for path in digits_run.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(set(image.convert("L").resize((64, 64)).get_flattened_data())) > 5
    for path in (*digits_run.glob("*.ckpt"), digits_run / "last.ckpt.prev"):
        assert torch.load(path, weights_only=True)["config"]["recipe"] == "digits"


RESULT_TYPES: dict[str, Any] = {
    "project": str, "name": str, "command": list, "recipe": str, "seed": int,
    "metrics": {"val_top1": float, "test_top1": float, "test_top5": float},
    "parameters": {"tuned": int, "total": int, "percent": float},
    "data": {"name": str, "train_images": int, "val_images": int, "test_images": int},
    "seconds": float, "epochs": int, "images_per_second": float, "peak_memory_bytes": int,
    "device": str, "precision": str, "processes": int,
    "versions": {"python": str, "torch": str, "timm": str},
}  # fmt: skip


def assert_types(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, kind in wanted.items():
        if isinstance(kind, dict):
            assert_types(found[key], kind)
        else:
            assert type(found[key]) is kind, key


def test_result_has_every_key_of_the_contract(digits_run: Path) -> None:
    result = json.loads((digits_run / "result.json").read_text())
    assert_types(result, RESULT_TYPES)
    assert (result["project"], result["name"], result["recipe"]) == ("e2vpt", "done", "digits")
    assert all(0 <= value <= 1 for value in result["metrics"].values())
    counts = result["parameters"]
    assert counts["percent"] == pytest.approx(100 * counts["tuned"] / counts["total"])
    assert result["data"] == {
        "name": "digits", "train_images": 40, "val_images": 40, "test_images": 40,
        "skipped_images": 0,
    }  # fmt: skip
    assert result["versions"]["torch"] == torch.__version__
    assert result["device"] == "cpu"
    assert result["processes"] == 1
    assert result["epochs"] == 2
    assert result["seconds"] > 0
    assert result["images_per_second"] > 0
    assert result["peak_memory_bytes"] > 10**7


def test_metrics_have_a_line_per_epoch(digits_run: Path) -> None:
    rows = [json.loads(line) for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        keys = {"step", "epoch", "seconds", "loss_ce", "lr", "val_top1", "val_top5"}
        assert row.keys() == keys | {"images_per_second"}
        assert all(isinstance(value, int | float) for value in row.values())


@pytest.mark.parametrize(("split", "which"), [("test", "last"), ("val", "last"), ("val", "best")])
def test_evaluate_repeats_the_score(
    digits_run: Path, capsys: pytest.CaptureFixture[str], split: str, which: str
) -> None:
    before = contents(digits_run)
    assert main(["evaluate", str(digits_run), "--split", split, "--which", which]) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    if which == "best":
        expected = {"val_top1": checkpoint.load(digits_run / "best.ckpt")["best"]}
        told = {"val_top1": told["val_top1"]}
    else:
        scores = json.loads((digits_run / "result.json").read_text())["metrics"]
        expected = {name: value for name, value in scores.items() if name.startswith(split)}
    assert told == {name: f"{value:.4f}" for name, value in expected.items()}
    assert contents(digits_run) == before


def test_evaluate_on_other_data(
    tmp_path: Path, digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {str(digit): 2 for digit in range(10)}
    write_images(tmp_path / "x" / "train", names)
    write_images(tmp_path / "x" / "test", names)
    assert main(["evaluate", str(digits_run), "--source", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out.startswith("test_top1 0.")
    write_images(tmp_path / "y" / "train", {"cat": 2, "dog": 2})
    error = failure(["evaluate", str(digits_run), "--source", str(tmp_path / "y")], capsys)
    assert error.startswith("error: source: got classes cat, dog")


def test_the_same_command_twice_gives_two_folders(tmp_path: Path, quick: list[str]) -> None:
    argv = ["train", "digits", "--runs-dir", str(tmp_path), *quick, "--optim.epochs", "1"]
    assert main(argv) == main(argv) == 0
    folders = list((tmp_path / "e2vpt").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert re.fullmatch(r"digits-\d{8}-\d{6}(-2)?", folder.name)
        assert (folder / "result.json").is_file()


def test_an_existing_name_is_refused_or_overwritten(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "digits", "--runs-dir", str(tmp_path), "--name", "x", *quick]
    argv += ["--optim.epochs", "1"]
    assert main(argv) == 0
    folder = tmp_path / "e2vpt" / "x"
    before = contents(folder)
    error = failure(argv, capsys)
    assert error.startswith("error: --name: got ")
    assert f"--resume {folder}" in error
    assert "--overwrite" in error
    # Wrong input is seen before the old run is thrown away.
    failure([*argv, "--overwrite", "--data.source", str(tmp_path / "nothing")], capsys)
    failure([*argv, "--overwrite", "--model.backbone", "vit_nowhere"], capsys)
    assert contents(folder) == before
    (folder / "mine.txt").touch()
    assert main([*argv, "--overwrite"]) == 0
    assert not (folder / "mine.txt").exists()
    assert (folder / "result.json").is_file()


def test_resume_keeps_the_options_of_the_run(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "digits", "--runs-dir", str(tmp_path), "--name", "x", *quick]
    assert main([*argv, "--optim.epochs", "1", "--model.num-visual-prompts", "3"]) == 0
    folder = tmp_path / "e2vpt" / "x"
    assert main(["train", "--resume", str(folder), "--optim.epochs", "2"]) == 0
    stored = json.loads((folder / "config.json").read_text())
    assert (stored["optim"]["epochs"], stored["model"]["num_visual_prompts"]) == (2, 3)
    assert {path.name for path in folder.iterdir()} - {"best.ckpt.prev"} == RUN_FILES
    error = failure(["train", "images", "--resume", str(folder)], capsys)
    assert "got 'images', expected 'digits'" in error


def test_a_bug_keeps_its_traceback(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(self: Any, *args: Any) -> float:
        raise KeyError("surprise")

    monkeypatch.setattr(_Training, "_step", bug)
    with pytest.raises(KeyError, match="surprise"):
        main(["train", "digits", "--runs-dir", str(tmp_path), *quick])


def test_module_runs_as_a_command() -> None:
    """One process from start to end: the exit status, and nothing but the line on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "e2vpt", "train", "digits", "--data.source", "nowhere"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert ONE_LINE.fullmatch(done.stderr), done.stderr
    assert done.stderr.startswith("error: data.source: got 'nowhere'")
    assert done.stdout == ""


# ---- help -----------------------------------------------------------------------------------

CONFIGS: dict[str, Any] = {
    "train": TrainConfig,
    "search": SearchConfig,
    "prune": TrainConfig,
    "evaluate": cli.EvaluateConfig,
    "predict": cli.PredictConfig,
    "export": cli.ExportConfig,
    "info": cli.InfoConfig,
    "data": CheckConfig,
    "pretrain": PretrainConfig,
    "bench": BenchConfig,
}


def options_of(cls: Any, prefix: str = "--") -> list[str]:
    """Every option of a configuration; of those given by place, nothing."""
    found = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        kind = typing.get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(kind):
            bare = any(getattr(mark, "name", None) == "" for mark in marks)
            found += options_of(kind, prefix if bare else f"{prefix}{name}.")
        elif not any(mark in (tyro.conf.Suppress, tyro.conf.Positional) for mark in marks):
            found.append(f"{prefix}{name}".replace("_", "-"))
    return found


def help_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr()
    assert told.err == ""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", told.out).split())


def test_the_commands_are_those_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert CONFIGS.keys() == cli.COMMANDS.keys()
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        listed = re.findall(r"^  (\w+)  +\w", capsys.readouterr().out, re.MULTILINE)
        assert listed == list(CONFIGS)


@pytest.mark.parametrize("command", CONFIGS)
def test_help_lists_every_option_with_its_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of([command], capsys)
    expected = options_of(CONFIGS[command])
    assert expected
    blocks = re.split(r" (?=--[a-z][\w.-]*[ ,])", text)
    for option in expected:
        found = [b for b in blocks if re.match(rf"{re.escape(option)}[ ,]", b)]
        assert found, option
    assert text.count("(default:") + text.count("(required)") >= len(expected)
    assert f"e2vpt {command}" in text


def test_help_of_train_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(["train"], capsys)
    for name, recipe in RECIPES.items():  # those of one description stand before it together
        assert re.search(rf" {name} ([\w-]+ )*{re.escape(recipe.about)}", text)
    assert text.count("each a VTAB-1k task") == text.count("each an FGVC data set") == 1
    assert "--resume RUN" in text


def test_help_of_a_recipe_shows_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(default: vit_base_patch16_224.augreg_in21k)" in help_of(["train", "images"], capsys)


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


# ---- info -----------------------------------------------------------------------------------


def test_info_counts_as_the_paper_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "vit_base_patch16_224"]) == 0
    told = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    counts = {name: int(told[name].replace(",", "")) for name in ("visual", "kv", "head", "tuned")}
    assert counts == {"visual": 92_160, "kv": 46_080, "head": 76_900, "tuned": 215_140}


def test_info_of_a_run(digits_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(digits_run)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^classes +10$", told, re.MULTILINE)
    assert re.search(r"^tuned +1,418$", told, re.MULTILINE)
    assert "num_visual_prompts 4" in told
