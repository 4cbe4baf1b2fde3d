"""A whole search: what each stage tries, what the final runs start from, what is written."""

import contextlib
import io
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from e2vpt import search_report, search_stages, start, trials
from e2vpt.cli import main
from e2vpt.config import TrainConfig
from e2vpt.data import ImageSet
from e2vpt.recipes import SEARCH_RECIPES
from e2vpt.search_config import SearchConfig, segment_candidates, token_candidates
from e2vpt.train import _Training
from shared_utils import checkpoint
from shared_utils.config import load_json

SEEDS = (3, 4)
# Tuned parameters of the quick runs on 10 classes, by hand: width 64, depth 2, one head, P 4, n 2.
HEAD, KV = 64 * 10 + 10, 2 * 2 * 64
RESULT_KEYS = {
    "project", "name", "command", "recipe", "seed", "metrics", "parameters", "data", "seconds",
    "epochs", "images_per_second", "peak_memory_bytes", "device", "precision", "processes",
    "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def searched(
    tmp_path_factory: pytest.TempPathFactory, quick_search: list[str]
) -> tuple[Path, str, dict[str, set[str]]]:
    """The folder of a search on digits, what it said, and the images that each trial looked at."""
    runs, told = tmp_path_factory.mktemp("runs"), io.StringIO()
    seen: dict[str, set[str]] = {}
    real_train, real_item = trials.train, ImageSet.__getitem__

    def training(cfg: TrainConfig, *args: Any) -> Path:
        seen[cfg.run.name] = set()
        return real_train(cfg, *args)

    def item(self: ImageSet, index: int) -> Any:
        seen[next(reversed(seen))].add(self.path(index))
        return real_item(self, index)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(trials, "train", training)
        patch.setattr(ImageSet, "__getitem__", item)
        argv = ["search", "digits", *quick_search, "--runs-dir", str(runs), "--name", "x"]
        assert main(argv) == 0
    return runs / "e2vpt" / "x", told.getvalue(), seen


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def config(folder: Path, name: str) -> TrainConfig:
    return load_json(TrainConfig, folder / "trials" / name / "config.json")


def names_of(found: dict[str, Any], stage: str) -> list[str]:
    return [trial["name"] for trial in found["stages"].get(stage, [])]


def best(found: dict[str, Any], stages: list[str]) -> list[str]:
    """Names by accuracy, then fewer parameters, then smaller rate."""
    pool = {t["name"]: t for stage in stages for t in found["stages"][stage]}
    rates = {name: float((re.findall(r"-lr([\d.]+)-", name) or [0])[0]) for name in pool}
    return sorted(pool, key=lambda n: (-pool[n]["metrics"]["val_top1"], pool[n]["tuned"], rates[n]))


# ---- how much -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "segments", "min_kept", "tokens", "parts"),
    [
        (1, 8, 4, [0], [1, 2, 3, 4]),
        (5, 8, 4, [0, 1, 2, 3, 4], [1, 2, 3, 4]),
        (10, 16, 4, list(range(10)), [1, 3, 4, 6, 8, 9, 11, 12]),
        (20, 8, 1, [0, *range(2, 20, 2)], [1, 2, 3, 4, 5, 6, 7]),
        (32, 4, 4, [0, 3, 6, 9, 12, 16, 19, 22, 25, 28], []),
        (100, 1, 1, [0, *range(10, 100, 10)], []),
    ],
)
def test_candidates_are_the_papers_and_none(
    prompts: int, segments: int, min_kept: int, tokens: list[int], parts: list[int]
) -> None:
    assert token_candidates(prompts) == tokens
    assert segment_candidates(segments, min_kept) == parts


