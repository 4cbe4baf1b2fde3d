"""Configuration of `e2vpt pretrain`: frozen dataclasses, checked when built."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from e2vpt.config import RunConfig
from e2vpt.optim import PretrainOptimizer, Schedule
from shared_utils.errors import InputError

HEAD_DIM = 64


def _at_least(least: float, field: str, value: float) -> None:
    if not least <= value < math.inf:
        raise InputError(field, value, f"{least} or more", "correct it")


def _share(field: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(field, value, "0 to 1", "correct it")


@dataclass(frozen=True, kw_only=True)
class PretrainModel:
    """The micro ViT's size."""

    embed_dim: int = 192
    """width; 64 per head"""
    depth: int = 6
    """number of transformer blocks"""
    compile: bool = False
    """torch.compile the training step (needs a C++ compiler on a CPU)"""

    def __post_init__(self) -> None:
        """Check sizes."""
        if self.embed_dim < HEAD_DIM or self.embed_dim % HEAD_DIM:
            raise InputError(
                "model.embed_dim", self.embed_dim, f"a multiple of {HEAD_DIM}", "correct it"
            )
        _at_least(1, "model.depth", self.depth)


@dataclass(frozen=True, kw_only=True)
class PretrainData:
    """Where the images are, and how they are varied."""

    train: Path = Path("train.npz")
    """packed training images, 32x32"""
    val: Path = Path("val.npz")
    """packed validation images, 32x32"""
    batch_size: int = 128
    """images per step and process"""
    limit: int = 0
    """use only this many images of each set, evenly spread over it (0: all), for quick runs"""
    mix_prob: float = 0.3
    """share of the steps that use CutMix (box area from a uniform distribution)"""

    def __post_init__(self) -> None:
        """Check ranges."""
        _at_least(1, "data.batch_size", self.batch_size)
        _at_least(0, "data.limit", self.limit)
        _share("data.mix_prob", self.mix_prob)


@dataclass(frozen=True, kw_only=True)
class PretrainOptim:
    """Optimiser, schedule per step, and what goes with them."""

    optimizer: PretrainOptimizer = "adamw"
    """adamw, or muon for matrices and convolutions with NAdamW for the rest"""
    lr: float = 1.5e-3
    """peak learning rate"""
    weight_decay: float = 0.05
    """decoupled decay of weights, none on biases and norms"""
    epochs: int = 30
    """passes over the training images"""
    warmup_epochs: float = 1.0
    """epochs of linear warm-up"""
    schedule: Schedule = "cosine"
    """cosine, trapezoid (flat, then linear to 0) or per-epoch"""
    label_smoothing: float = 0.1
    """mass given to the other classes"""
    clip_norm: float = 1.0
    """largest gradient norm"""
    ema_decay: float = 0.999
    """decay of the averaged weights that are evaluated and shipped"""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("lr", "epochs", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"optim.{name}", getattr(self, name), "more than 0", "correct it")
        _at_least(0, "optim.weight_decay", self.weight_decay)
        for name in ("label_smoothing", "ema_decay"):
            _share(f"optim.{name}", getattr(self, name))
        if not 0 <= self.warmup_epochs <= self.epochs:
            expected = f"0 to optim.epochs ({self.epochs})"
            raise InputError("optim.warmup_epochs", self.warmup_epochs, expected, "correct it")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """`e2vpt pretrain`: train the micro ViT from scratch."""

    recipe: tyro.conf.Suppress[str] = "tiny-imagenet-32"
    about: tyro.conf.Suppress[str] = (
        "micro ViT on Tiny-ImageNet-200 at 32x32; about 10 minutes an epoch on one core with AMX"
    )
    model: PretrainModel = field(default_factory=PretrainModel)
    data: PretrainData = field(default_factory=PretrainData)
    optim: PretrainOptim = field(default_factory=PretrainOptim)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(precision="bf16-mixed")
    )


# What the shipped weights were made with: validation top-1 0.373.
PRETRAIN_RECIPES = {
    "tiny-imagenet-32": PretrainConfig(
        optim=PretrainOptim(
            optimizer="muon", lr=3e-3, schedule="trapezoid", warmup_epochs=0.5, epochs=16
        )
    )
}
