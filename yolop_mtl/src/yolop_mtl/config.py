"""What a run is made of: frozen dataclasses, their help texts under the fields."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from shared_utils.errors import InputError
from yolop_mtl.augment_config import AugmentConfig
from yolop_mtl.heads import Upsample
from yolop_mtl.losses import Assign, Reduce
from yolop_mtl.masks import AreaClasses, MaskFormat, check_format
from yolop_mtl.model import MAX_STRIDE, TASKS, Task, check_tasks

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Part = Literal["backbone", "neck", "detection", "drivable", "lane"]
NUM_SIDES = 18  # of three anchors at each of three scales
Ranges = Mapping[str, tuple[float, float]]


def check_ranges(group: str, config: Any, ranges: Ranges, *positive: str) -> None:
    """Values within closed ranges; those named in `positive` are more than the lower end."""
    prefix = f"{group}." if group else ""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        is_out = not least <= value <= most or not math.isfinite(value)
        if is_out or (name in positive and value == least):
            at_least = f"more than {least:g}" if name in positive else f"{least:g} or more"
            expected = at_least if most == math.inf else f"{at_least} and at most {most:g}"
            raise InputError(f"{prefix}{name}", value, expected, "correct it")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    preset: Literal["release", "base", "small", "nano"] = "base"
    """release (as published, 80 classes), base (the same with the data's classes), small, nano"""
    tasks: tuple[Task, ...] = TASKS
    """what to train; what only the other tasks need is not built"""
    use_repconv: bool = False
    """train the box head's 3x3 convolutions with a 1x1 beside, folded afterwards"""
    use_attention: bool = True
    """channel attention in the lane head, which the released network has"""
    lane_upsample: Upsample = "deconv"
    """how the lane head doubles sizes: deconv, or nearest (neighbours and a 3x3 convolution)"""
    anchors: Literal["coco", "auto", "explicit"] = "coco"
    """boxes to start from: the released network's (coco), fitted to the training boxes (auto), or
    those of anchor_sizes (explicit)"""
    anchor_sizes: tuple[float, ...] = ()
    """width and height of nine anchors in pixels of the network's input, small to large"""
    weights: str = ""
    """file of weights to start from, .pt or .safetensors: what fits by name and shape, or by order
    and shape the trunk of a YOLOv7-like network"""

    def __post_init__(self) -> None:
        """Check tasks and anchors."""
        check_tasks(self.tasks)
        if (self.anchors == "explicit") != bool(self.anchor_sizes):
            got = f"{len(self.anchor_sizes)} numbers with model.anchors {self.anchors}"
            do = "give both --model.anchors explicit and --model.anchor-sizes, or neither"
            raise InputError("model.anchor_sizes", got, "some with explicit alone", do)
        if self.anchor_sizes:
            if len(self.anchor_sizes) != NUM_SIDES:
                do = "give width and height of three anchors at each of three scales"
                raise InputError("model.anchor_sizes", len(self.anchor_sizes), "18 numbers", do)
            if not all(0 < side < math.inf for side in self.anchor_sizes):
                expected = "sides of more than 0 pixels"
                raise InputError("model.anchor_sizes", self.anchor_sizes, expected, "correct them")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and labels, and how they are read."""

    source: Literal["bdd100k", "coco", "synthetic"] = "bdd100k"
    """form of the labels: BDD100K's (or YOLOP's downloads), COCO JSON with mask files, or scenes
    that are generated in data.root where it is not there yet"""
    root: Path = Path("data/bdd100k")
    """folder that holds images/ and the labels"""
    train_split: str = "train"
    """name of the training images' folder"""
    val_split: str = "val"
    """name of the validation images' folder"""
    img_size: tuple[int, int] = (384, 640)
    """height and width of the network's input in pixels, multiples of 32"""
    classes: Literal["vehicle", "all"] = "vehicle"
    """of boxes: car, bus, truck, train (in COCO data also vehicle) as one, or all of the data's"""
    drivable_format: MaskFormat = "binary"
    """form of the drivable masks: binary (YOLOP's), value (official), color, index"""
    lane_format: MaskFormat = "binary"
    """form of the lane masks: binary (YOLOP's), bits (official), index"""
    area_classes: AreaClasses = "merged"
    """the alternative area: merged with the direct one, direct_only (background), or a third class
    (three)"""
    num_scenes: tuple[int, int] = (400, 64)
    """scenes to generate for training and validation (source synthetic)"""
    scene_size: tuple[int, int] = (720, 1280)
    """height and width of generated scenes in pixels (source synthetic)"""
    batch_size: int = 32
    """images per pass through the network and process"""
    num_workers: int = 4
    """loader processes of each process (0: load in between)"""
    limit: int = 0
    """use at most so many images of each split (0: all), for quick tries"""

    def __post_init__(self) -> None:
        """Check sizes and forms."""
        counts = {"batch_size": (1, math.inf), "num_workers": (0, math.inf), "limit": (0, math.inf)}
        check_ranges("data", self, counts)
        if min(self.num_scenes) < 1:
            do = "name two counts"
            raise InputError("data.num_scenes", self.num_scenes, "1 or more of each split", do)
        if min(self.scene_size) < MAX_STRIDE:
            expected = f"sides of {MAX_STRIDE} pixels or more"
            raise InputError("data.scene_size", self.scene_size, expected, "correct it")
        if any(side < MAX_STRIDE or side % MAX_STRIDE for side in self.img_size):
            expected = f"a height and a width that are multiples of {MAX_STRIDE}"
            raise InputError("data.img_size", self.img_size, expected, "correct it")
        check_format("drivable", self.drivable_format)
        check_format("lane", self.lane_format)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Assignment of boxes, losses and what each counts."""

    assign: Assign = "ota"
    """which predictions answer for a box: ota (the cheapest), or plain (all whose anchor fits)"""
    focal_gamma: float = 0.0
    """focal exponent of objectness and class (0: plain cross entropy)"""
    lane_alpha: float = 0.25
    """weight of lane pixels in the focal term; the others have 1 minus it"""
    lane_gamma: float = 2.0
    """exponent of the lane's focal term"""
    lane_fp: float = 0.5
    """weight of false positives in the Dice term; with other than 0.5 it is Tversky's"""
    lane_fn: float = 0.5
    """weight of false negatives in the Dice term"""
    lane_exponent: float = 1.0
    """the Dice term is raised to it"""
    lane_reduce: Reduce = "image"
    """overlap of lanes image by image, or of the batch as one"""
    box: float = 0.05
    """gain of the boxes' overlap"""
    obj: float = 0.7
    """gain of objectness, for a longer side of 640 pixels; it grows with the side's square"""
    cls: float = 0.3
    """gain of the class, for 80 classes; it grows with their number"""
    drivable: float = 0.2
    """gain of the drivable area's cross entropy"""
    lane_focal: float = 1.0
    """gain of the lane's focal term"""
    lane_dice: float = 0.2
    """gain of the lane's Dice term"""
    lane_iou: float = 0.2
    """gain of the lane's IoU term"""
    is_learned: bool = False
    """learn one more weight per task, on top of the gains"""

    def __post_init__(self) -> None:
        """Check ranges."""
        free = ("focal_gamma", "lane_gamma", "lane_fp", "lane_fn", "lane_exponent", *GAINS)
        ranges: dict[str, tuple[float, float]] = dict.fromkeys(free, (0, math.inf))
        check_ranges("loss", self, ranges | {"lane_alpha": (0, 1)}, "lane_exponent")

    @property
    def gains(self) -> dict[str, float]:
        """The gain of each term, by the term's name."""
        return {f"loss_{name}": getattr(self, name) for name in GAINS}