@pytest.mark.parametrize(
    ("recipe", "runs"),
    [
        ("vtab-cifar", [40, 5, 4, 2, 20]),
        ("vtab-dtd", [40, 10, 4, 2, 20]),
        ("vtab-oxford-flowers102", [40, 1, 4, 2, 20]),  # of one prompt, segments are removed
        ("digits", [4, 10, 4, 2, 12]),
    ],
)
def test_budget_of_the_recipes(recipe: str, runs: list[int]) -> None:
    cfg = SEARCH_RECIPES[recipe]
    found = search_stages.budget(cfg)
    assert [count for _, count, _ in found] == runs
    full, short = cfg.optim.epochs, cfg.search.candidate_epochs
    assert [epochs for *_, epochs in found] == [
        count * length for count, length in zip(runs, [full, short, short, full, full], strict=True)
    ]


def test_the_grid_of_the_benchmarks_is_the_papers() -> None:
    for name, recipe in SEARCH_RECIPES.items():
        assert recipe.recipe == name
        assert isinstance(recipe, SearchConfig)
        if not name.startswith(("digits", "images-micro")):
            options = recipe.search
            assert options.lrs == (50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05)
            assert options.weight_decays == (0.01, 0.001, 0.0001, 0.0)
            assert options.seeds == (42, 44, 82, 100, 800)
            assert options.final_on_val is (name.startswith(("vtab", "images")))


def budget_of(told: str) -> dict[str, tuple[int, int]]:
    lines = told.partition("budget:\n")[2].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [row for row in cells if len(row) == 3 and row[1].isdigit()]
    return {name: (int(runs), int(epochs)) for name, runs, epochs in rows}


def test_the_budget_is_told_first_and_is_what_runs(
    searched: tuple[Path, str, dict[str, set[str]]],
) -> None:
    folder, told, seen = searched
    assert told.index("budget:") < told.index("parameters train")
    planned, stages = budget_of(told), read(folder / "search.json")["stages"]
    assert planned == {
        "rates and decays": (2, 4), "tokens to prune": (4, 4), "segments to prune": (2, 2),
        "finalists in full": (2, 4), "final runs": (8, 16), "in all": (18, 30),
    }  # fmt: skip
    ran = {stage: (len(of), sum(t["epochs"] for t in of)) for stage, of in stages.items()}
    finals = ran.pop("finals")
    assert list(ran.values()) == list(planned.values())[:4]
    # Where no token is removed, fewer prompts from the start are the runs that are there already.
    assert finals in ((8, 16), (6, 12))
    on_disk = [path.name for path in (folder / "trials").iterdir()]
    assert sorted(on_disk) == sorted(t["name"] for of in stages.values() for t in of)
    assert sorted(on_disk) == sorted(seen)
    assert (
        sum(config(folder, name).optim.epochs for name in on_disk)
        == (read(folder / "result.json")["epochs"])
    )


# ---- the stages -----------------------------------------------------------------------------


def test_each_stage_goes_on_from_the_best_of_the_one_before(
    searched: tuple[Path, str, dict[str, set[str]]],
) -> None:
    folder, _, _ = searched
    found = read(folder / "search.json")
    assert names_of(found, "e2vpt grid") == ["e2vpt-lr0.05-wd0.0001", "e2vpt-lr0.02-wd0.0001"]
    assert names_of(found, "tokens") == [f"candidate-t{count}-s0" for count in range(4)]
    tokens = best(found, ["tokens"])[0].split("-")[1]
    assert names_of(found, "segments") == [f"candidate-{tokens}-s{count}" for count in (1, 2)]
    pruned = [n for n in best(found, ["tokens", "segments"]) if n != "candidate-t0-s0"]
    assert names_of(found, "finalists") == [
        name.replace("candidate", "finalist") for name in pruned[:2]
    ]
    trained, chosen = best(found, ["e2vpt grid"])[0], best(found, ["finalists"])[0]
    grid = config(folder, trained)
    for stage in ("tokens", "segments", "finalists"):
        for name in names_of(found, stage):
            cfg = config(folder, name)
            counts = tuple(int(part[1:]) for part in name.split("-")[1:])
            assert (cfg.prune.num_tokens, cfg.prune.num_segments) == counts
            assert cfg.prune.of_segments == 4
            assert Path(cfg.prune.source) == folder / "trials" / trained
            is_short = stage != "finalists"
            assert cfg.prune.rewind == ("trained" if is_short else "init")
            assert (cfg.optim.lr, cfg.optim.weight_decay) == (grid.optim.lr, 1e-4)
            assert cfg.optim.epochs == (1 if is_short else 2)
            assert cfg.run.seed == grid.run.seed == 0
    row = found["rows"][1]
    told = f"finalist-t{row['pruned_tokens']}-s{row['pruned_segments']}"
    assert (row["label"], told) == ("e2vpt pruned", chosen)
    assert (row["rewind"], row["lr"]) == ("init", grid.optim.lr)


