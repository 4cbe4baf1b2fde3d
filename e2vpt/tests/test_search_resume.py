"""A search that is stopped, at whatever point, goes on to the same end and repeats nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from e2vpt import search_stages, start, trials
from e2vpt.cli import main
from e2vpt.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from e2vpt.search import search
from e2vpt.search_config import SearchConfig, SearchOptions
from e2vpt.train import Setup, _Training, prepare
from shared_utils import checkpoint
from shared_utils.errors import InputError

CLOCKS = {
    "seconds", "search_seconds", "final_seconds", "images_per_second", "peak_memory_bytes",
    "command",
}  # fmt: skip


class Kill(BaseException):
    """As a kill, it is caught by nobody."""


@pytest.fixture(scope="module")
def cfg(tiny_backbones: tuple[Path, Path]) -> SearchConfig:
    """Some ten runs, each a fraction of a second; one diverges."""
    return SearchConfig(
        recipe="digits",
        model=ModelConfig(
            backbone=str(tiny_backbones[0]),
            architecture="micro_vit",
            num_visual_prompts=2,
            num_kv_prompts=1,
        ),
        data=DataConfig(limit=20, batch_size=10),
        optim=OptimConfig(epochs=2, warmup_epochs=0),
        run=RunConfig(name="x", accelerator="cpu"),
        search=SearchOptions(
            lrs=(0.05, 1e30),
            weight_decays=(1e-4,),
            candidate_epochs=1,
            num_segments=2,
            min_segments=1,
            finalists=1,
            seeds=(7,),
            final_on_val=True,
        ),
    )


@pytest.fixture(scope="module")
def setup(cfg: SearchConfig) -> Setup:
    return prepare(cfg)


@pytest.fixture(autouse=True)
def _prepared(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_stages, "prepare", lambda cfg: setup)


@pytest.fixture(scope="module")
def straight(cfg: SearchConfig, setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The search without a stop, not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_stages, "prepare", lambda cfg: setup)
        return search(at(cfg, tmp_path_factory.mktemp("straight")))


def at(cfg: SearchConfig, runs: Path, resume: Path | None = None) -> SearchConfig:
    run = replace(cfg.run, runs_dir=runs, resume=str(resume or ""))
    return replace(cfg, run=run)


def timeless(value: Any) -> Any:
    """JSON without what the clock decides."""
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key not in CLOCKS}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def read(path: Path) -> Any:
    return timeless(json.loads(path.read_text()))


def assert_same_search(one: Path, other: Path) -> None:
    """Equal results, and bit-equal weights in every trial."""
    for name in ("search.json", "result.json"):
        assert read(one / name) == read(other / name)
    for folder in (one, other):
        assert (folder / "search.png").read_bytes()[:4] == b"\x89PNG"
        assert not list(folder.rglob(".*.tmp"))
    tables = [(folder / "table.md").read_text().splitlines() for folder in (one, other)]
    assert [line.rsplit("|", 3)[0] for line in tables[0]] == [
        line.rsplit("|", 3)[0] for line in tables[1]
    ]
    names = [sorted(path.name for path in (f / "trials").iterdir()) for f in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if (one / "trials" / name / "model.safetensors").is_file():
            a, b = (
                checkpoint.load_weights(folder / "trials" / name / "model.safetensors")[0]
                for folder in (one, other)
            )
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a), name
        a_scores, b_scores = (
            folder / "trials" / name / start.IMPORTANCE for folder in (one, other)
        )
        assert (
            a_scores.is_file()
            == b_scores.is_file()
            == name.startswith(
                ("candidate", "finalist", "final-e2vpt-pruned", "final-e2vpt-random")
            )
        )


def finished(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "trials").glob("*/result.json")}


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the trials that ran although they were finished."""
    found: list[str] = []
    real = trials.train

    def training(cfg: TrainConfig, setup: Setup, folder: Path) -> Path:
        if (folder / "result.json").is_file():
            found.append(folder.name)
        return real(cfg, setup, folder)

    monkeypatch.setattr(trials, "train", training)
    return found


# ---- kills ----------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_the_same(
    cfg: SearchConfig,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    repeated: list[str],
    every: int,
) -> None:
    """Every file that is written, before and after, and every step are points to be killed at.

    Each point is taken once at most.
    """
    folder = tmp_path / "e2vpt" / "x"
    passed: list[str] = []
    kills: list[str] = []

    def point(what: str) -> None:
        if what not in passed:
            passed.append(what)
            if len(passed) % every == 0:
                kills.append(what)
                raise Kill

    def around(real: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            told = name(*args)
            point(f"before {told}")
            result = real(*args, **kwargs)
            point(f"after {told}")
            return result

        return call

    def place(source: Any, target: Any) -> str:
        return re.sub(r"\.saving-\w+", ".saving", os.path.relpath(target, folder))

    def step(run: _Training, *batch: Any) -> str:
        return f"step {run.step} of {run.folder.name}"

    class Removing:
        rmtree = staticmethod(around(shutil.rmtree, lambda path: f"rmtree {path.name}"))

    monkeypatch.setattr(os, "replace", around(os.replace, place))
    monkeypatch.setattr(Figure, "savefig", around(Figure.savefig, lambda f, p, **k: p.name))
    monkeypatch.setattr(_Training, "_step", around(_Training._step, step))
    monkeypatch.setattr(trials, "shutil", Removing)
    done: set[str] = set()
    for _ in range(1000):
        is_begun = (folder / "config.json").is_file()
        try:
            search(at(cfg, tmp_path, folder if is_begun else None))
            break
        except Kill:
            assert done <= finished(folder)
            done = finished(folder)
    assert len(kills) > 200 // every
    assert {kill.split()[0] for kill in kills} == {"before", "after"}
    assert repeated == []
    assert_same_search(folder, straight)


@pytest.mark.parametrize("name", ["search.json", "table.md", "search.png", "result.json"])
def test_killed_while_it_writes_what_it_found(
    cfg: SearchConfig,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "e2vpt" / "x"))
    files = ["search.json", "table.md", "search.png", "result.json"]
    for file in files[files.index(name) :]:
        (folder / file).unlink()
    (folder / f".{name}.tmp").write_text("cut o")
    config = (folder / "config.json").read_bytes()
    monkeypatch.setattr(trials, "train", None)  # all trials are there
    search(at(cfg, tmp_path, folder))
    (folder / ".search.png.tmp").unlink(missing_ok=True)
    assert_same_search(folder, straight)
    assert (folder / "config.json").read_bytes() == config


