"""What a run of `dnc fit` is made of: a training recipe's data and encoder, no training.

The groups are those of a training run, so that what reads one reads both; options that nothing
reads where nothing is trained cannot be given and keep their defaults.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

from dnc.config import (
    AnchorConfig,
    DataConfig,
    Head,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

T = TypeVar("T")
Unused = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]


@dataclass(frozen=True, kw_only=True)
class FitModelConfig(ModelConfig):
    """The encoder, and how many sub-centroids a class gets of its features."""

    pretrained: Unused[bool] = False
    head: Unused[Head] = "dnc"
    momentum: Unused[float] = 0.999
    warm_start: Unused[bool] = True
    memory: Unused[Literal["queue", "batch", "bank"]] = "queue"
    memory_size: Unused[int] = 64
    epsilon: Unused[float] = 0.05
    num_iters: Unused[int] = 3
    assignment: Unused[Literal["sinkhorn", "gumbel"]] = "sinkhorn"
    reseed_after: Unused[int] = 100
    correct_only_after: Unused[int] = -1
    logit_norm: Unused[Literal["none", "standard", "affine"]] = "none"


@dataclass(frozen=True, kw_only=True)
class FitDataConfig(DataConfig):
    """Images and splits."""

    crop: Unused[Literal["none", "pad", "resized"]] = "none"
    flip: Unused[bool] = False
    randaugment: Unused[bool] = False
    erasing: Unused[float] = 0.0
    mixup: Unused[float] = 0.0
    cutmix: Unused[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class FitAnchorConfig(AnchorConfig):
    """Sub-centroids that are real training images, which explanations need."""

    epochs: Unused[int] = 0


@dataclass(frozen=True, kw_only=True)
class FitRunConfig(RunConfig):
    """Where it goes and what it runs on."""

    resume: Unused[str] = ""
    devices: Unused[int] = 1
    num_nodes: Unused[int] = 1


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Where the network comes from."""

    run: str = ""
    """run folder of `dnc train`, of any head, whose encoder is taken (empty: model.encoder with its
    published weights)"""


@dataclass(frozen=True, kw_only=True)
class FitConfig(TrainConfig):
    """`dnc fit`: data, encoder and sub-centroids."""

    model: FitModelConfig = field(default_factory=FitModelConfig)
    data: FitDataConfig = field(default_factory=FitDataConfig)
    optim: Unused[OptimConfig] = field(default_factory=OptimConfig)
    anchor: FitAnchorConfig = field(default_factory=FitAnchorConfig)
    run: Annotated[FitRunConfig, tyro.conf.arg(name="")] = field(default_factory=FitRunConfig)
    fit: FitOptions = field(default_factory=FitOptions)

    @classmethod
    def of(cls, recipe: TrainConfig) -> "FitConfig":
        """A training recipe's data and encoder."""
        data, encoder = recipe.data, recipe.model.encoder
        about = f"{data.source} at {data.img_size} pixels, {encoder}"
        if data.groups is not None:
            about += f", groups of {data.groups}"
        return cls(
            recipe=recipe.recipe,
            about=about,
            model=_common(FitModelConfig, recipe.model),
            data=_common(FitDataConfig, data),
            run=_common(FitRunConfig, recipe.run),
        )


def _common(cls: type[T], given: Any) -> T:
    """The values that are not fixed in `cls`; the others stay at its defaults."""
    hints = get_type_hints(cls, include_extras=True)
    free = [name for name, hint in hints.items() if tyro.conf.Fixed not in _extras(hint)]
    return cls(**{name: getattr(given, name) for name in free})


def _extras(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())