def test_final_runs_are_pruned_from_their_own_seeds_run(
    searched: tuple[Path, str, dict[str, set[str]]],
) -> None:
    folder, _, _ = searched
    found = read(folder / "search.json")
    chosen = config(folder, best(found, ["finalists"])[0])
    grid = config(folder, best(found, ["e2vpt grid"])[0])

    def initial(name: str) -> dict[str, torch.Tensor]:
        return checkpoint.load_weights(folder / "trials" / name / start.INITIAL)[0]

    for seed in SEEDS:
        plain = config(folder, f"final-e2vpt-{seed}")
        assert (plain.run.seed, plain.optim, plain.model) == (seed, grid.optim, grid.model)
        assert plain.prune.source == ""
        before = initial(plain.run.name)
        for label in ("pruned", "random"):
            cfg = config(folder, f"final-e2vpt-{label}-{seed}")
            assert (cfg.run.seed, cfg.optim.lr, cfg.optim.epochs) == (seed, grid.optim.lr, 2)
            assert cfg.prune.random is (label == "random")
            assert cfg.prune.num_tokens == chosen.prune.num_tokens
            assert cfg.prune.num_segments == chosen.prune.num_segments
            assert Path(cfg.prune.source) == folder / "trials" / f"final-e2vpt-{seed}"
            after = initial(cfg.run.name)
            assert torch.equal(after["head.weight"], before["head.weight"])
            values = set(before["visual.weight.0"].flatten().tolist())
            assert set(after["visual.weight.0"].flatten().tolist()) <= values
    a, b = (initial(f"final-e2vpt-{seed}") for seed in SEEDS)
    assert not torch.equal(a["head.weight"], b["head.weight"])


def test_test_images_are_for_the_final_runs_alone(
    searched: tuple[Path, str, dict[str, set[str]]],
) -> None:
    folder, _, seen = searched
    finals = [name for name in seen if name.startswith("final-")]
    others = [name for name in seen if name not in finals]
    chosen_by = set().union(*(seen[name] for name in others))
    tested = seen[finals[0]] - chosen_by
    assert len(chosen_by) == 80  # 40 that train and 40 of validation
    assert len(tested) == 40
    for name in seen:
        result = read(folder / "trials" / name / "result.json")
        assert seen[name] == (chosen_by | tested if name in finals else chosen_by)
        assert ("test_top1" in result["metrics"]) is (name in finals)
        assert result["data"]["test_images"] == (40 if name in finals else 0)
        assert not (folder / "trials" / name / "confusion.png").exists()  # no time for pictures


# ---- what is written ------------------------------------------------------------------------


