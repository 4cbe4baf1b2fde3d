"""The stages of a search: rates and decays, tokens, segments, finalists, final runs.

Every choice is made on the validation images; the test images are seen by the final runs alone.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from e2vpt.config import Method, TrainConfig
from e2vpt.data import load_data
from e2vpt.families import family_of
from e2vpt.search_config import SearchConfig, segment_candidates, token_candidates
from e2vpt.search_report import Row
from e2vpt.train import Setup, prepare
from e2vpt.trials import Trial, Trials
from shared_utils.errors import InputError
from shared_utils.run_log import RunLog


def budget(cfg: SearchConfig) -> list[tuple[str, int, int]]:
    """The stages with their number of runs and of epochs, at most: printed before anything runs."""
    options, epochs = cfg.search, cfg.optim.epochs
    grid = len(options.methods) * len(options.lrs) * len(options.weight_decays)
    stages = [("rates and decays", grid, grid * epochs)]
    finals = len(options.methods)
    if _prunes(cfg):
        tokens, segments = _candidates(cfg)
        finalists = min(options.finalists, len(tokens) + len(segments) - 1)
        stages += [
            ("tokens to prune", len(tokens), len(tokens) * options.candidate_epochs),
            ("segments to prune", len(segments), len(segments) * options.candidate_epochs),
            ("finalists in full", finalists, finalists * epochs),
        ]
        finals += 3 if options.controls else 1
    finals *= len(options.seeds)
    return [*stages, ("final runs", finals, finals * epochs)]


def _prunes(cfg: SearchConfig) -> bool:
    if not (cfg.search.prune and "e2vpt" in cfg.search.methods and cfg.model.num_visual_prompts):
        return False
    return sum(map(len, _candidates(cfg))) > 1  # none at all is one of them


def _candidates(cfg: SearchConfig) -> tuple[list[int], list[int]]:
    """How many tokens, and then how many segments, to try to remove."""
    options = cfg.search
    segments = segment_candidates(options.num_segments, options.min_segments)
    return token_candidates(cfg.model.num_visual_prompts), segments


def searchable(cfg: SearchConfig) -> Setup:
    """`prepare`, and a check that every stage will have what it needs.

    Raises: InputError, before hours went into the first stages.
    """
    setup = prepare(cfg)
    if setup.splits.val is None:
        raise InputError(
            "data.train_on_val", "no validation images", "some to choose by", "leave it out"
        )
    if setup.splits.test is None:
        raise InputError(
            "data.source", "no test images", "some for the final runs", "add a test split"
        )
    if _prunes(cfg):
        backbone, parts = setup.backbone.module, cfg.search.num_segments
        for layer in family_of(backbone).check_supported(backbone).layers:
            if layer.embed_dim % parts:
                raise InputError(
                    "search.num_segments",
                    parts,
                    f"a divisor of the width {layer.embed_dim}",
                    "choose another number",
                )
        if cfg.model.prompt_dim and _candidates(cfg)[1]:
            raise InputError(
                "model.prompt_dim",
                cfg.model.prompt_dim,
                "0, as prompts with a projection have no segments to prune",
                f"give --search.min-segments {parts} to prune tokens only",
            )
    return setup


class Stages:
    """The stages of one search; `run` is the whole of it in order."""

    def __init__(self, cfg: SearchConfig, folder: Path, setup: Setup, log: RunLog) -> None:
        """Prepare.

        Args:
            cfg: what to search.
            folder: the trials go below `trials/` in it.
            setup: of `searchable`.
            log: tells how far it is; a line for each trial, `step` counts them, `epoch` theirs.
        """
        self.cfg, self.options, self.log = cfg, cfg.search, log
        self.trials = Trials(folder / "trials")
        # Test images are for the final runs alone.
        self.setup = replace(setup, splits=replace(setup.splits, test=None))
        self.final_setup = _final_setup(cfg, setup)
        self.stages: dict[str, list[Trial]] = {}
        self.num_trials = self.num_epochs = 0

    def run(self) -> tuple[list[Row], dict[str, list[Trial]]]:
        """Every stage of every method, then the final runs.

        Returns: the lines of the results table, and the trials by stage, each once.
        Raises: InputError where all runs of a stage, or a final run, diverged.
        """
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
        if method in ("vpt-shallow", "vpt-deep") and self.options.vpt_prompts:
            model = replace(model, num_visual_prompts=self.options.vpt_prompts)
        for decay in self.options.weight_decays:
            for lr in self.options.lrs:
                optim = replace(cfg.optim, lr=lr, weight_decay=decay)
                trial = replace(cfg, model=model, optim=optim)
                self._trial(f"{method} grid", f"{method}-lr{lr:.10g}-wd{decay:.10g}", trial)
        return self._best(f"{method} grid")

    def _pruning(self, trained: Trial) -> list[Row]:
        """Tokens, segments, finalists; then the choice and its controls with every seed."""
        options = self.options
        token_counts, segment_counts = _candidates(self.cfg)
        for count in token_counts:
            self._candidate("tokens", trained, count, 0)
        tokens = self._best("tokens").cfg.prune.num_tokens
        for count in segment_counts:
            self._candidate("segments", trained, tokens, count)
        pool = [*self.stages["tokens"], *self.stages.get("segments", ())]
        ranked = [trial for trial in sorted(pool, key=order) if not trial.is_diverged]
        pruned = [t for t in ranked if t.cfg.prune.num_tokens or t.cfg.prune.num_segments]
        if not pruned:
            self.log.say("every pruned candidate diverged: nothing is pruned")
            return []
        for candidate in pruned[: options.finalists]:
            counts = (candidate.cfg.prune.num_tokens, candidate.cfg.prune.num_segments)
            cfg = self._pruned(trained, *counts)
            self._trial("finalists", "finalist-t{}-s{}".format(*counts), cfg)
        chosen = self._best("finalists")
        cost = self._cost("e2vpt grid", "tokens", "segments", "finalists")
        rows = [Row("e2vpt pruned", chosen, self._finals("e2vpt-pruned", chosen), *cost)]
        if options.controls:
            by_chance = replace(chosen, cfg=_with_prune(chosen.cfg, random=True))
            finals = self._finals("e2vpt-random", by_chance)
            rows.append(Row("e2vpt pruned at random", by_chance, finals, *cost, is_control=True))
            model = trained.cfg.model
            left = model.num_visual_prompts - chosen.cfg.prune.num_tokens
            fewer = replace(trained.cfg, model=replace(model, num_visual_prompts=left))
            same = replace(trained, cfg=fewer)
            # Where segments alone were removed, these runs are there already.
            finals = self._finals("e2vpt" if same.cfg == trained.cfg else "e2vpt-fewer", same)
            label, cost = f"e2vpt with {left} prompts", self._cost("e2vpt grid")
            rows.append(Row(label, same, finals, *cost, is_control=True))
        return rows

    def _candidate(self, stage: str, trained: Trial, tokens: int, segments: int) -> None:
        """A short run that starts from the trained prompts that stay."""
        cfg = _with_prune(self._pruned(trained, tokens, segments), rewind="trained")
        epochs = self.options.candidate_epochs
        optim = replace(cfg.optim, epochs=epochs, warmup_epochs=min(1, epochs))
        self._trial(stage, f"candidate-t{tokens}-s{segments}", replace(cfg, optim=optim))

    def _pruned(self, source: Trial, tokens: int, segments: int) -> TrainConfig:
        return _with_prune(
            source.cfg,
            source=str(source.folder),
            num_tokens=tokens,
            num_segments=segments,
            of_segments=self.options.num_segments,
            rewind=self.options.rewind,
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
        of_stage = self.stages.setdefault(stage, [])
        run = replace(cfg.run, name=name, resume="", overwrite=False)
        trial = self.trials.run(name, replace(cfg, run=run), setup or self.setup)
        if name not in (other.name for other in of_stage):
            of_stage.append(trial)
            self.num_trials += 1
            self.num_epochs += trial.cfg.optim.epochs
            values = {**trial.result["metrics"], "trial_seconds": trial.seconds}
            self.log.log(self.num_trials, self.num_epochs, values)
            scores = "  ".join(f"{k} {v:.4f}" for k, v in trial.result["metrics"].items())
            self.log.say(f"{stage}: {name}  {scores}{'  diverged' * trial.is_diverged}")
        return trial

    def _best(self, stage: str) -> Trial:
        """Raises: InputError where every run diverged."""
        best = min(self.stages[stage], key=order)
        if best.is_diverged:
            raise InputError(
                "search.lrs",
                f"rates at which every run diverged ({stage})",
                "lower ones",
                "start a new search with them",
            )
        return best

    def _cost(self, *stages: str) -> tuple[int, float]:
        trials = [trial for stage in stages for trial in self.stages.get(stage, ())]
        return sum(t.cfg.optim.epochs for t in trials), sum(t.seconds for t in trials)


def order(trial: Trial) -> tuple[bool, float, int, float, float, float]:
    """Sorts the best first: what diverged last, then by accuracy on the validation images.

    Of equals, which 200 images often give, fewer parameters come first, then the lower loss on
    these images, then the smaller rate, then the smaller decay.
    """
    optim = trial.cfg.optim
    by_validation = (-trial.val_top1, trial.tuned, trial.val_loss)
    return trial.is_diverged, *by_validation, optim.lr, optim.weight_decay


def _with_prune(cfg: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(cfg, prune=replace(cfg.prune, **changes))


def _final_setup(cfg: SearchConfig, setup: Setup) -> Setup:
    """The images of the final runs: with `final_on_val` the validation images train too."""
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
