"""Search for a task's rate, decay and pruning in stages, and run the choice with several seeds.

Paper's code: 40 runs over rates and decays, then up to 72 retrainings over how much to prune.
Differs from the paper: pruning is searched one coordinate at a time (tokens, then segments of the
survivors) with short runs that start from the trained prompts; only the best few are retrained in
full. No pruning is always among the candidates. Ties go to fewer tuned parameters, then to the
smaller rate and decay.

Every run is a folder of its own below `trials/`. What is finished there is not run again, so a
search that was killed at any point goes on where it was.
"""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from e2vpt import vtab
from e2vpt.config import Method, TrainConfig
from e2vpt.data import load_data
from e2vpt.search_config import SearchConfig, segment_counts, token_counts
from e2vpt.train import Setup, prepare
from e2vpt.trials import Trial, Trials
from shared_utils.checkpoint import write_text
from shared_utils.config import save_json
from shared_utils.errors import InputError, Interrupted
from shared_utils.run_log import RunLog, open_run


@dataclass(frozen=True)
class Row:
    """One line of the results table.

    Attributes:
        label: the method, and what was pruned.
        chosen: the run whose settings were chosen.
        finals: its final runs, one for each seed.
        search_epochs: epochs of all runs that led to the choice.
        search_seconds: their wall time.
    """

    label: str
    chosen: Trial
    finals: tuple[Trial, ...]
    search_epochs: int
    search_seconds: float

    def plain(self) -> dict[str, Any]:
        """For `search.json`; accuracies in [0, 1]."""
        tests = [trial.test_top1 for trial in self.finals]
        prune = self.chosen.cfg.prune
        return {
            "label": self.label,
            "method": self.chosen.cfg.model.method,
            "lr": self.chosen.cfg.optim.lr,
            "weight_decay": self.chosen.cfg.optim.weight_decay,
            "pruned_tokens": prune.num_tokens,
            "pruned_segments": prune.num_segments,
            "of_segments": prune.of_segments if prune.num_segments else 0,
            "val_top1": self.chosen.val_top1,
            "test_top1": tests,
            "test_mean": mean(tests),
            "test_std": stdev(tests) if len(tests) > 1 else 0.0,
            "tuned": self.finals[0].tuned,
            "percent": self.finals[0].result["parameters"]["percent"],
            "search_epochs": self.search_epochs,
            "search_seconds": round(self.search_seconds, 1),
            "final_seconds": round(mean(trial.seconds for trial in self.finals), 1),
            "rewind": prune.rewind if prune.source else None,
        }


def budget(cfg: SearchConfig) -> list[tuple[str, int, int]]:
    """The stages with their number of runs and of epochs, at most: printed before anything runs."""
    options, epochs = cfg.search, cfg.optim.epochs
    grid = len(options.methods) * len(options.lrs) * len(options.weight_decays)
    stages = [("rates and decays", grid, grid * epochs)]
    finals = len(options.methods)
    if _prunes(cfg):
        tokens = len(set(token_counts(cfg.model.num_visual_prompts)) | {0})
        parts = len(segment_counts(options.num_segments, options.min_segments))
        stages += [
            ("tokens to prune", tokens, tokens * options.candidate_epochs),
            ("segments to prune", parts, parts * options.candidate_epochs),
            ("finalists in full", options.finalists, options.finalists * epochs),
        ]
        finals += 3 if options.controls else 1
    finals *= len(options.seeds)
    return [*stages, ("final runs", finals, finals * epochs)]


def _prunes(cfg: SearchConfig) -> bool:
    return cfg.search.prune and "e2vpt" in cfg.search.methods and cfg.model.num_visual_prompts > 1


def search(cfg: SearchConfig) -> Path:
    """Run all stages; write `search.json`, `table.md`, the heat map and `result.json`.

    Raises: InputError for what the user can mend; Interrupted after Ctrl-C.
    """
    folder = open_run(
        "e2vpt",
        f"search-{cfg.recipe}",
        runs_dir=cfg.run.runs_dir,
        name=cfg.run.name,
        resume=cfg.run.resume,
        overwrite=cfg.run.overwrite,
    )
    save_json(
        replace(cfg, run=replace(cfg.run, resume="", overwrite=False)), folder / "config.json"
    )
    log = RunLog(folder)
    log.say(f"run folder {folder}")
    try:
        if cfg.search.suite:
            search_suite(cfg, folder, log)
        else:
            search_one(cfg, folder, log)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"e2vpt search --resume {shlex.quote(str(folder))}") from None
    log.close()
    return folder