def test_killed_by_the_system(
    cfg: SearchConfig, straight: Path, tmp_path: Path, repeated: list[str]
) -> None:
    runs = tmp_path / "with a space"
    folder = runs / "e2vpt" / "x"
    options = [
        "--model.backbone", cfg.model.backbone, "--model.architecture", "micro_vit",
        "--model.num-visual-prompts", "2", "--model.num-kv-prompts", "1",
        "--model.prompt-dropout", "0.1", "--data.batch-size", "10", "--data.limit", "20",
        "--data.augment", "none", "--data.resize", "squash",
        "--optim.epochs", "2", "--optim.warmup-epochs", "0",
        "--search.lrs", "0.05", "1e30", "--search.weight-decays", "1e-4",
        "--search.candidate-epochs", "1", "--search.num-segments", "2",
        "--search.min-segments", "1", "--search.finalists", "1", "--search.seeds", "7",
        "--search.final-on-val", "--accelerator", "cpu",
        "--runs-dir", str(runs), "--name", "x",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "e2vpt", "search", "digits", *options],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 600  # a loaded machine is slow
        while not (folder / "trials" / "candidate-t0-s0" / "last.ckpt").is_file():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert {"e2vpt-lr0.05-wd0.0001", "final-e2vpt-7"} <= finished(folder)
    assert not (folder / "search.json").exists()
    assert main(["search", "--resume", str(folder)]) == 0
    assert repeated == []
    assert_same_search(folder, straight)


# ---- Ctrl-C ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["step", "scoring", "between"])
def test_an_interrupt_prints_the_line_that_resumes(
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "a b" / "e2vpt" / "x"))
    for path in (*folder.glob("trials/final*-*-*"), folder / "result.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    target = {
        "step": (_Training, "_step"),
        "scoring": (start, "importance"),
        "between": (trials.Trials, "find"),
    }[where]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*target, stopping)
        assert main(["search", "--resume", str(folder)]) == 130
    told = capsys.readouterr().err
    assert told.endswith(f"state saved; go on with: e2vpt search --resume '{folder}'\n")
    assert "Traceback" not in told
    assert main(["search", "--resume", str(folder)]) == 0  # the words of that line
    assert_same_search(folder, straight)


# ---- the same options -----------------------------------------------------------------------


def test_resume_takes_the_options_from_the_folder(
    cfg: SearchConfig,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Begun with a relative path, stopped, moved, and gone on with from elsewhere."""
    monkeypatch.chdir(tmp_path)

    def stopping(*args: Any, **kwargs: Any) -> None:
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(_Training, "_write", stopping)
        with pytest.raises(Kill):
            search(at(cfg, Path("runs")))
    (tmp_path / "elsewhere").mkdir()
    folder = (tmp_path / "runs" / "e2vpt" / "x").rename(tmp_path / "elsewhere" / "y")
    stop_after = {"candidate-t1-s0"}
    real = trials.train

    def training(cfg: TrainConfig, setup: Setup, place: Path) -> Path:
        if place.name in stop_after:
            raise KeyboardInterrupt
        return real(cfg, setup, place)

    monkeypatch.setattr(trials, "train", training)
    assert main(["search", "--resume", "elsewhere/y"]) == 130
    monkeypatch.chdir(tmp_path / "elsewhere")
    stop_after.clear()
    assert main(["search", "--resume", str(folder)]) == 0
    told = read(folder / "result.json")
    assert told.pop("name") == "y"
    expected = read(straight / "result.json")
    assert told == {key: value for key, value in expected.items() if key != "name"}
    assert read(folder / "search.json") == read(straight / "search.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search.seeds", "7", "8"], "search.seeds: got [7, 8], expected [7], as the search be"),
        (["--optim.epochs", "3"], "optim.epochs: got 3, expected 2, as the search began with; l"),
        (["--seed", "1"], "seed: got 1, expected 0, as the search began with; leave it out, or"),
        (["--model.num-kv-prompts", "2"], "model.num_kv_prompts: got 2, expected 1, as the sear"),
    ],
)
@pytest.mark.parametrize("is_done", [True, False])
def test_resume_with_other_options_is_refused_and_changes_nothing(
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
    is_done: bool,
) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "x"))
    if not is_done:
        (folder / "result.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(trials, "train", None)
    assert main(["search", "--resume", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_trial_of_another_configuration_is_not_taken(
    cfg: SearchConfig, straight: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "x"))
    (folder / "result.json").unlink()
    config = folder / "trials" / "candidate-t0-s0" / "config.json"
    config.write_text(re.sub('"epochs": 1', '"epochs": 2', config.read_text()))
    match = r"^trial candidate-t0-s0: got another optim than now, expected the configuration the "
    with pytest.raises(InputError, match=match):
        search(at(cfg, tmp_path, folder))