GAINS = ("box", "obj", "cls", "drivable", "lane_focal", "lane_dice", "lane_iou")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, schedule and averaging."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with Nesterov momentum, of the loss summed over the images of a step as YOLOv7 has it; or
    adamw, of its mean"""
    lr: float = 0.01
    """peak learning rate"""
    final_lr: float = 0.1
    """share of the peak that the cosine ends at"""
    momentum: float = 0.937
    """of sgd; the first beta of adamw"""
    weight_decay: float = 0.0005
    """decay of weights, not of norms, biases and implicit vectors; of a step of 64 images, and in
    proportion to its images otherwise"""
    epochs: int = 300
    """passes over the training images"""
    accumulate: int = 0
    """batches per step (0: so many that a step has 64 images over all processes)"""
    warmup_epochs: float = 3.0
    """epochs of linear warm-up"""
    warmup_steps: int = 1000
    """least steps of warm-up, though no more than a third of all"""
    warmup_momentum: float = 0.8
    """momentum that warm-up starts with"""
    warmup_bias_lr: float = 0.1
    """learning rate of biases that warm-up starts with (sgd)"""
    clip_grad: float = 0.0
    """largest norm of the gradient (0: any)"""
    ema_decay: float = 0.9999
    """decay of the averaged weights, reached over 2000 steps; they are evaluated and saved (0: the
    weights as they are)"""
    freeze: tuple[Part, ...] = ()
    """parts that stay as they are, the statistics of their norms too"""
    patience: int = 0
    """validations without a better fitness after which training ends (0: never)"""

    def __post_init__(self) -> None:
        """Check ranges."""
        free = ("lr", "epochs", "weight_decay", "accumulate", "warmup_epochs", "warmup_steps")
        more = ("warmup_bias_lr", "clip_grad", "patience")
        ranges: dict[str, tuple[float, float]] = dict.fromkeys((*free, *more), (0, math.inf))
        ranges |= {"final_lr": (0, 1), "ema_decay": (0, 0.999999)}
        ranges |= {"momentum": (0, 0.9999), "warmup_momentum": (0, 0.9999)}
        check_ranges("optim", self, ranges, "lr", "epochs", "momentum")
        if self.warmup_epochs > self.epochs:
            expected = f"at most optim.epochs ({self.epochs})"
            raise InputError("optim.warmup_epochs", self.warmup_epochs, expected, "lower it")


@dataclass(frozen=True, kw_only=True)
class FitnessConfig:
    """What makes a network the best: a mean of figures, 0 to 1, over those that there are."""

    mAP50_95: float = 0.4
    """weight of the boxes' average precision"""
    drivable_mIoU: float = 0.3
    """weight of the drivable area's mean IoU"""
    lane_f1: float = 0.3
    """weight of the lanes' F1"""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges("fitness", self, dict.fromkeys(self.weights, (0, math.inf)))
        if not sum(self.weights.values()):
            raise InputError("fitness", "weights of 0", "one of more than 0", "raise one")

    @property
    def weights(self) -> dict[str, float]:
        """By the figure's name."""
        return {name: getattr(self, name) for name in ("mAP50_95", "drivable_mIoU", "lane_f1")}


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
    val_every: int = 1
    """epochs from one validation to the next; the last epoch is always validated"""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """what to run on"""
    devices: int = 1
    """devices per machine; started by torchrun, one process each"""
    num_nodes: int = 1
    """machines"""
    precision: Precision = "32-true"
    """32-true, bf16-mixed (autocast) or 16-mixed (autocast with loss scaling)"""
    channels_last: bool = True
    """keep the channels of a pixel side by side in memory, which convolutions are faster with"""
    sync_batchnorm: bool = False
    """norms over the batches of all processes (GPUs only)"""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("devices", "num_nodes", "val_every"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "1 or more", "correct it")
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", self.seed, "0 to 4294967295", "correct it")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`yolop-mtl train`: everything of one run."""

    recipe: tyro.conf.Suppress[str] = ""
    about: tyro.conf.Suppress[str] = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fitness: FitnessConfig = field(default_factory=FitnessConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