def search_one(cfg: SearchConfig, folder: Path, log: RunLog) -> dict[str, Any]:
    """Search one data set; returns what `search.json` holds, which is read where it is there."""
    from e2vpt import search_report  # it needs this module's Row

    written = folder / "search.json"
    if not written.is_file():
        log.say(search_report.budget_table(budget(cfg)))
        setup = prepare(cfg)
        rows, stages = _Search(cfg, folder, setup, log).run()
        search_report.write(folder, cfg, setup, rows, stages)
    found: dict[str, Any] = json.loads(written.read_text())
    log.say(search_report.table(found["rows"]))
    return found


def search_suite(cfg: SearchConfig, folder: Path, log: RunLog) -> None:
    """Search every VTAB-1k task, each in a folder of its own, and compare the means.

    Raises: InputError where not one task is there; a missing one is named and left out.
    """
    root = cfg.search.data_root
    present = [task for task in vtab.TASKS if vtab.is_vtab_task(root / task.folder)]
    if not present:
        raise InputError(
            "search.data_root",
            f"'{root}', which holds no VTAB-1k task",
            "folders like cifar with train800.txt",
            "see e2vpt data check vtab",
        )
    missing = [task.folder for task in vtab.TASKS if task not in present]
    if missing:
        log.say(f"not there, left out: {', '.join(missing)}")
    accuracies: dict[str, dict[str, float]] = {}
    for task in present:
        log.say(f"task {task.folder}")
        model = replace(
            cfg.model,
            num_visual_prompts=task.num_visual_prompts,
            num_kv_prompts=task.num_kv_prompts,
        )
        data = replace(cfg.data, source=str(root / task.folder))
        (folder / task.folder).mkdir(exist_ok=True)
        one = replace(cfg, model=model, data=data, search=replace(cfg.search, suite=""))
        for row in search_one(one, folder / task.folder, log)["rows"]:
            label = "e2vpt with fewer prompts" if row["label"].endswith("prompts") else row["label"]
            accuracies.setdefault(label, {})[task.folder] = 100 * row["test_mean"]
    told = "\n\n".join(f"{label}\n{vtab.comparison(of)}" for label, of in accuracies.items())
    write_text(told + "\n", folder / "table.md")
    log.say(told)