def test_rows_are_what_their_final_runs_reached(
    searched: tuple[Path, str, dict[str, set[str]]],
) -> None:
    folder, told, _ = searched
    found = read(folder / "search.json")
    rows = {row["label"]: row for row in found["rows"]}
    pruned = rows["e2vpt pruned"]
    left = 4 - pruned["pruned_tokens"]
    fewer = f"e2vpt with {left} prompts"
    assert list(rows) == ["e2vpt", "e2vpt pruned", "e2vpt pruned at random", fewer]
    prefixes = {
        "e2vpt": "final-e2vpt",
        "e2vpt pruned": "final-e2vpt-pruned",
        "e2vpt pruned at random": "final-e2vpt-random",
        fewer: "final-e2vpt-fewer" if left < 4 else "final-e2vpt",
    }
    share = (4 - pruned["pruned_segments"]) / 4
    sizes = {"e2vpt": 4, "e2vpt pruned": left * share, "e2vpt pruned at random": left * share}
    for label, row in rows.items():
        results = [
            read(folder / "trials" / f"{prefixes[label]}-{seed}" / "result.json") for seed in SEEDS
        ]
        tests = [result["metrics"]["test_top1"] for result in results]
        assert row["test_top1"] == tests
        assert row["test_mean"] == pytest.approx(sum(tests) / 2)
        assert row["test_std"] == pytest.approx(statistics.stdev(tests))
        tuned = HEAD + KV + int(sizes.get(label, left) * 2 * 64)
        assert row["tuned"] == results[0]["parameters"]["tuned"] == tuned
        assert row["percent"] == results[0]["parameters"]["percent"]
        line = next(line for line in told.splitlines() if line.startswith(f"| {label} "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[4] == f"{tuned:,}"
        mean, std = 100 * row["test_mean"], 100 * row["test_std"]
        assert cells[7] == f"{mean:.2f} ± {std:.2f}"
        if label in ("e2vpt", "e2vpt pruned"):
            assert cells[6] == f"{100 * row['val_top1']:.1f}"
        else:  # chosen by another row's accuracy
            assert row["val_top1"] is None
            assert cells[6] == "-"
    # Grid of 2 runs x 2 epochs; 4 + 2 candidates of 1; 2 finalists of 2.
    epochs = {label: row["search_epochs"] for label, row in rows.items()}
    assert epochs == {"e2vpt": 4, "e2vpt pruned": 14, "e2vpt pruned at random": 14, fewer: 4}
    assert (folder / "table.md").read_text().splitlines() == [
        line for line in told.splitlines() if line.startswith("| ")
    ][-6:]


def test_the_result_keeps_the_contract(
    searched: tuple[Path, str, dict[str, set[str]]],
) -> None:
    folder, _, _ = searched
    result, found = read(folder / "result.json"), read(folder / "search.json")
    assert RESULT_KEYS <= result.keys()
    assert (result["project"], result["recipe"], result["name"]) == ("e2vpt", "digits", "x")
    own = [row for row in found["rows"] if row["val_top1"] is not None]
    row = min(own, key=lambda row: (-row["val_top1"], row["tuned"]))
    assert found["chosen"] == result["method"] == row["label"]
    assert result["metrics"] == {"val_top1": row["val_top1"], "test_top1": row["test_mean"]}
    assert result["parameters"]["tuned"] == row["tuned"]
    assert result["data"]["test_images"] == 40
    assert load_json(SearchConfig, folder / "config.json").search.seeds == SEEDS
    with Image.open(folder / "search.png") as picture:
        assert min(picture.size) > 400
        assert len(set(picture.convert("L").tobytes())) > 20


def test_a_finished_search_is_told_again_without_running(
    searched: tuple[Path, str, dict[str, set[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _, _ = searched
    monkeypatch.setattr(_Training, "run", None)
    monkeypatch.setattr("e2vpt.search_stages.prepare", None)
    assert main(["search", "--resume", str(folder)]) == 0
    assert (folder / "table.md").read_text() in capsys.readouterr().out


def test_tables_line_up() -> None:
    text = search_report.budget_table([("one", 2, 30)], [("one", 1, 5), ("other", 10, 100)])
    assert text.splitlines() == [
        "budget:",
        "| stage  | runs | epochs |",
        "| ------ | ---- | ------ |",
        "| one    | 3    | 35     |",
        "| other  | 10   | 100    |",
        "| in all | 13   | 135    |",
    ]
