"""The commands as a user meets them: files, results, help."""

import dataclasses
import json
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

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

from .commands import ONE_LINE, contents, failure, write_images

RUN_FILES = {
    "config.json", "metrics.jsonl", "last.ckpt", "last.ckpt.prev", "best.ckpt",
    "model.safetensors", "model.json", "result.json", "initial.safetensors",
    "curves.png", "confusion.png", "predictions.png", "prompts.png", "prompts.json", "tensorboard",
}  # fmt: skip


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
        assert row.keys() == keys | {"images_per_second", "val_loss"}
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
        assert 0 < float(told.pop(f"{split}_loss")) < 10
    assert told == {name: f"{value:.4f}" for name, value in expected.items()}
    assert contents(digits_run) == before


def test_evaluate_on_other_data(
    tmp_path: Path, digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {str(digit): 2 for digit in range(10)}
    write_images(tmp_path / "x" / "train", names)
    write_images(tmp_path / "x" / "test", names)
    assert main(["evaluate", str(digits_run), "--source", str(tmp_path / "x")]) == 0
    assert "\ntest_top1 0." in capsys.readouterr().out
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
