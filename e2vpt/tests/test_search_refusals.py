"""What `e2vpt search` refuses before anything runs: one line, and no folder is left."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from e2vpt import trials
from e2vpt.cli import main


def no_test_split(folder: Path) -> list[str]:
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "train" / name / f"{number}.png")
    return ["--data.source", str(folder)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search.seeds", "1", "2", "1"], "search.seeds: got 1 twice, expected each once"),
        (["--search.lrs", "0.1", "0.10"], "search.lrs: got 0.1 twice, expected each once"),
        (["--search.methods", "linear", "linear"], "search.methods: got linear twice"),
        (["--search.seeds", "-1"], "search.seeds: got -1, expected 0 to 4294967295"),
        (["--search.lrs", "0"], "search.lrs: got 0.0, expected more than 0"),
        (["--search.lrs", "nan"], "search.lrs: got nan, expected more than 0"),
        (["--search.weight-decays", "-1"], "search.weight_decays: got -1.0, expected 0 or more"),
        (["--search.candidate-epochs", "0"], "search.candidate_epochs: got 0, expected 1 or more"),
        (["--search.finalists", "0"], "search.finalists: got 0, expected 1 or more"),
        (["--search.min-segments", "5"], "search.min_segments: got 5, expected at most search.nu"),
        (["--search.num-segments", "7"], "search.num_segments: got 7, expected a divisor of the "),
        (["--search.methods", "lore"], "--search.methods: got 'lore', expected one of e2vpt, vpt"),
        (["--model.prompt-dim", "8"], "model.prompt_dim: got 8, expected 0, as prompts with a pr"),
        (["--prune.num-tokens", "1"], "prune.num_tokens: got 1 without prune.source"),
        (["--prune.source", "x"], "prune.source: got x, expected nothing, as the search prunes "),
        (["--prune.random"], "prune.random: got True, expected nothing, as the search prunes by"),
        (["--prune.rewind", "reinit"], "prune.rewind: got reinit, expected nothing, as the sear"),
        (["--data.train-on-val"], "data.train_on_val: got no validation images, expected some t"),
        (["--devices", "2"], "processes: got 2, expected 1; search with one process"),
        (no_test_split, "data.source: got no test images, expected some for the final runs; add"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_one_line(
    options: Any,
    message: str,
    tmp_path: Path,
    quick_search: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trials, "train", None)
    if callable(options):
        options = options(tmp_path / "data")
    argv = ["search", "digits", *quick_search, *options, "--runs-dir", str(tmp_path / "runs")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()  # no folder for a search that did not start


def test_two_processes_are_refused_by_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["search", "digits", "--runs-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: processes: got 2, expected 1; ")
    assert not any(tmp_path.iterdir())


def test_resume_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/config.json: got no such file")
