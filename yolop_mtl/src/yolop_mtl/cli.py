"""The command `yolop-mtl`: parse, run, report. What each command does lives in its own module."""

import sys
from collections.abc import Callable, Mapping, Sequence

from shared_utils.config import parse, parse_recipe
from shared_utils.errors import InputError, near_miss, run_main

HELP = ("-h", "--help")


def _train(argv: Sequence[str]) -> None:
    from yolop_mtl.recipes import RECIPES

    _, cfg = parse_recipe(
        RECIPES,
        argv,
        prog="yolop-mtl train",
        about="Train boxes, drivable area and lanes, or some of them, in one network.",
    )
    from yolop_mtl.train import train

    train(cfg)


def _val(argv: Sequence[str]) -> None:
    from yolop_mtl.val import ValConfig, val

    val(parse(ValConfig, argv, prog="yolop-mtl val", about=ValConfig.__doc__ or ""))


def _predict(argv: Sequence[str]) -> None:
    from yolop_mtl.predict import PredictConfig, predict

    about = PredictConfig.__doc__ or ""
    predict(parse(PredictConfig, argv, prog="yolop-mtl predict", about=about))


def _synth(argv: Sequence[str]) -> None:
    from yolop_mtl.synth import SynthConfig, generate

    generate(parse(SynthConfig, argv, prog="yolop-mtl synth", about=SynthConfig.__doc__ or ""))


def _prepare(argv: Sequence[str]) -> None:
    from yolop_mtl.prepare import PrepareConfig, prepare

    about = PrepareConfig.__doc__ or ""
    prepare(parse(PrepareConfig, argv, prog="yolop-mtl prepare", about=about))


def _anchors(argv: Sequence[str]) -> None:
    from yolop_mtl.anchors_command import AnchorsConfig, run_anchors

    about = AnchorsConfig.__doc__ or ""
    run_anchors(parse(AnchorsConfig, argv, prog="yolop-mtl anchors", about=about))


def _ablate(argv: Sequence[str]) -> None:
    from yolop_mtl.ablate import AblateConfig, ablate

    ablate(parse(AblateConfig, argv, prog="yolop-mtl ablate", about=AblateConfig.__doc__ or ""))


def _benchmark(argv: Sequence[str]) -> None:
    from yolop_mtl.benchmark import BenchmarkConfig, benchmark

    about = BenchmarkConfig.__doc__ or ""
    benchmark(parse(BenchmarkConfig, argv, prog="yolop-mtl benchmark", about=about))


def _export(argv: Sequence[str]) -> None:
    from yolop_mtl.export import ExportConfig, export

    about = ExportConfig.__doc__ or ""
    for written in export(parse(ExportConfig, argv, prog="yolop-mtl export", about=about)):
        print(written)


def _import_weights(argv: Sequence[str]) -> None:
    from yolop_mtl.import_weights import ImportConfig, import_weights

    about = ImportConfig.__doc__ or ""
    print(import_weights(parse(ImportConfig, argv, prog="yolop-mtl import-weights", about=about)))


COMMANDS: Mapping[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "train the network on one to three tasks"),
    "val": (_val, "measure a network: strict and legacy figures, conditions, curves, speed"),
    "predict": (_predict, "draw what is found into images, a video or what a camera sees"),
    "export": (_export, "write the network for other programs, checked against it"),
    "import-weights": (_import_weights, "take the released network, or weights of other files"),
    "benchmark": (_benchmark, "time the network and what is around it on this machine"),
    "ablate": (_ablate, "train the paper's ablation over seeds, with a table"),
    "synth": (_synth, "generate driving scenes in BDD100K's form"),
    "prepare": (_prepare, "check labels, convert them, draw lane masks from polygons"),
    "anchors": (_anchors, "fit anchors to the boxes of a data set"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: _dispatch(words))


def _dispatch(words: Sequence[str]) -> None:
    """Run the command that the first word names, or list them."""
    if not words or words[0] in HELP:
        print("usage: yolop-mtl COMMAND [OPTIONS]\n\ncommands (each has --help):")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:<14} {what}")
        return
    if words[0] not in COMMANDS:
        do = near_miss(words[0], COMMANDS)
        raise InputError("command", f"'{words[0]}'", "a known command", do)
    COMMANDS[words[0]][0](words[1:])
