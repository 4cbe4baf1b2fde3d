"""The commands as a user meets them: help, fit, evaluate, explain, errors of one line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dnc import model_io
from dnc.cli import COMMANDS, main
from dnc.recipes import RECIPES
from dnc.sources import load_pools

ONE_LINE = re.compile(r"error: [^\n]+?: got [^\n]+?, expected [^\n]+; [^\n]+\n")


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert ONE_LINE.fullmatch(error), error
    return error


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- help and words --------------------------------------------------------------------------


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(told.count(f"\n  {name} ") == 2 for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([name, "--help"])
    assert "usage: dnc " in capsys.readouterr().out


def test_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dnc", "nothing"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert ONE_LINE.fullmatch(done.stderr)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete(name: str) -> None:
    recipe = RECIPES[name]
    assert (recipe.recipe, bool(recipe.about)) == (name, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tarin"], r"error: command: got 'tarin', expected a known command; did you mean 'train'"),
        (["train", "digit"], r"did you mean 'digits'\?"),
        (["train", "digits", "--model.head", "linear"], r"error: --model\.head: got "),
        (["train", "digits", "--model.momentum", "1"], r"error: momentum: got 1\.0, expected 0 or"),
        (["train", "digits", "--optim.lr", "0"], r"error: optim\.lr: got 0\.0, expected more than"),
        (
            ["train", "digits", "--optim.warmup-epochs", "99"],
            r"error: optim\.warmup_epochs: got 99",
        ),
        (
            ["train", "digits", "--data.resize", "8"],
            r"error: data\.resize: got 8, expected at leas",
        ),
        (
            ["train", "digits", "--model.encoder", "resnet81"],
            r"error: model\.encoder: got resnet81",
        ),
        (["explain", "x.png"], r"error: run: got nothing, expected a run folder; give --run RUN"),
        (["explain", "--run", "x"], r"error: images and from_test: got neither, expected one of"),
        (["evaluate", "nowhere"], r"config\.json: got no such file"),
    ],
)
def test_wrong_words_are_one_line(
    tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--runs-dir", str(tmp_path)] if argv[0] == "train" and len(argv) > 2 else []
    assert re.search(message, failure([*argv, *more], capsys))
    assert not list(tmp_path.rglob("last.ckpt"))


# ---- evaluate --------------------------------------------------------------------------------


def test_unknown_images_get_scores(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("noise", "more"):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    capsys.readouterr()
    argv = ["evaluate", str(digits_run), "--unknown", str(tmp_path), "--accelerator", "cpu"]
    assert main(argv) == 0
    told = {k: float(v) for k, v in (x.split() for x in capsys.readouterr().out.splitlines())}
    assert 0 <= told["auroc_softmax"] <= 1
    assert told["auroc_cosine"] > 0.5


def test_other_data_is_taken_whole_or_by_its_own_split(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pools = load_pools("digits", tmp_path)
    copies = {"flat": ("train", 40), "parted/train": ("train", 40), "parted/test": ("test", 60)}
    for folder, (split, count) in copies.items():
        for i in range(10):
            (tmp_path / folder / str(i)).mkdir(parents=True)
        for i in range(count):
            label = int(pools[split].labels[i])
            pools[split].image(i).save(tmp_path / folder / str(label) / f"{i}.png")

    classifier = model_io.load(digits_run)
    for source, split, count in (("flat", "train", 40), ("parted", "test", 60)):
        logits = classifier([pools[split].image(i) for i in range(count)])
        right = (logits.argmax(dim=1).numpy() == pools[split].labels[:count]).mean()
        capsys.readouterr()
        argv = ["evaluate", str(digits_run), "--source", str(tmp_path / source)]
        assert main([*argv, "--accelerator", "cpu"]) == 0
        told = dict(line.split() for line in capsys.readouterr().out.splitlines())
        assert float(told["test_top1"]) == pytest.approx(right, abs=1e-4)
    error = failure(["evaluate", str(digits_run), "--source", str(tmp_path / "parted"), "--split",
                     "val"], capsys)  # fmt: skip
    assert error.startswith("error: split: got 'val', which ")


def test_classes_that_differ(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    error = failure(["evaluate", str(digits_run), "--source", str(tmp_path)], capsys)
    assert error.startswith("error: source: got classes a, b..., expected those of the run; ")


# ---- explain ---------------------------------------------------------------------------------


def test_explain_writes_a_page_and_data(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out" / "why.html"
    argv = ["explain", "--run", str(digits_run), "--output", str(page), "--from-test", "4"]
    assert main(argv) == 0
    assert capsys.readouterr().out.endswith(f"4 images: {page}, {page.with_suffix('.json')}\n")
    found = read(page.with_suffix(".json"))
    assert len(found) == 4
    assert all(e["source"].startswith("digits[") for e in found)
    assert found[0]["class"] != found[0]["true_class"]  # wrong ones first
    html = page.read_text()
    assert html.count("data:image/png;base64,") > 20
    assert found[0]["rule"]["comparisons"] == 2 * 9 * 2


def test_explain_files(digits_run: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 30).save(tmp_path / "a & <b>.png")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (8, 8), (9, 200, 7)).save(tmp_path / "more" / "c.jpg")
    page = tmp_path / "why.html"
    argv = ["explain", str(tmp_path / "a*.png"), str(tmp_path / "more"), "--run", str(digits_run)]
    assert main([*argv, "--output", str(page)]) == 0
    found = read(page.with_suffix(".json"))
    assert [Path(e["source"]).name for e in found] == ["a & <b>.png", "c.jpg"]
    html = page.read_text()
    assert "a &amp; &lt;b&gt;.png" in html
    assert "<b>.png" not in html


def test_explain_refuses(
    digits_run: Path, tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "why.html"
    base = ["explain", "--run", str(digits_run), "--output", str(page)]
    assert failure([*base, str(tmp_path / "*.png")], capsys).startswith(f"error: {tmp_path}")
    (tmp_path / "bad.png").write_bytes(b"no image")
    error = failure([*base, str(tmp_path / "bad.png")], capsys)
    assert "bad.png: got a damaged or unreadable file" in error
    argv = ["train", "digits", "--runs-dir", str(tmp_path), "--name", "s", *quick]
    assert main([*argv, "--model.head", "softmax"]) == 0
    argv = ["explain", "--run", str(tmp_path / "dnc" / "s"), "--from-test", "2"]
    error = failure([*argv, "--output", str(page)], capsys)
    assert error.startswith("error: head: got a learned one (SoftmaxHead), expected sub-centroids")
    assert not page.exists()


def test_explain_notices_other_training_images(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("dnc.commands.content_hash", lambda image: "another")
    argv = ["explain", "--run", str(digits_run), "--output", str(tmp_path / "x.html")]
    error = failure([*argv, "--from-test", "1"], capsys)
    assert error.startswith("error: data.source: got another training image ")


# ---- fit -------------------------------------------------------------------------------------


def test_fit_turns_a_run_into_a_classifier(
    digits_run: Path, tmp_path: Path, quick: list[str]
) -> None:
    argv = ["fit", "digits", "--runs-dir", str(tmp_path), "--name", "f", *quick]
    assert main([*argv, "--fit.run", str(digits_run)]) == 0
    folder = tmp_path / "dnc" / "f"
    result = read(folder / "result.json")
    assert (result["method"], result["epochs"], result["parameters"]["tuned"]) == ("fit", 0, 0)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "model.safetensors", "model.json", "result.json",
        "anchors.png", "tensorboard",
    }  # fmt: skip
    page = tmp_path / "why.html"
    assert main(["explain", "--run", str(folder), "--from-test", "1", "--output", str(page)]) == 0


def test_fit_wants_the_encoder_of_the_run(
    digits_run: Path, tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["fit", "digits", "--runs-dir", str(tmp_path), "--fit.run", str(digits_run), *quick]
    error = failure([*argv, "--model.encoder", "resnet18"], capsys)
    assert error.startswith("error: model.encoder: got resnet18, expected resnet10t, that of ")
    assert failure([*argv, "--resume", "x"], capsys)
