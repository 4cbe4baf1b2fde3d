"""The command `dnc`: parse, run, report. What each command does lives in its own module."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from shared_utils.config import parse, parse_recipe
from shared_utils.errors import InputError, near_miss, run_main

HELP = ("-h", "--help")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a run on one of its splits again, on other data, or against unknown images."""

    run: tyro.conf.Positional[Path]
    """run folder of `dnc train` or `dnc fit`"""
    split: Literal["test", "val", "train"] = "test"
    """which split"""
    source: str = ""
    """other data than the run's own, as --data.source; all of it where it has no splits"""
    unknown: str = ""
    """images of no class of the run, as --data.source: how well scores tell them apart"""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """what to run on"""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Name the training images that decide: a page and a JSON file."""

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """image files, folders (searched below) and glob patterns"""
    run: Path = Path()
    """run folder of `dnc train` or `dnc fit`"""
    from_test: int = 0
    """explain so many images of the run's own test split instead, the wrong decisions first"""
    output: Path = Path("explanation.html")
    """the page to write; the JSON file gets its name"""
    top: int = 5
    """classes to name, the predicted one included"""

    def __post_init__(self) -> None:
        """Something is to be explained, by something."""
        if self.run == Path():
            raise InputError("run", "nothing", "a run folder", "give --run RUN")
        if bool(self.images) == bool(self.from_test):
            got = "both" if self.images else "neither"
            raise InputError(
                "images and from_test", got, "one of them", "name images or give --from-test 8"
            )
        if self.top < 2:
            raise InputError("top", self.top, "2 or more", "correct it")


def _train(argv: Sequence[str]) -> None:
    from dnc.recipes import RECIPES

    _, cfg = parse_recipe(
        RECIPES, argv, prog="dnc train", about="Train under a classifier without parameters."
    )
    from dnc.train import train

    train(cfg)


def _fit(argv: Sequence[str]) -> None:
    from dnc.recipes import FIT_RECIPES

    _, cfg = parse_recipe(
        FIT_RECIPES,
        argv,
        prog="dnc fit",
        about="Turn a trained network into a nearest-centroid classifier: one pass, no training.",
        resumes=False,
    )
    from dnc.fit_run import fit_run

    fit_run(cfg)


def _evaluate(argv: Sequence[str]) -> None:
    cfg = parse(EvaluateConfig, argv, prog="dnc evaluate", about=EvaluateConfig.__doc__ or "")
    from dnc.commands import evaluate_run

    for name, value in evaluate_run(
        cfg.run,
        cfg.split,
        source=cfg.source,
        unknown=cfg.unknown,
        accelerator=cfg.accelerator,
    ).items():
        print(f"{name} {value:.4f}")


def _explain(argv: Sequence[str]) -> None:
    cfg = parse(ExplainConfig, argv, prog="dnc explain", about=ExplainConfig.__doc__ or "")
    from dnc.commands import explain_run

    count = explain_run(cfg.run, cfg.images, cfg.output, from_test=cfg.from_test, top=cfg.top)
    print(f"{count} images: {cfg.output}, {cfg.output.with_suffix('.json')}")


def _bench(argv: Sequence[str]) -> None:
    from dnc.bench import BenchConfig, bench

    bench(parse(BenchConfig, argv, prog="dnc bench", about=BenchConfig.__doc__ or ""))


def _seg(argv: Sequence[str]) -> None:
    from dnc.seg_cli import SEG_COMMANDS

    _dispatch("dnc seg", SEG_COMMANDS, argv)
    if not argv or argv[0] in HELP:
        raise SystemExit(0)


Commands = Mapping[str, tuple[Callable[[Sequence[str]], None], str]]
COMMANDS: Commands = {
    "train": (_train, "train an encoder under sub-centroids, softmax or cosine"),
    "fit": (_fit, "turn a trained network into a classifier, without training"),
    "evaluate": (_evaluate, "measure a run again, on other data, or against unknown images"),
    "explain": (_explain, "name the training images behind a decision"),
    "bench": (_bench, "time and memory against a softmax head and a loop over classes"),
    "seg": (_seg, "the same for segmentation, in mmsegmentation"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)

    return run_main(lambda: _dispatch("dnc", COMMANDS, words))


def _dispatch(prog: str, commands: Commands, words: Sequence[str]) -> None:
    """Run the command that the first word names, or list them."""
    if not words or words[0] in HELP:
        print(f"usage: {prog} COMMAND [OPTIONS]\n\ncommands (each has --help):")
        for name, (_, what) in commands.items():
            print(f"  {name:<10} {what}")
        return
    if words[0] not in commands:
        raise InputError(
            "command", f"'{words[0]}'", "a known command", near_miss(words[0], commands)
        )
    commands[words[0]][0](words[1:])