class _Search:
    """The stages of one search; `run` is the whole of it in order."""

    def __init__(self, cfg: SearchConfig, folder: Path, setup: Setup, log: RunLog) -> None:
        if setup.fabric.world_size > 1:
            raise InputError("processes", setup.fabric.world_size, "1", "search with one process")
        if setup.splits.val is None:
            raise InputError(
                "data.source", "no validation images", "some to choose by", "give --data.num-val"
            )
        self.cfg, self.options, self.log = cfg, cfg.search, log
        self.trials = Trials(folder / "trials")
        # Test images are for the final runs alone.
        self.setup = replace(setup, splits=replace(setup.splits, test=None))
        self.final_setup = _final_setup(cfg, setup)
        self.stages: dict[str, list[Trial]] = {}

    def run(self) -> tuple[list[Row], dict[str, list[Trial]]]:
        """Every stage of every method, then the final runs."""
        rows: list[Row] = []
        for method in self.options.methods:
            best = self._grid(method)
            cost = self._cost(f"{method} grid")
            rows.append(Row(method, best, self._finals(method, best), *cost))
            if method == "e2vpt" and _prunes(self.cfg):
                rows += self._pruning(best)
        return rows, self.stages

    def _grid(self, method: Method) -> Trial:
        """All rates and decays; the best on the validation images."""
        cfg = self.cfg.training()
        model = replace(cfg.model, method=method)
        for decay in self.options.weight_decays:
            for lr in self.options.lrs:
                optim = replace(cfg.optim, lr=lr, weight_decay=decay)
                trial = replace(cfg, model=model, optim=optim)
                self._trial(f"{method} grid", f"{method}-lr{lr:g}-wd{decay:g}", trial)
        return _best(self.stages[f"{method} grid"])

    def _pruning(self, trained: Trial) -> list[Row]:
        """Tokens, segments, finalists; then the choice and its controls with every seed."""
        options = self.options
        if trained.cfg.model.num_visual_prompts < 1:
            return []
        for count in sorted({0, *token_counts(trained.cfg.model.num_visual_prompts)}):
            self._candidate("tokens", trained, count, 0)
        tokens = _best(self.stages["tokens"]).cfg.prune.num_tokens
        for count in sorted({0, *segment_counts(options.num_segments, options.min_segments)}):
            self._candidate("segments", trained, tokens, count)
        pool = {t.name: t for stage in ("tokens", "segments") for t in self.stages[stage]}
        ranked = sorted(pool.values(), key=_order)
        pruned = [t for t in ranked if t.cfg.prune.num_tokens or t.cfg.prune.num_segments]
        for candidate in pruned[: options.finalists]:
            counts = (candidate.cfg.prune.num_tokens, candidate.cfg.prune.num_segments)
            cfg = self._pruned(trained.cfg, trained, *counts)
            self._trial("finalists", "finalist-t{}-s{}".format(*counts), cfg)
        stages = ("e2vpt grid", "tokens", "segments", "finalists")
        cost = self._cost(*stages)
        chosen = _best(self.stages["finalists"])
        rows = [Row("e2vpt pruned", chosen, self._finals("e2vpt-pruned", chosen), *cost)]
        if options.controls:
            by_chance = replace(chosen, cfg=_with_prune(chosen.cfg, random=True))
            finals = self._finals("e2vpt-random", by_chance)
            rows.append(Row("e2vpt pruned at random", by_chance, finals, *cost))
            left = trained.cfg.model.num_visual_prompts - chosen.cfg.prune.num_tokens
            fewer = replace(trained.cfg, model=replace(trained.cfg.model, num_visual_prompts=left))
            same = replace(trained, cfg=fewer)
            finals = self._finals("e2vpt-fewer", same)
            rows.append(Row(f"e2vpt with {left} prompts", same, finals, *self._cost("e2vpt grid")))
        return rows

    def _candidate(self, stage: str, trained: Trial, tokens: int, segments: int) -> None:
        """A short run that starts from the trained prompts that stay."""
        cfg = self._pruned(trained.cfg, trained, tokens, segments)
        cfg = _with_prune(cfg, rewind="trained")
        epochs = self.options.candidate_epochs
        optim = replace(cfg.optim, epochs=epochs, warmup_epochs=min(1, epochs))
        self._trial(stage, f"candidate-t{tokens}-s{segments}", replace(cfg, optim=optim))

    def _pruned(self, cfg: TrainConfig, source: Trial, tokens: int, segments: int) -> TrainConfig:
        return replace(
            cfg,
            prune=replace(
                cfg.prune,
                source=str(source.folder),
                num_tokens=tokens,
                num_segments=segments,
                of_segments=self.options.num_segments,
                rewind=self.options.rewind,
            ),
        )

    def _finals(self, label: str, chosen: Trial) -> tuple[Trial, ...]:
        """The chosen settings with every seed, tested once.

        A pruned choice is scored, pruned and rewound anew for each seed, from that seed's own
        trained prompts: so the spread over seeds is that of the whole method.
        """
        finals = []
        for seed in self.options.seeds:
            cfg = replace(chosen.cfg, run=replace(chosen.cfg.run, seed=seed))
            cfg = replace(cfg, data=replace(cfg.data, train_on_val=self.options.final_on_val))
            if cfg.prune.source:
                cfg = _with_prune(cfg, source=str(self.trials.place(f"final-e2vpt-{seed}")))
            finals.append(
                self._trial("finals", f"final-{label}-{seed}", cfg, setup=self.final_setup)
            )
        return tuple(finals)

    def _trial(self, stage: str, name: str, cfg: TrainConfig, setup: Setup | None = None) -> Trial:
        run = replace(cfg.run, name=name, resume="", overwrite=False)
        trial = self.trials.run(name, replace(cfg, run=run), setup or self.setup)
        self.stages.setdefault(stage, []).append(trial)
        scores = "  ".join(f"{k} {v:.4f}" for k, v in trial.result["metrics"].items())
        self.log.say(f"{stage}: {name}  {scores}")
        return trial

    def _cost(self, *stages: str) -> tuple[int, float]:
        trials = [trial for stage in stages for trial in self.stages[stage]]
        return sum(t.cfg.optim.epochs for t in trials), sum(t.seconds for t in trials)


def _order(trial: Trial) -> tuple[float, int, float, float]:
    """Best first: validation accuracy; of equals fewer parameters, smaller rate, smaller decay."""
    optim = trial.cfg.optim
    return -trial.val_top1, trial.tuned, optim.lr, optim.weight_decay


def _best(trials: list[Trial]) -> Trial:
    """Raises: InputError where every run diverged."""
    if all(trial.is_diverged for trial in trials):
        raise InputError(
            "search.lrs", "rates at which every run diverged", "lower ones", "start a new search"
        )
    return min(trials, key=_order)


def _with_prune(cfg: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(cfg, prune=replace(cfg.prune, **changes))


def _final_setup(cfg: SearchConfig, setup: Setup) -> Setup:
    """The images of the final runs: with `final_on_val` the validation images train too."""
    if setup.splits.test is None:
        raise InputError(
            "data.source", "no test images", "some for the final runs", "add a test split"
        )
    if not cfg.search.final_on_val:
        return setup
    backbone = setup.backbone
    splits = load_data(
        replace(cfg.data, train_on_val=True),
        img_size=backbone.img_size,
        mean=backbone.mean,
        std=backbone.std,
        seed=cfg.run.seed,
    )
    return replace(setup, splits=splits)
