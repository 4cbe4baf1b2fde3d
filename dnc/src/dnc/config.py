"""What a run of `dnc train` is made of: frozen dataclasses, their help texts under the fields."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from shared_utils.errors import InputError

Head = Literal["dnc", "softmax", "cosine"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def _check(
    group: str, config: Any, ranges: Mapping[str, tuple[float, float]], *positive: str
) -> None:
    """Values within closed ranges; those named in `positive` are more than the lower end."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if not least <= value <= most or (name in positive and value == least):
            at_least = f"more than {least:g}" if name in positive else f"{least:g} or more"
            expected = at_least if most == math.inf else f"{at_least} and at most {most:g}"
            raise InputError(f"{group}.{name}", value, expected, "correct it")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder, and what classifies its features."""

    encoder: str = "resnet18"
    """a timm name, or torchvision/NAME (resnet50, swin_t, mobilenet_v2, ...)"""
    pretrained: bool = False
    """start from the published weights (fetched once from their hub)"""
    stem: Literal["auto", "cifar", "imagenet"] = "auto"
    """first layers of a ResNet: 3x3 without pooling (cifar) or 7x7; auto: cifar below 64 pixels"""
    embed_norm: bool = False
    """a LayerNorm on the features, as in the released code; its weights belong to the encoder"""
    head: Head = "dnc"
    """dnc, or to compare: softmax (a linear layer), cosine (learned unit vectors)"""
    num_centroids: int = 4
    """sub-centroids per class"""
    momentum: float = 0.999
    """share of a sub-centroid's old position in an update"""
    warm_start: bool = True
    """a sub-centroid is the mean of its first updates before `momentum` holds"""
    temperature: float = 0.1
    """cosines are divided by it"""
    memory: Literal["queue", "batch", "bank"] = "queue"
    """what is clustered with a batch: each class's last features, nothing, or whole batches"""
    memory_size: int = 64
    """features per class of a queue, or batches of a bank"""
    epsilon: float = 0.05
    """weight of the entropy in the balanced assignment"""
    num_iters: int = 3
    """rounds of the balanced assignment"""
    assignment: Literal["sinkhorn", "gumbel"] = "sinkhorn"
    """sinkhorn, or the ancestors' random draw, under which sub-centroids collapse"""
    reseed_after: int = 100
    """updates without a sample after which a sub-centroid is put elsewhere (0: never)"""
    correct_only_after: int = -1
    """update from which only correctly classified samples count (-1: never)"""
    logit_norm: Literal["none", "standard", "affine"] = "none"
    """normalise cosines over classes instead of the temperature; affine is the released code's"""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, splits and augmentation."""

    source: str = "digits"
    """digits, cifar10 or cifar100 (torchvision's files below data.root), a folder of images or an
    .npz file"""
    root: Path = Path("data")
    """folder of torchvision's CIFAR files"""
    num_train: int = 0
    """training images drawn from a source that is not split (0: what the other splits leave)"""
    num_val: int = 0
    """validation images drawn where there is no such split (0: a tenth of the training pool)"""
    num_test: int = 0
    """test images drawn where there is no such split (0: what training and validation leave)"""
    groups: Path | None = None
    """train on groups of classes, then look for the classes within them: a JSON file
    {class: group}, or cifar100, its 20 super-classes"""
    img_size: int = 32
    """side of the square that the encoder sees, in pixels"""
    resize: int = 0
    """shorter side before the centre is cut out, in pixels (0: img_size)"""
    crop: Literal["none", "pad", "resized"] = "none"
    """training crops: none, from an image padded by an eighth, or of random size and shape"""
    flip: bool = False
    """mirror training images at random"""
    randaugment: bool = False
    """RandAugment, two operations of magnitude 9"""
    erasing: float = 0.0
    """share of training images with an erased rectangle"""
    mixup: float = 0.0
    """alpha of mixup (0: none)"""
    cutmix: float = 0.0
    """alpha of CutMix (0: none); with mixup too each batch gets either"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """of the pixels, each 0 to 1, subtracted"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """of the pixels, divided by"""
    batch_size: int = 128
    """images per step and process"""
    num_workers: int = 0
    """loader processes"""
    limit: int = 0
    """use at most so many images of each split (0: all), for quick tries"""
    skip_bad: bool = False
    """leave unreadable images out and count them, instead of stopping"""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("num_train", "num_val", "num_test", "resize", "num_workers", "limit")
        ranges: dict[str, tuple[float, float]] = dict.fromkeys(counts, (0, math.inf))
        ranges |= {"img_size": (8, math.inf), "batch_size": (1, math.inf), "erasing": (0, 1)}
        ranges |= {"mixup": (0, math.inf), "cutmix": (0, math.inf)}
        _check("data", self, ranges)
        if 0 < self.resize < self.img_size:
            raise InputError(
                "data.resize", self.resize, f"at least data.img_size ({self.img_size})", "raise it"
            )
        if min(self.std) <= 0:
            raise InputError("data.std", self.std, "more than 0 in each channel", "correct it")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and schedule."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum 0.9, or adamw"""
    lr: float = 0.1
    """peak learning rate"""
    weight_decay: float = 1e-4
    """decay of weights"""
    decay_norms: bool = True
    """decay norms, biases and position tables too"""
    nesterov: bool = False
    """Nesterov momentum, for sgd"""
    epochs: int = 100
    """passes over the training images"""
    warmup_epochs: float = 0
    """epochs of linear warm-up"""
    schedule: Literal["cosine", "step", "exponential"] = "cosine"
    """cosine per step to final_lr; factor `gamma` at `milestones`, or in every epoch"""
    milestones: tuple[int, ...] = ()
    """epochs at which the rate falls (step)"""
    gamma: float = 0.1
    """what the rate is multiplied by (step, exponential)"""
    final_lr: float = 0.0
    """share of the peak that a cosine ends at"""
    label_smoothing: float = 0.0
    """share of each label that goes to all classes"""
    clip_grad: float = 0.0
    """largest norm of the gradient (0: any)"""
    ema_decay: float = 0.0
    """decay of the averaged weights, which are then evaluated and saved (0: none)"""

    def __post_init__(self) -> None:
        """Check ranges."""
        ranges: dict[str, tuple[float, float]] = dict.fromkeys(("lr", "epochs"), (0, math.inf))
        ranges |= dict.fromkeys(("weight_decay", "warmup_epochs", "clip_grad"), (0, math.inf))
        ranges |= dict.fromkeys(("gamma", "final_lr", "label_smoothing"), (0, 1))
        ranges |= {"ema_decay": (0, 0.99999)}
        _check("optim", self, ranges, "lr", "epochs", "gamma")
        if self.warmup_epochs > self.epochs:
            raise InputError(
                "optim.warmup_epochs",
                self.warmup_epochs,
                f"at most optim.epochs ({self.epochs})",
                "lower it",
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise InputError(
                "optim.milestones", self.milestones, "rising epochs, each once", "sort them"
            )


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """Sub-centroids that are real training images, which explanations need (head dnc)."""

    epochs: int = 0
    """last epochs that train with anchored sub-centroids; 0: they are anchored after the last"""
    skip: bool = False
    """leave sub-centroids where they are: nothing can be explained then"""

    def __post_init__(self) -> None:
        """Check the range."""
        _check("anchor", self, {"epochs": (0, math.inf)})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where it goes and what it runs on."""

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
    precision: Precision = "32-true"
    """32-true, bf16-mixed (autocast) or 16-mixed (autocast with loss scaling)"""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("devices", "num_nodes"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "1 or more", "correct it")
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", self.seed, "0 to 4294967295", "correct it")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`dnc train`: everything of one run."""

    recipe: tyro.conf.Suppress[str] = ""
    about: tyro.conf.Suppress[str] = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
