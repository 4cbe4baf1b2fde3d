"""What `e2vpt search` tries: rates and decays, then how much to prune, then the final runs."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from e2vpt.config import Method, PruneConfig, Rewind, RunConfig, TrainConfig
from shared_utils.errors import InputError

PERCENTS = range(10, 100, 10)  # of tokens and of segments, the paper's code


def token_counts(num_prompts: int) -> list[int]:
    """How many of P visual prompts the paper's code tries to remove; at least one stays."""
    return sorted({min(num_prompts * percent // 100, num_prompts - 1) for percent in PERCENTS})


def segment_counts(num_segments: int, min_kept: int = 4) -> list[int]:
    """How many of R segments it tries to remove from each prompt that stays."""
    counts = {num_segments * percent // 100 for percent in PERCENTS}
    return sorted(count for count in counts if num_segments - count >= min_kept)


def token_candidates(num_prompts: int) -> list[int]:
    """Counts of tokens that a search tries to remove; none is always among them."""
    return sorted({0, *token_counts(num_prompts)})


def segment_candidates(num_segments: int, min_kept: int) -> list[int]:
    """Counts of segments that a search tries to remove: 1 or more, none was tried with tokens."""
    return [count for count in segment_counts(num_segments, min_kept) if count]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The stages of a search. Every choice is made on the validation images."""

    methods: tuple[Method, ...] = ("e2vpt",)
    """methods that each get the same grid; e2vpt is pruned too"""
    lrs: tuple[float, ...] = (50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05)
    """learning rates of the grid, as --optim.lr (default: the paper's base rates)"""
    weight_decays: tuple[float, ...] = (0.01, 0.001, 0.0001, 0.0)
    """weight decays of the grid (default: the paper's)"""
    vpt_prompts: int = 0
    """visual prompts of vpt-shallow and vpt-deep, for as many parameters as e2vpt has with its
    key-value prompts (0: as many prompts as e2vpt)"""
    prune: bool = True
    """look for prompts and segments to remove from the best e2vpt run"""
    candidate_epochs: int = 15
    """epochs of a pruned candidate, warm-started from the trained prompts"""
    num_segments: int = 8
    """segments that a prompt is cut into"""
    min_segments: int = 4
    """segments that each prompt keeps at least"""
    finalists: int = 2
    """pruned candidates retrained in full, of which the best is taken"""
    rewind: Rewind = "init"
    """what survivors start from when retrained: init, trained or reinit"""
    controls: bool = True
    """also run pruning at random, and as few prompts from the start, at the chosen size"""
    seeds: tuple[int, ...] = (42, 44, 82, 100, 800)
    """seeds of the final runs, which are tested once (default: the paper's)"""
    final_on_val: bool = True
    """train the final runs on training and validation images together, as for VTAB-1k"""
    suite: tyro.conf.Suppress[Literal["", "vtab"]] = ""
    data_root: Path = Path("data/vtab-1k")
    """recipe vtab: folder of the benchmark, with a folder per task"""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("methods", "lrs", "weight_decays", "seeds"):
            # As in the names of the runs.
            told = [v if isinstance(v, str) else f"{v:.10g}" for v in getattr(self, name)]
            if not told:
                raise InputError(f"search.{name}", "nothing", "at least one", "name some")
            if twice := [value for value in told if told.count(value) > 1]:
                raise InputError(
                    f"search.{name}", f"{twice[0]} twice", "each once", "leave one out"
                )
        for lr in self.lrs:
            if not 0 < lr < math.inf:
                raise InputError("search.lrs", lr, "more than 0", "correct it")
        for decay in self.weight_decays:
            if not 0 <= decay < math.inf:
                raise InputError("search.weight_decays", decay, "0 or more", "correct it")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise InputError("search.seeds", seed, "0 to 4294967295", "correct it")
        for name in ("candidate_epochs", "num_segments", "min_segments", "finalists"):
            if getattr(self, name) < 1:
                raise InputError(f"search.{name}", getattr(self, name), "1 or more", "correct it")
        if self.vpt_prompts < 0:
            raise InputError("search.vpt_prompts", self.vpt_prompts, "0 or more", "correct it")
        if self.min_segments > self.num_segments:
            raise InputError(
                "search.min_segments",
                self.min_segments,
                f"at most search.num_segments ({self.num_segments})",
                "lower it",
            )


@dataclass(frozen=True, kw_only=True)
class SearchConfig(TrainConfig):
    """`e2vpt search`: a recipe, and what to try around it."""

    search: SearchOptions = field(default_factory=SearchOptions)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """What a search decides itself is not to be given."""
        for name in ("source", "num_tokens", "num_segments", "of_segments", "rewind", "random"):
            if getattr(self.prune, name) != getattr(PruneConfig(), name):
                raise InputError(
                    f"prune.{name}",
                    getattr(self.prune, name),
                    "nothing, as the search prunes by itself",
                    "leave it out; see --search.num-segments, .rewind and .controls",
                )

    @classmethod
    def of(cls, recipe: TrainConfig, search: SearchOptions) -> "SearchConfig":
        """A training recipe with a search around it."""
        return cls(**{f.name: getattr(recipe, f.name) for f in fields(recipe)}, search=search)

    def training(self) -> TrainConfig:
        """The training part alone."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)})
