"""`e2vpt search vtab`: every task that is there, both means beside the published ones."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from e2vpt import search_report, search_stages, trials, vtab
from e2vpt.cli import main
from e2vpt.config import RunConfig, TrainConfig
from e2vpt.recipes import SEARCH_RECIPES
from e2vpt.search import search
from e2vpt.search_config import SearchConfig
from e2vpt.search_suite import CHOSEN, suite_searches
from e2vpt.train import Setup, prepare
from shared_utils.config import load_json, save_json
from shared_utils.run_log import read_metrics

CLOCKS = {"seconds", "search_seconds", "final_seconds"}
THREE = ("cifar", "oxford_flowers102", "kitti")
CONTROLS = ["e2vpt pruned at random", "e2vpt with fewer prompts"]
RESULT_KEYS = {
    "project", "name", "command", "recipe", "seed", "metrics", "parameters", "data", "seconds",
    "epochs", "images_per_second", "peak_memory_bytes", "device", "precision", "processes",
    "versions",
}  # fmt: skip


def write_task(folder: Path) -> None:
    """Full lists of one task, whose lines name the same two images again and again."""
    (folder / "images").mkdir(parents=True)
    for label in (0, 1):
        pixels = np.full((8, 8, 3), 200 * label, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{label}.png")
    for split, count in (("train800", 800), ("val200", 200), ("train800val200", 1000), ("test", 9)):
        lines = [f"images/{k % 2}.png {k % 2}" for k in range(count)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def all_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vtab-1k")
    for task in vtab.TASKS:
        write_task(root / task.folder)
    return root


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vtab-1k")
    for name in THREE:
        write_task(root / name)
    return root


@pytest.fixture(scope="module")
def options(tiny_backbones: tuple[Path, Path]) -> list[str]:
    """Of a suite whose tasks take a second or two each."""
    return [
        "--model.backbone", str(tiny_backbones[0]), "--model.architecture", "micro_vit",
        "--data.limit", "8", "--data.batch-size", "8", "--data.num-workers", "0",
        "--optim.epochs", "1", "--optim.warmup-epochs", "0", "--accelerator", "cpu",
        "--search.lrs", "0.05", "--search.weight-decays", "0", "--search.candidate-epochs", "1",
        "--search.num-segments", "2", "--search.min-segments", "1", "--search.seeds", "0",
        "--search.finalists", "1",
    ]  # fmt: skip


def read(path: Path) -> Any:
    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(v) for key, v in value.items() if key not in CLOCKS}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(json.loads(path.read_text()))


def tables_of(text: str) -> dict[str, dict[str, list[str]]]:
    """By label and row: what stands here, then the published figures."""
    found: dict[str, dict[str, list[str]]] = {}
    for block in text.split("\n\n"):
        label, *lines = block.strip().splitlines()
        if lines:
            found[label] = {line[:26].strip(): line[26:].split() for line in lines[1:-2]}
    return found


# ---- three tasks, in earnest ----------------------------------------------------------------


def test_a_suite_is_searched_task_by_task_and_survives_stops(
    three: Path,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped in the midst of the second task, and again in the third."""
    folder, ran = tmp_path / "e2vpt" / "s", []
    stop_at = "oxford_flowers102/trials/candidate-t0-s1"
    real = trials.train

    def training(cfg: TrainConfig, setup: Setup, place: Path) -> Path:
        told = str(place.relative_to(folder))
        if told == stop_at:
            raise KeyboardInterrupt
        ran.append(told)
        return real(cfg, setup, place)

    monkeypatch.setattr(trials, "train", training)
    argv = ["search", "vtab", *options, "--search.data-root", str(three)]
    assert main([*argv, "--runs-dir", str(tmp_path), "--name", "s"]) == 130
    told = capsys.readouterr()
    assert told.err.endswith(f"go on with: e2vpt search --resume {folder}\n")
    # Before anything runs: cifar with 5 prompts, flowers with 1, kitti with 10.
    budget = told.out.partition("parameters train")[0]
    rows = dict(re.findall(r"^\| (\w[\w ]*?) +\| (\d+) ", budget, re.MULTILINE))
    assert rows == {
        "rates and decays": "3", "tokens to prune": "16", "segments to prune": "3",
        "finalists in full": "3", "final runs": "12", "in all": "37",
    }  # fmt: skip
    absent = [task.folder for task in vtab.TASKS if task.folder not in THREE]
    assert f"not there, left out: {', '.join(absent)}" in budget
    assert (folder / "cifar" / "result.json").is_file()
    assert not (folder / "result.json").exists()
    stop_at = "kitti/trials/final-e2vpt-0"
    assert main(["search", "--resume", str(folder)]) == 130
    stop_at = ""
    assert main(["search", "--resume", str(folder)]) == 0
    assert len(ran) == len(set(ran))  # nothing twice
    assert {told.split("/")[0] for told in ran} == set(THREE)
    found = read(folder / "search.json")
    assert found["missing"] == absent
    for name in THREE:
        one = read(folder / name / "search.json")
        assert found["tasks"][name] == one
        for row in one["rows"]:
            label = row["label"]
            label = "e2vpt with fewer prompts" if label.endswith("prompts") else label
            assert found["top1_percent"][label][name] == 100 * row["test_mean"]
            if row["label"] == one["chosen"]:
                assert found["top1_percent"][CHOSEN][name] == 100 * row["test_mean"]
    assert list(found["top1_percent"]) == [CHOSEN, "e2vpt", "e2vpt pruned", *CONTROLS]
    flowers = read(folder / "oxford_flowers102" / "search.json")
    assert [trial["name"] for trial in flowers["stages"]["tokens"]] == ["candidate-t0-s0"]
    cfg = load_json(TrainConfig, folder / "kitti" / "trials" / "e2vpt-lr0.05-wd0" / "config.json")
    assert cfg.data.source == str(three / "kitti")
    assert (cfg.model.num_visual_prompts, cfg.model.num_kv_prompts) == (10, 5)
    result = read(folder / "result.json")
    assert RESULT_KEYS - CLOCKS <= result.keys()
    assert result["tasks"] == list(THREE)
    tests = [read(folder / name / "result.json")["metrics"]["test_top1"] for name in THREE]
    assert result["metrics"]["test_top1"] == pytest.approx(sum(tests) / 3)
    assert result["metrics"].keys() == {"val_top1", "test_top1"}  # no mean over 19 of three
    text = (folder / "table.md").read_text()
    assert f"not there, left out: {', '.join(absent)}" in text
    chosen = tables_of(text)[CHOSEN]
    assert chosen["SVHN"][0] == chosen["mean over 19 tasks"][0] == "-"
    assert chosen["CIFAR-100"][0] == f"{found['top1_percent'][CHOSEN]['cifar']:.2f}"
    capsys.readouterr()
    monkeypatch.setattr(search_stages, "prepare", None)
    assert main(["search", "--resume", str(folder)]) == 0  # told again
    assert text in capsys.readouterr().out


