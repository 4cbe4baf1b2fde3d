"""What a search chooses, with training replaced by given accuracies."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from e2vpt import search_report, search_stages, trials
from e2vpt.cli import main
from e2vpt.config import ModelConfig, PruneConfig, RunConfig, TrainConfig
from e2vpt.evaluate import Diverged
from e2vpt.search import search
from e2vpt.search_config import SearchConfig, SearchOptions
from e2vpt.search_stages import budget
from e2vpt.train import Setup, prepare
from shared_utils.config import save_json
from shared_utils.errors import InputError
from shared_utils.run_log import read_metrics

Score = Callable[[TrainConfig], float | None]


@dataclass
class Training:
    """Stands in for `train`: writes the result of a run whose accuracy `score` gives.

    None diverges. Tuned parameters are 100 and 80 for each whole prompt. Losses are all the same,
    or what `loss` gives.
    """

    score: Score
    loss: Callable[[TrainConfig], float] = lambda cfg: 0.3
    ran: dict[str, TrainConfig] = field(default_factory=dict)

    def __call__(self, cfg: TrainConfig, setup: Setup, folder: Path) -> Path:
        self.ran[cfg.run.name] = cfg
        save_json(replace(cfg, run=replace(cfg.run, resume="")), folder / "config.json")
        accuracy = self.score(cfg)
        if accuracy is None:
            raise Diverged("loss_ce", "nan at step 3", "a finite loss", "lower --optim.lr")
        prune = cfg.prune
        left = cfg.model.num_visual_prompts - prune.num_tokens
        tuned = 100 + left * 80 * (prune.of_segments - prune.num_segments) // prune.of_segments
        metrics = {} if setup.splits.val is None else {"val_top1": accuracy}
        if setup.splits.test is not None:
            metrics["test_top1"] = accuracy
        result = {
            "metrics": metrics,
            "parameters": {"tuned": tuned, "total": 1000, "percent": tuned / 10},
            "backbone": {"name": "x"},
            "data": setup.splits.summary(),
            "images_per_second": 1.0,
        }
        (folder / "result.json").write_text(json.dumps(result))
        row = {"seconds": 1.0} | ({"val_loss": self.loss(cfg)} if "val_top1" in metrics else {})
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return folder


@pytest.fixture(scope="module")
def model(tiny_backbones: tuple[Path, Path]) -> ModelConfig:
    return ModelConfig(
        backbone=str(tiny_backbones[0]), architecture="micro_vit", num_visual_prompts=4
    )


@pytest.fixture(scope="module")
def setup(model: ModelConfig) -> Setup:
    return prepare(TrainConfig(model=model, run=RunConfig(accelerator="cpu")))


@pytest.fixture
def searching(
    tmp_path: Path, model: ModelConfig, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, Any], dict[str, TrainConfig], Path]]:
    """Search with given accuracies: `search.json`, what ran, and the folder."""

    def run(
        score: Score,
        prompts: int = 4,
        how: PruneConfig | None = None,
        loss: Callable[[TrainConfig], float] = lambda cfg: 0.3,
        **options: Any,
    ) -> tuple[dict[str, Any], dict[str, TrainConfig], Path]:
        training = Training(score, loss)
        monkeypatch.setattr(trials, "train", training)
        monkeypatch.setattr(search_stages, "prepare", lambda cfg: setup)
        monkeypatch.setattr(search_report, "heat_maps", lambda *args: None)  # they take long
        small = {
            "lrs": (0.5, 0.1, 0.2), "weight_decays": (0.01, 0.0), "num_segments": 4,
            "min_segments": 2, "seeds": (0, 1), "final_on_val": False, "candidate_epochs": 3,
        }  # fmt: skip
        cfg = SearchConfig(
            recipe="digits",
            model=replace(model, num_visual_prompts=prompts),
            prune=how or PruneConfig(),
            run=RunConfig(runs_dir=tmp_path, name="x", accelerator="cpu"),
            search=SearchOptions(**(small | options)),
        )
        folder = search(cfg)
        assert len(training.ran) <= sum(runs for _, runs, _ in budget(cfg))
        return json.loads((folder / "search.json").read_text()), training.ran, folder

    return run


def equal(cfg: TrainConfig) -> float:
    return 0.5


def stage(found: dict[str, Any], name: str) -> list[str]:
    return [trial["name"] for trial in found["stages"].get(name, [])]


def labels(found: dict[str, Any]) -> list[str]:
    return [row["label"] for row in found["rows"]]


# ---- ties -----------------------------------------------------------------------------------


def test_ties_go_to_fewer_parameters_then_to_smaller_rate_and_decay(searching: Any) -> None:
    found, ran, folder = searching(equal)
    assert len(ran) == 6 + 4 + 2 + 2 + 4 * 2  # all that the budget allows
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, len(ran) + 1))
    assert rows[-1]["epoch"] == json.loads((folder / "result.json").read_text())["epochs"]
    assert {row["val_top1"] for row in rows} == {0.5}
    assert (found["rows"][0]["lr"], found["rows"][0]["weight_decay"]) == (0.1, 0.0)
    assert stage(found, "segments") == ["candidate-t3-s1", "candidate-t3-s2"]
    assert stage(found, "finalists") == ["finalist-t3-s2", "finalist-t3-s1"]
    row = found["rows"][1]
    assert (row["pruned_tokens"], row["pruned_segments"], row["tuned"]) == (3, 2, 140)
    assert found["chosen"] == "e2vpt pruned"


def test_of_equal_accuracies_the_lower_loss_is_taken(searching: Any) -> None:
    found, _, _ = searching(equal, loss=lambda cfg: 0.2 + abs(cfg.optim.lr - 0.2))
    assert found["rows"][0]["lr"] == 0.2
    grid = {trial["name"]: trial["val_loss"] for trial in found["stages"]["e2vpt grid"]}
    assert grid["e2vpt-lr0.5-wd0"] == 0.5
    # Pruning is for fewer parameters, whatever the loss.
    assert (found["rows"][1]["pruned_tokens"], found["rows"][1]["pruned_segments"]) == (3, 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # (accuracy, tuned, loss, rate, decay); None: it diverged
        ((0.6, 900, 9, 9, 9), (0.5, 100, 1, 1, 0)),
        ((0.5, 100, 9, 9, 9), (0.5, 101, 1, 1, 0)),
        ((0.5, 100, 1, 9, 9), (0.5, 100, 2, 1, 0)),
        ((0.5, 100, 1, 1, 9), (0.5, 100, 1, 2, 0)),
        ((0.5, 100, 1, 1, 0), (0.5, 100, 1, 1, 1)),
        ((0.0, 900, 9, 9, 9), (None, 0, 1, 1, 0)),
    ],
)
def test_the_order_of_two_runs(tmp_path: Path, one: Any, other: Any) -> None:
    def trial(
        accuracy: float | None, tuned: int, loss: float, lr: float, decay: float
    ) -> trials.Trial:
        folder = tmp_path / f"{loss}"
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"val_loss": loss}) + "\n")
        cfg = TrainConfig()
        cfg = replace(cfg, optim=replace(cfg.optim, lr=lr, weight_decay=decay))
        result: dict[str, Any] = {"metrics": {"val_top1": accuracy or 0.0}}
        result |= {"diverged": "nan"} if accuracy is None else {"parameters": {"tuned": tuned}}
        return trials.Trial("x", folder, cfg, result)

    assert search_stages.order(trial(*one)) < search_stages.order(trial(*other))


# ---- how much is pruned ---------------------------------------------------------------------


def test_no_pruning_can_win(searching: Any) -> None:
    found, _, folder = searching(lambda cfg: 0.5 if cfg.prune.source else 0.9)
    assert stage(found, "tokens")[0] == "candidate-t0-s0"
    assert found["chosen"] == "e2vpt"
    result = json.loads((folder / "result.json").read_text())
    assert (result["method"], result["parameters"]["tuned"]) == ("e2vpt", 420)
    assert labels(found)[1] == "e2vpt pruned"  # shown beside it


def test_segments_are_tried_at_the_best_number_of_tokens(searching: Any) -> None:
    def score(cfg: TrainConfig) -> float:
        tokens, segments = cfg.prune.num_tokens, cfg.prune.num_segments
        return 0.9 - 0.1 * abs(tokens - 1) - [0.1, 0, 0.2][segments]

    found, _, _ = searching(score)
    assert stage(found, "segments") == ["candidate-t1-s1", "candidate-t1-s2"]
    assert stage(found, "finalists") == ["finalist-t1-s1", "finalist-t1-s0"]
    assert found["rows"][1]["pruned_tokens"] == 1
    assert labels(found)[-1] == "e2vpt with 3 prompts"


def test_fewer_prompts_are_there_already_where_no_token_goes(searching: Any) -> None:
    def score(cfg: TrainConfig) -> float:
        return 0.9 - 0.1 * cfg.prune.num_tokens

    found, ran, _ = searching(score)
    assert found["rows"][1]["pruned_segments"] == 2
    assert labels(found)[-1] == "e2vpt with 4 prompts"
    assert found["rows"][-1]["test_top1"] == found["rows"][0]["test_top1"]
    assert not any("fewer" in name for name in ran)
    assert len(stage(found, "finals")) == len(set(stage(found, "finals"))) == 6


def test_one_prompt_is_pruned_in_segments(searching: Any) -> None:
    found, _, _ = searching(equal, prompts=1)
    assert stage(found, "tokens") == ["candidate-t0-s0"]
    assert stage(found, "segments") == ["candidate-t0-s1", "candidate-t0-s2"]
    assert found["rows"][1]["pruned_segments"] == 2


@pytest.mark.parametrize(
    "options",
    [
        {"prune": False},
        {"prompts": 0},
        {"prompts": 1, "min_segments": 4},
        {"methods": ("linear", "vpt-deep")},
    ],
)
def test_nothing_to_prune(searching: Any, options: dict[str, Any]) -> None:
    found, ran, _ = searching(equal, **options)
    methods = options.get("methods", ("e2vpt",))
    assert labels(found) == list(methods)
    assert len(ran) == len(methods) * (6 + 2)


def test_without_controls(searching: Any) -> None:
    found, ran, _ = searching(equal, controls=False, finalists=1)
    assert labels(found) == ["e2vpt", "e2vpt pruned"]
    assert len(ran) == 6 + 4 + 2 + 1 + 4


def test_every_method_gets_the_same_grid(searching: Any) -> None:
    found, ran, _ = searching(equal, methods=("linear", "e2vpt"))
    assert labels(found)[:2] == ["linear", "e2vpt"]
    grids = [
        [(ran[name].optim.lr, ran[name].optim.weight_decay) for name in stage(found, f"{m} grid")]
        for m in ("linear", "e2vpt")
    ]
    assert grids[0] == grids[1]
    assert len(set(grids[0])) == 6
    assert {ran[name].model.method for name in stage(found, "linear grid")} == {"linear"}
    assert [row["search_epochs"] for row in found["rows"][:2]] == [600, 600]


def test_prompts_of_the_vpt_baselines(searching: Any) -> None:
    methods = ("vpt-shallow", "vpt-deep", "e2vpt")
    _, ran, _ = searching(equal, methods=methods, vpt_prompts=7, prune=False)
    counts = {(cfg.model.method, cfg.model.num_visual_prompts) for cfg in ran.values()}
    assert counts == {("vpt-shallow", 7), ("vpt-deep", 7), ("e2vpt", 4)}


def test_rates_close_together_are_runs_of_their_own(searching: Any) -> None:
    found, _, _ = searching(equal, lrs=(0.1, 0.1000001), weight_decays=(0.0,))
    assert stage(found, "e2vpt grid") == ["e2vpt-lr0.1-wd0", "e2vpt-lr0.1000001-wd0"]


def test_how_to_prune_reaches_every_candidate(searching: Any) -> None:
    _, ran, _ = searching(equal, how=PruneConfig(per_layer=True, interleaved=True))
    pruned = [cfg.prune for cfg in ran.values() if cfg.prune.source]
    assert len(pruned) == 4 + 2 + 2 + 4
    assert all(prune.per_layer and prune.interleaved for prune in pruned)


def test_final_runs_train_on_validation_images_too(searching: Any) -> None:
    found, ran, folder = searching(equal, final_on_val=True)
    finals = stage(found, "finals")
    assert len(finals) == 8
    assert all(trial["val_loss"] is None for trial in found["stages"]["finals"])
    assert {name: cfg.data.train_on_val for name, cfg in ran.items()} == {
        name: name in finals for name in ran
    }
    results = [folder / "trials" / name / "result.json" for name in finals]
    counts = [json.loads(path.read_text())["data"] for path in results]
    assert {(c["train_images"], c["val_images"], c["test_images"]) for c in counts} == {
        (1000, 0, 797)
    }


# ---- runs that diverge ----------------------------------------------------------------------


def test_a_diverged_candidate_is_the_worst_and_stops_nothing(searching: Any) -> None:
    def score(cfg: TrainConfig) -> float | None:
        if cfg.optim.lr == 0.5 or cfg.prune.num_tokens == 3:
            return None
        return 0.0  # as bad as they count, yet better

    found, _, _ = searching(score)
    assert found["rows"][0]["lr"] == 0.1
    diverged = [t for of in found["stages"].values() for t in of if t["diverged"]]
    assert [trial["name"] for trial in diverged] == [
        "e2vpt-lr0.5-wd0.01", "e2vpt-lr0.5-wd0", "candidate-t3-s0",
    ]  # fmt: skip
    for trial in diverged:
        assert trial["metrics"] == {"val_top1": 0.0}
        assert trial["diverged"] == "loss_ce: got nan at step 3"  # no advice for a single run
        assert trial["tuned"] is None
    assert stage(found, "finalists") == ["finalist-t2-s2", "finalist-t2-s1"]


def test_every_pruned_candidate_diverged(
    searching: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _, _ = searching(
        lambda cfg: None if cfg.prune.num_tokens or cfg.prune.num_segments else 0.5
    )
    assert labels(found) == ["e2vpt"]
    assert "every pruned candidate diverged: nothing is pruned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("score", "match"),
    [
        (lambda cfg: None, r"^search\.lrs: got rates at which every run diverged \(e2vpt grid\), "),
        (
            lambda cfg: None if cfg.run.name.startswith("finalist") else 0.5,
            r"^search\.lrs: got rates at which every run diverged \(finalists\), expected lower ",
        ),
        (
            lambda cfg: None if cfg.run.name == "final-e2vpt-1" else 0.5,
            r"^final run final-e2vpt-1: got one that diverged \(loss_ce: got nan at step 3\), exp",
        ),
    ],
)
def test_what_diverged_in_the_end_is_one_line(searching: Any, score: Score, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        searching(score)
    assert "--optim.lr" not in str(caught.value)
    assert "search" in str(caught.value).rpartition(";")[2]


def test_real_rates_that_are_far_too_high(
    tmp_path: Path, quick_search: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["search", "digits", *quick_search, "--runs-dir", str(tmp_path), "--name", "x"]
    argv += ["--search.no-prune", "--search.seeds", "0"]
    assert main([*argv, "--search.lrs", "1e30", "0.05"]) == 0
    found = json.loads((tmp_path / "e2vpt" / "x" / "search.json").read_text())
    told = [trial["diverged"] for trial in found["stages"]["e2vpt grid"]]
    assert told[0].startswith("loss_ce: got ")
    assert told[1] is None
    assert found["rows"][0]["lr"] == 0.05
    assert (tmp_path / "e2vpt" / "x" / "search.png").stat().st_size > 5000
    capsys.readouterr()
    assert main([*argv, "--overwrite", "--search.lrs", "1e30"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: search.lrs: got rates at which every run diverged")
    assert error.count("\n") == 1


def test_prompts_with_a_projection_lose_tokens_only(searching: Any, model: ModelConfig) -> None:
    options = SearchOptions(num_segments=4, min_segments=4, lrs=(0.1,), seeds=(0,))
    cfg = SearchConfig(model=replace(model, prompt_dim=8), search=options)
    assert [runs for _, runs, _ in budget(cfg)] == [4, 4, 0, 2, 4]
    assert search_stages.searchable(replace(cfg, run=RunConfig(accelerator="cpu")))


def test_controls_are_told_as_such() -> None:
    row = {"label": "x", "lr": 1, "weight_decay": 0, "pruned_tokens": 2, "pruned_segments": 1,
           "of_segments": 8, "tuned": 1234, "percent": 0.5, "val_top1": None, "test_mean": 0.5,
           "test_std": 0.25, "search_epochs": 3, "search_seconds": 2.4,
           "final_seconds": 1.2}  # fmt: skip
    line = search_report.table([row]).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "x", "1", "0", "2 tokens 1/8 segments", "1,234", "0.500", "-", "50.00 ± 25.00", "3", "2",
        "1",
    ]  # fmt: skip
