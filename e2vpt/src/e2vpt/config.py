"""Configuration of E²VPT's commands: frozen dataclasses, checked when built."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from e2vpt.optim import OptimizerName, Schedule
from shared_utils.errors import InputError

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Method = Literal[
    "e2vpt", "vpt-shallow", "vpt-deep", "linear", "bias", "partial", "full", "lora", "adaptformer"
]
BackboneTrains = Literal["none", "bias", "partial", "full"]
Adapter = Literal["none", "lora", "adaptformer"]
KVInit = Literal["kaiming", "trunc-normal", "patch"]
Rewind = Literal["init", "trained", "reinit"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run goes and what it runs on."""

    name: str = ""
    """folder name of the run (default: the recipe's name and the time)"""
    runs_dir: Path = Path("runs")
    """folder that holds the runs"""
    resume: str = ""
    """run folder to go on with"""
    overwrite: bool = False
    """empty an existing run folder of that name"""
    seed: int = 0
    """seed of every random choice"""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """what to run on"""
    devices: int = 1
    """devices per machine; started by torchrun, one process each"""
    num_nodes: int = 1
    """machines"""
    precision: Precision = "bf16-mixed"
    """32-true, bf16-mixed (autocast) or 16-mixed (autocast with loss scaling)"""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", self.seed, "0 to 4294967295", "correct it")
        for name in ("devices", "num_nodes"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "1 or more", "correct it")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen backbone and what is tuned on it."""

    method: Method = "e2vpt"
    """what is trained beside the head: e2vpt, vpt-shallow, vpt-deep (prompts), linear (nothing),
    bias, partial (last blocks), full, lora, adaptformer"""
    backbone: str = "micro_vit"
    """micro_vit (ships with the package), a timm name, or a .safetensors, .pth or .npz file"""
    architecture: str = ""
    """timm name of the architecture that a weight file belongs to"""
    num_visual_prompts: int = 10
    """visual prompts per layer (e2vpt, vpt-deep) or in the first layer (vpt-shallow)"""
    num_kv_prompts: int = 5
    """key-value prompts per layer and head (e2vpt)"""
    share_kv: bool = True
    """one tensor for keys and values; two with --model.no-share-kv"""
    kv_deep: bool = True
    """key-value prompts in every layer; in the first only with --model.no-kv-deep"""
    kv_init: KVInit = "kaiming"
    """kaiming (uniform, the released commands' choice), trunc-normal (std 0.02) or patch"""
    prompt_dropout: float = 0.1
    """dropout on visual prompts while training, a share of the values"""
    prompt_dim: int = 0
    """width of the visual prompts before a learned projection (0: no projection)"""
    pool_prompts: bool = False
    """average the last layer's prompts too when pooling, as the paper's code does for MAE"""
    token_form: bool = False
    """run deep prompts through the whole block as tokens: same output, slower; for comparison"""
    parity_head: bool = False
    """initialise the head as the paper's code does: Kaiming weight, bias -ln 99"""
    partial_blocks: int = 1
    """last blocks that train, with the final norm (partial)"""
    lora_rank: int = 8
    """rank of the updates of query and value projections (lora)"""
    lora_alpha: float = 8.0
    """the updates are scaled by lora_alpha / lora_rank (lora)"""
    adapter_dim: int = 8
    """width of the bottleneck beside each MLP (adaptformer)"""
    adapter_scale: float = 0.1
    """factor of what the bottleneck adds (adaptformer)"""

    def __post_init__(self) -> None:
        """Check counts and shares."""
        for name in ("partial_blocks", "lora_rank", "adapter_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}", getattr(self, name), "1 or more", "correct it")
        for name in ("lora_alpha", "adapter_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"model.{name}", getattr(self, name), "more than 0", "correct it")
        for name in ("num_visual_prompts", "num_kv_prompts", "prompt_dim"):
            if getattr(self, name) < 0:
                raise InputError(f"model.{name}", getattr(self, name), "0 or more", "correct it")
        if not 0 <= self.prompt_dropout < 1:
            raise InputError(
                "model.prompt_dropout", self.prompt_dropout, "0 <= p < 1", "correct it"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images: where they are, how they are split, and what is done to them."""

    source: str = "digits"
    """digits (ships with scikit-learn), an image folder, one with train.csv, or a packed .npz; a
    folder of VTAB-1k (train800.txt) or FGVC (train.json)"""
    num_train: int = 0
    """training images drawn from a source that is not split (0: what the other splits leave)"""
    num_val: int = 0
    """validation images drawn where there is no such split (0: a fifth of the training pool)"""
    train_on_val: bool = False
    """train on training and validation images together; no validation then"""
    img_size: int = 0
    """side of the square input in pixels (0: the backbone's own)"""
    resize: Literal["squash", "crop"] = "squash"
    """squash to the input size (VTAB), or short side to 256/224 of it, then crop (FGVC)"""
    augment: Literal["none", "flip", "crop", "crop-flip"] = "none"
    """training augmentation; crop draws its crop at random (needs resize crop), flip mirrors"""
    normalize: Literal["imagenet", "checkpoint", "none"] = "checkpoint"
    """pixel statistics: ImageNet's, those the backbone was trained with, or plain 0 to 1"""
    batch_size: int = 64
    """images per step and process"""
    num_workers: int = 0
    """loader processes; the order of samples does not depend on it"""
    skip_bad: bool = False
    """leave unreadable images out and count them, instead of stopping"""
    limit: int = 0
    """use at most this many images of each split (0: all), for quick runs"""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.batch_size < 1:
            raise InputError("data.batch_size", self.batch_size, "1 or more", "correct it")
        for name in ("num_train", "num_val", "img_size", "num_workers", "limit"):
            if getattr(self, name) < 0:
                raise InputError(f"data.{name}", getattr(self, name), "0 or more", "correct it")
        if self.augment.startswith("crop") and self.resize != "crop":
            raise InputError(
                "data.augment",
                f"{self.augment} with data.resize squash",
                "data.resize crop",
                "add --data.resize crop or use --data.augment flip",
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and schedule."""

    optimizer: OptimizerName = "adamw"
    """adamw, or sgd with momentum 0.9 (the paper's)"""
    lr: float = 0.05
    """peak learning rate, after scaling if scale_lr is on"""
    scale_lr: bool = False
    """multiply lr by batch size / 256, as the paper's base rates are meant"""
    weight_decay: float = 1e-4
    """decay of prompts, key-value prompts and the head's weight"""
    epochs: int = 100
    """passes over the training images"""
    warmup_epochs: float = 10
    """epochs of linear warm-up"""
    schedule: Schedule = "cosine"
    """cosine per step; per-epoch for parity with the paper's code; trapezoid"""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("lr", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"optim.{name}", getattr(self, name), "more than 0", "correct it")
        for name in ("weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"optim.{name}", getattr(self, name), "0 or more", "correct it")
        if self.warmup_epochs > self.epochs:
            raise InputError(
                "optim.warmup_epochs",
                self.warmup_epochs,
                f"at most optim.epochs ({self.epochs})",
                "lower it",
            )


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Start from a finished run whose visual prompts are pruned, instead of from new prompts."""

    source: str = ""
    """run folder of the trained prompts (empty: train new ones)"""
    num_tokens: int = 0
    """visual prompts to remove from every layer, those of lowest importance"""
    num_segments: int = 0
    """segments to remove from each prompt that stays, by the survivors' own importance"""
    of_segments: int = 8
    """segments a prompt is cut into"""
    rewind: Rewind = "init"
    """what survivors start from: init (their initial values), trained, or reinit (new random)"""
    per_layer: bool = False
    """score and prune each layer on its own; otherwise prompt k goes from all layers together"""
    interleaved: bool = False
    """dimension j belongs to segment j mod R, instead of consecutive parts"""
    random: bool = False
    """prune at random: the control"""
    compat: bool = False
    """as the released code: signed gradients, and zero instead of removed; for comparison"""

    def __post_init__(self) -> None:
        """Check counts."""
        for name in ("num_tokens", "num_segments"):
            count = getattr(self, name)
            if count < 0:
                raise InputError(f"prune.{name}", count, "0 or more", "correct it")
            if count and not self.source:
                raise InputError(
                    f"prune.{name}",
                    f"{count} without prune.source",
                    "the run whose prompts to prune",
                    "use e2vpt prune RUN, or name it with --prune.source",
                )
        if not self.num_segments < self.of_segments:
            raise InputError(
                "prune.num_segments",
                self.num_segments,
                f"less than prune.of_segments ({self.of_segments})",
                "lower it",
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`e2vpt train`: everything of one run."""

    recipe: tyro.conf.Suppress[str] = ""
    about: tyro.conf.Suppress[str] = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
