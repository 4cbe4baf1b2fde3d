"""The commands `dnc seg ...`: parse and report. mmsegmentation is loaded when one runs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared_utils.config import parse
from shared_utils.errors import InputError

Words = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")]


@dataclass(frozen=True, kw_only=True)
class SegTrainConfig:
    """Train a segmentor under sub-centroids (or any config of mmsegmentation)."""

    config: tyro.conf.Positional[str] = ""
    """config file, such as dnc/configs/digitscenes_fcn.py; not needed with --resume"""
    cfg_options: Words = ()
    """settings of the config to change, as mmengine has it: train_cfg.max_iters=100"""
    data_root: str = ""
    """folder of the data, in place of the config's"""
    amp: bool = False
    """autocast: float16 with loss scaling on a GPU, bfloat16 on a CPU"""
    launcher: Literal["none", "pytorch", "slurm", "mpi"] = "none"
    """what started several processes; torchrun is noticed without it"""
    trusted: bool = False
    """open load_from even where it is more than tensors and plain data, which can run code"""
    name: str = ""
    """folder name of the run (default: the config's name and the time)"""
    runs_dir: Path = Path("runs")
    """folder that holds the runs"""
    resume: str = ""
    """run folder to go on with"""
    overwrite: bool = False
    """empty an existing run folder of that name"""
    seed: int = 0
    """seed of every random choice"""

    def __post_init__(self) -> None:
        """Check the seed's range, and that there is something to train."""
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", self.seed, "0 to 4294967295", "correct it")
        if not self.config and not self.resume:
            raise InputError("config", "nothing", "a config file", "name one, or give --resume RUN")


def _train(argv: Sequence[str]) -> None:
    asked = parse(SegTrainConfig, argv, prog="dnc seg train", about=SegTrainConfig.__doc__ or "")
    from dnc.mmseg.train import SegRun, train

    train(SegRun(**asdict(asked)))


@dataclass(frozen=True, kw_only=True)
class SegEvaluateConfig:
    """Measure a segmentor on its test set: mIoU, aAcc and mAcc as fractions."""

    model: tyro.conf.Positional[tuple[str, ...]]
    """run folder, or CONFIG CHECKPOINT"""
    cfg_options: Words = ()
    """settings of the config to change"""
    data_root: str = ""
    """folder of the data, in place of the config's"""
    trusted: bool = False
    """open a checkpoint that is more than tensors and plain data, which can run code"""


@dataclass(frozen=True, kw_only=True)
class SegPredictConfig:
    """Segment images: class numbers, an overlay of each, and the shares of the classes."""

    words: tyro.conf.Positional[tuple[str, ...]]
    """run folder, or CONFIG CHECKPOINT; then image files, folders (searched below) and patterns"""
    output: Path = Path("predictions")
    """folder to write NAME.png, NAME_overlay.png and predictions.json into"""
    cfg_options: Words = ()
    """settings of the config to change"""
    trusted: bool = False
    """open a checkpoint that is more than tensors and plain data, which can run code"""


@dataclass(frozen=True, kw_only=True)
class SegExplainConfig:
    """Name the training pixels that decide: a page and a JSON file."""

    words: tyro.conf.Positional[tuple[str, ...]]
    """run folder, or CONFIG CHECKPOINT; then image files, folders (searched below) and patterns"""
    pixel: tuple[int, int] | None = None
    """row and column of the pixel to explain (default: the largest regions of each image)"""
    regions: int = 6
    """how many regions of each image"""
    top: int = 5
    """classes to name, the predicted one included"""
    output: Path = Path("explanation.html")
    """the page to write; the JSON file gets its name"""
    cfg_options: Words = ()
    """settings of the config to change"""
    data_root: str = ""
    """folder of the data, in place of the config's"""
    trusted: bool = False
    """open a checkpoint that is more than tensors and plain data, which can run code"""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("regions", 1), ("top", 2)):
            if getattr(self, name) < least:
                raise InputError(name, getattr(self, name), f"{least} or more", "correct it")


@dataclass(frozen=True, kw_only=True)
class SegFitConfig:
    """Turn a trained softmax segmentor into one with sub-centroids: one pass, no training."""

    config: tyro.conf.Positional[Path]
    """config of the softmax segmentor, or one with sub-centroids for the same network"""
    checkpoint: tyro.conf.Positional[Path]
    """its checkpoint"""
    num_centroids: int | None = None
    """sub-centroids per class (default: the config's, or 50 where it is of a softmax segmentor)"""
    cfg_options: Words = ()
    """settings of the config to change"""
    data_root: str = ""
    """folder of the data, in place of the config's"""
    trusted: bool = False
    """open a checkpoint that is more than tensors and plain data, which can run code"""
    name: str = ""
    """folder name of the run (default: fit, the config's name and the time)"""
    runs_dir: Path = Path("runs")
    """folder that holds the runs"""
    overwrite: bool = False
    """empty an existing run folder of that name"""
    seed: int = 0
    """seed of the pixels that are drawn"""


def _evaluate(argv: Sequence[str]) -> None:
    asked = parse(
        SegEvaluateConfig, argv, prog="dnc seg evaluate", about=SegEvaluateConfig.__doc__ or ""
    )
    from dnc.mmseg.predict import evaluate

    for name, value in evaluate(
        asked.model, asked.cfg_options, asked.data_root, trusted=asked.trusted
    ).items():
        print(f"{name} {value:.4f}")


def _predict(argv: Sequence[str]) -> None:
    asked = parse(
        SegPredictConfig, argv, prog="dnc seg predict", about=SegPredictConfig.__doc__ or ""
    )
    from dnc.mmseg.predict import predict

    for path in predict(asked.words, asked.output, asked.cfg_options, trusted=asked.trusted):
        print(path)


def _explain(argv: Sequence[str]) -> None:
    asked = parse(
        SegExplainConfig, argv, prog="dnc seg explain", about=SegExplainConfig.__doc__ or ""
    )
    from dnc.mmseg.explain import explain

    count = explain(
        asked.words,
        asked.output,
        pixel=asked.pixel,
        regions=asked.regions,
        top=asked.top,
        overrides=asked.cfg_options,
        data_root=asked.data_root,
        trusted=asked.trusted,
    )
    print(f"{count} decisions: {asked.output}, {asked.output.with_suffix('.json')}")


def _fit(argv: Sequence[str]) -> None:
    asked = parse(SegFitConfig, argv, prog="dnc seg fit", about=SegFitConfig.__doc__ or "")
    from dnc.mmseg.fit import fit

    fit(
        asked.config,
        asked.checkpoint,
        num_centroids=asked.num_centroids,
        overrides=asked.cfg_options,
        data_root=asked.data_root,
        trusted=asked.trusted,
        name=asked.name,
        runs_dir=asked.runs_dir,
        overwrite=asked.overwrite,
        seed=asked.seed,
    )


SEG_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "train a segmentor: CONFIG first"),
    "evaluate": (_evaluate, "measure a segmentor on its test set"),
    "predict": (_predict, "segment images, with overlays"),
    "explain": (_explain, "name the training pixels behind a segmentation"),
    "fit": (_fit, "turn a softmax segmentor into one with sub-centroids, without training"),
}