# ---- all tasks, with given accuracies -------------------------------------------------------


@pytest.fixture
def given(
    all_tasks: Path,
    tiny_backbones: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path]:
    """Search the suite where final runs reach what a function of task and run's name says."""
    setups: dict[str, Setup] = {}

    def prepared(cfg: TrainConfig) -> Setup:
        if "one" not in setups:
            setups["one"] = prepare(cfg)
        return setups["one"]

    def run(score: Callable[[str, str], float], resume: str = "") -> Path:
        def training(cfg: TrainConfig, setup: Setup, folder: Path) -> Path:
            save_json(cfg, folder / "config.json")
            task = Path(cfg.data.source).name
            result = {
                "metrics": {"val_top1": 0.5, "test_top1": score(task, folder.name)},
                "parameters": {"tuned": 100, "total": 1000, "percent": 10.0},
                "backbone": {"name": "x"},
                "data": {"name": task, "train_images": 1000, "val_images": 0, "test_images": 7},
                "images_per_second": 2.0,
            }
            (folder / "result.json").write_text(json.dumps(result))
            return folder

        monkeypatch.setattr(trials, "train", training)
        monkeypatch.setattr(search_stages, "prepare", prepared)
        monkeypatch.setattr(search_report, "heat_maps", lambda *args: None)  # they take long
        cfg = SEARCH_RECIPES["vtab"]
        model = replace(cfg.model, backbone=str(tiny_backbones[0]), architecture="micro_vit")
        options = replace(
            cfg.search, lrs=(1,), weight_decays=(0,), seeds=(0, 1), data_root=all_tasks,
            final_on_val=False,
        )  # fmt: skip
        place = RunConfig(runs_dir=tmp_path, name="s", accelerator="cpu", resume=resume)
        data = replace(cfg.data, num_workers=0, limit=4)
        return search(replace(cfg, model=model, data=data, search=options, run=place))

    return run


