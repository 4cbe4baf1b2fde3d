"""The command `e2vpt`: parse, run, report. What each command does lives in its own module."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from e2vpt.interrupts import stoppable
from shared_utils.config import load_json, parse, parse_recipe
from shared_utils.errors import InputError, near_miss, run_main


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a trained run on one of its splits again, or on other data."""

    run: tyro.conf.Positional[Path]
    """run folder of `e2vpt train`"""
    split: Literal["test", "val", "train"] = "test"
    """which split"""
    which: Literal["last", "best"] = "last"
    """last epoch (what is deployed), or the epoch of the best validation accuracy"""
    source: str = ""
    """other data than the run's own, as --data.source"""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """what to run on"""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify images: predictions.csv and a picture sheet."""

    run: tyro.conf.Positional[Path]
    """run folder of `e2vpt train`, or one that e2vpt.save wrote"""
    images: tyro.conf.Positional[tuple[str, ...]]
    """image files, folders (searched below) and glob patterns"""
    output: Path = Path("predictions")
    """folder for predictions.csv and predictions.png"""
    batch_size: int = 64
    """images at a time"""
    skip_bad: bool = False
    """leave unreadable images out and name them, instead of stopping"""
    device: str = "cpu"
    """torch device, as cpu or cuda:0"""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.batch_size < 1:
            raise InputError("batch_size", self.batch_size, "1 or more", "correct it")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained run as ONNX, checked with onnxruntime."""

    run: tyro.conf.Positional[Path]
    """run folder of `e2vpt train`, or one that e2vpt.save wrote"""
    output: Path | None = None
    """the file (default: model.onnx in the run folder)"""
    fold: Literal["auto", "yes", "no"] = "auto"
    """turn visual prompts into key and value rows: wherever that is exact, always, or never"""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Say what a backbone with prompts would train, or what a run folder holds."""

    what: tyro.conf.Positional[str]
    """a backbone (micro_vit or a timm name; no weights are fetched), or a run folder"""
    num_classes: int = 100
    """outputs of the head"""
    num_visual_prompts: int = 10
    """visual prompts per layer"""
    num_kv_prompts: int = 5
    """key-value prompts per layer and head"""


def _train(argv: Sequence[str]) -> None:
    from e2vpt.recipes import RECIPES

    _, cfg = parse_recipe(
        RECIPES, argv, prog="e2vpt train", about="Tune prompts on a frozen backbone."
    )
    from e2vpt.train import train

    with stoppable():
        train(cfg)


def _search(argv: Sequence[str]) -> None:
    from e2vpt.recipes import SEARCH_RECIPES

    _, cfg = parse_recipe(
        SEARCH_RECIPES,
        argv,
        prog="e2vpt search",
        about="Choose rate, decay and pruning on validation images; test the choice.",
    )
    from e2vpt.search import search

    with stoppable():
        search(cfg)


def _prune(argv: Sequence[str]) -> None:
    from e2vpt.config import PruneConfig, TrainConfig
    from e2vpt.recipes import RECIPES

    prog, about = "e2vpt prune", "Prune a finished run's prompts and train what is left again."
    words = list(argv)
    if any(word.partition("=")[0] == "--resume" for word in words):
        _, cfg = parse_recipe(RECIPES, words, prog=prog, about=about)
    elif words and not words[0].startswith("-"):
        before = load_json(TrainConfig, Path(words[0]) / "config.json")
        start = replace(
            before,
            prune=PruneConfig(source=words[0]),
            run=replace(before.run, name="", resume="", overwrite=False),
        )
        cfg = parse(TrainConfig, words[1:], prog=f"{prog} RUN", default=start, about=about)
        if not cfg.prune.num_tokens and not cfg.prune.num_segments:
            raise InputError(
                "prune.num_tokens",
                "0, and no segments either",
                "something to remove",
                "give --prune.num-tokens or --prune.num-segments, or use e2vpt search",
            )
    else:
        if {"-h", "--help"} & set(words):
            about += f"\nDefaults are those of RUN. To go on: {prog} --resume RUN [OPTIONS]."
            start = next(iter(RECIPES.values()))
            parse(TrainConfig, ["--help"], prog=f"{prog} RUN", default=start, about=about)
        raise InputError("RUN", "nothing", "a finished run folder first", f"{prog} RUN [OPTIONS]")
    from e2vpt.train import train

    with stoppable():
        train(cfg)


def _pretrain(argv: Sequence[str]) -> None:
    from e2vpt.pretrain_config import PRETRAIN_RECIPES

    _, cfg = parse_recipe(
        PRETRAIN_RECIPES, argv, prog="e2vpt pretrain", about="Train the micro ViT from scratch."
    )
    from e2vpt.pretrain import pretrain

    with stoppable():
        pretrain(cfg)


def _evaluate(argv: Sequence[str]) -> None:
    cfg = parse(EvaluateConfig, argv, prog="e2vpt evaluate", about=EvaluateConfig.__doc__ or "")
    from e2vpt import model_io
    from e2vpt.config import TrainConfig
    from e2vpt.data import load_data
    from e2vpt.devices import launch_fabric
    from e2vpt.evaluate import evaluate
    from e2vpt.model import load_tuned_state
    from shared_utils import checkpoint

    trained = load_json(TrainConfig, cfg.run / "config.json")
    model = model_io.load(cfg.run)
    card = model_io.read_card(cfg.run)
    if cfg.which == "best":
        state = checkpoint.load(cfg.run / "best.ckpt")
        load_tuned_state(model, state["model"], str(cfg.run / "best.ckpt"))
    prep = card["preprocessing"]
    data = replace(trained.data, source=cfg.source or trained.data.source)
    splits = load_data(
        data, img_size=tuple(prep["img_size"]), mean=prep["mean"], std=prep["std"], seed=0
    )
    if splits.class_names != card["class_names"]:
        raise InputError(
            "source",
            f"classes {', '.join(splits.class_names[:5])}...",
            "those of the model",
            "evaluate on data with the same class names",
        )
    images = {"train": splits.train, "val": splits.val, "test": splits.test}[cfg.split]
    if images is None:
        raise InputError(
            "split", f"'{cfg.split}', which {data.source} does not have", "another split", "name it"
        )
    fabric = launch_fabric(
        replace(trained.run, accelerator=cfg.accelerator, devices=1, num_nodes=1)
    )
    model.to(fabric.device)
    for name, value in evaluate(fabric, model, images, data, splits.num_classes).items():
        print(f"{cfg.split}_{name} {value:.4f}")


def _predict(argv: Sequence[str]) -> None:
    cfg = parse(PredictConfig, argv, prog="e2vpt predict", about=PredictConfig.__doc__ or "")
    from e2vpt.predict import predict

    count, bad = predict(
        cfg.run,
        cfg.images,
        cfg.output,
        batch_size=cfg.batch_size,
        skip_bad=cfg.skip_bad,
        device=cfg.device,
    )
    for path in bad:
        print(f"left out, unreadable: {path}")
    print(f"{count} images: {cfg.output / 'predictions.csv'}, {cfg.output / 'predictions.png'}")


def _export(argv: Sequence[str]) -> None:
    cfg = parse(ExportConfig, argv, prog="e2vpt export", about=ExportConfig.__doc__ or "")
    from e2vpt.export import export_onnx

    output = cfg.output or cfg.run / "model.onnx"
    if output.is_dir():
        raise InputError("output", f"the folder '{output}'", "a file", f"try {output}/model.onnx")
    done = export_onnx(cfg.run, output, fold=cfg.fold)
    print(
        f"{output}: onnxruntime agrees with PyTorch to {done.difference:.1e} of the largest logit"
    )
    print(done.form)


def _info(argv: Sequence[str]) -> None:
    cfg = parse(InfoConfig, argv, prog="e2vpt info", about=InfoConfig.__doc__ or "")
    import torch

    from e2vpt import model_io
    from e2vpt.backbones import load_backbone
    from e2vpt.model import parameter_report, prompt

    if Path(cfg.what).is_dir():
        card = model_io.read_card(Path(cfg.what))
        title, report = f"{cfg.what}: {card['backbone']['name']}", card["parameters"]
        print(f"classes    {len(card['class_names'] or [])}")
        print("prompts    " + ", ".join(f"{k} {v}" for k, v in card["spec"].items()))
    else:
        with torch.device("meta"):
            backbone = load_backbone(cfg.what, pretrained=False)
        model = prompt(backbone.module, cfg.num_classes, cfg.num_visual_prompts, cfg.num_kv_prompts)
        g = model.geometry
        title, report = f"{backbone.architecture}: E²VPT can tune it", parameter_report(model)
        print(
            f"input      {backbone.img_size[0]}x{backbone.img_size[1]} pixels, patch {g.patch_size}"
        )
        widths = dict.fromkeys((layer.embed_dim, layer.num_heads) for layer in g.layers)
        told = " to ".join(f"width {width}, heads {heads}" for width, heads in widths)
        print(f"layers     {g.num_layers}, {told}")
    print(title)
    for part in ("visual", "kv", "adapters", "head", "backbone", "tuned", "total"):
        if part in report:  # cards of before there were adapters do not count them
            print(f"{part:<10} {report[part]:>12,}")
    print(f"{'percent':<10} {report['percent']:>12.4f}")


def _data(argv: Sequence[str]) -> None:
    from e2vpt.data_check import LISTS, CheckConfig, Report, check, header, require_complete

    action, *options = argv or ("--help",)
    if action in ("-h", "--help"):
        options = ["--help"]
    elif action != "check":
        raise InputError("data", f"'{action}'", "check", "try e2vpt data check --help")
    about = CheckConfig.__doc__ or ""
    cfg = parse(CheckConfig, options, prog="e2vpt data check", about=about)
    reports: list[Report] = []
    for report in check(cfg.suite, cfg.folder, deep=cfg.deep):
        if not reports:
            print(header(cfg.suite))
        reports.append(report)
        print(report.text(LISTS[cfg.suite]), flush=True)
    print(require_complete(cfg.suite, cfg.folder, reports))


def _bench(argv: Sequence[str]) -> None:
    from e2vpt.bench import BenchConfig, bench

    bench(parse(BenchConfig, argv, prog="e2vpt bench", about=BenchConfig.__doc__ or ""))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "tune prompts, or a baseline, on a frozen backbone"),
    "search": (_search, "choose rate, decay and pruning; compare methods"),
    "prune": (_prune, "prune a run's prompts and train what is left again"),
    "evaluate": (_evaluate, "measure a trained run again"),
    "predict": (_predict, "classify images: CSV and picture sheet"),
    "export": (_export, "write a trained run as ONNX"),
    "info": (_info, "count what would train on a backbone, or show a run"),
    "data": (_data, "check what is there of VTAB-1k or FGVC"),
    "pretrain": (_pretrain, "train the micro ViT from scratch"),
    "bench": (_bench, "time and memory against full fine-tuning and the plain backbone"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        if not words or words[0] in ("-h", "--help"):
            print("usage: e2vpt COMMAND [OPTIONS]\n\ncommands (each has --help):")
            for name, (_, what) in COMMANDS.items():
                print(f"  {name:<10} {what}")
            return
        if words[0] not in COMMANDS:
            raise InputError(
                "command", f"'{words[0]}'", "a known command", near_miss(words[0], COMMANDS)
            )
        COMMANDS[words[0]][0](words[1:])

    return run_main(body)