def test_both_means_stand_beside_the_published_ones(
    given: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    full, linear = vtab.published("Full").top1, vtab.published("Linear").top1

    def score(task: str, name: str) -> float:
        # Two seeds, one as far above the figure as the other is below it.
        top1 = (full if name.startswith("final-e2vpt-pruned") else linear)[task]
        return (top1 + (1 if name.endswith("-1") else -1)) / 100

    folder = given(score)
    text = (folder / "table.md").read_text()
    assert text in capsys.readouterr().out
    tables = tables_of(text)
    assert list(tables) == [CHOSEN, "e2vpt", "e2vpt pruned", *CONTROLS]
    for label, top1, means in (
        ("e2vpt pruned", full, ["65.57", "68.97"]),
        ("e2vpt", linear, ["52.94", "57.64"]),
        (CHOSEN, linear, ["52.94", "57.64"]),  # of equals that with the smaller rate: the first
    ):
        table = tables[label]
        for task in vtab.TASKS:
            published = [vtab.published(m).top1[task.folder] for m in ("E²VPT", "VPT-Deep")]
            assert [float(cell) for cell in table[task.title]] == [top1[task.folder], *published]
        assert table["mean over 19 tasks"] == [means[0], "71.42", "69.43"]
        assert table["mean over 3 groups"] == [means[1], "73.94", "71.96"]
    assert text.count("E²VPT: published, as reprinted in the VFPT paper") == len(tables)
    assert text.count("VPT-Deep: published in the VPT paper, as reprinted") == len(tables)
    assert "left out" not in text
    metrics = read(folder / "result.json")["metrics"]
    assert metrics["mean19"] == pytest.approx(0.5294, abs=1e-4)
    assert metrics["mean3"] == pytest.approx(0.5764, abs=1e-4)
    assert metrics["test_top1"] == pytest.approx(metrics["mean19"])
    assert read(folder / "result.json")["data"]["test_images"] == 19 * 7
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 20))
    assert rows[0]["test_top1"] == read(folder / "cifar" / "result.json")["metrics"]["test_top1"]
    assert (folder / "search.png").stat().st_size > 1000


# ---- what is refused before anything runs ---------------------------------------------------


def no_list(root: Path) -> None:
    (root / "kitti" / "val200.txt").unlink()


def no_image(root: Path) -> None:
    (root / "kitti" / "images" / "1.png").unlink()


def no_task(root: Path) -> None:
    for name in THREE:
        shutil.rmtree(root / name)


def nothing(root: Path) -> None:
    """As it is."""


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (no_list, [], r"data\.source: got no '.*kitti/val200\.txt', expected train800\.txt"),
        (no_image, [], r"data\.source: got 4 listed images not there: .*kitti/images/1\.png"),
        (no_task, [], r"search\.data_root: got '.*', which holds no VTAB-1k task, expected fold"),
        (nothing, ["--model.num-visual-prompts", "3"], r"model\.num_visual_prompts: got 3, exp"),
        (nothing, ["--model.num-kv-prompts", "3"], r"model\.num_kv_prompts: got 3, expected no"),
        (nothing, ["--data.source", "x"], r"data\.source: got 'x', .*; give --search\.data-root"),
    ],
)
def test_what_is_wrong_with_a_suite_is_one_line_before_the_first_run(
    three: Path,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    more: list[str],
    message: str,
) -> None:
    root = Path(shutil.copytree(three, tmp_path / "root"))
    change(root)
    monkeypatch.setattr(trials, "train", None)
    argv = ["search", "vtab", *options, "--search.data-root", str(root), *more]
    assert main([*argv, "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: {message}", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_each_task_has_the_prompts_of_its_recipe(all_tasks: Path) -> None:
    cfg = SEARCH_RECIPES["vtab"]
    cfg = replace(cfg, search=replace(cfg.search, data_root=all_tasks))
    found = suite_searches(cfg)
    assert [task for task, _ in found] == list(vtab.TASKS)
    for task, one in found:
        recipe: SearchConfig = SEARCH_RECIPES[task.recipe]
        assert (one.model, one.optim, one.search.lrs) == (
            recipe.model, recipe.optim, recipe.search.lrs
        )  # fmt: skip
        assert one.data == replace(recipe.data, source=str(all_tasks / task.folder))
        assert one.search.suite == ""
