"""What a run is made of: frozen dataclasses, their help texts under the fields."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared_utils.errors import InputError
from yolop_mtl.losses import Assign, Reduce
from yolop_mtl.masks import AreaClasses, MaskFormat, check_format
from yolop_mtl.model import MAX_STRIDE, TASKS, Task, check_tasks


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

    def __post_init__(self) -> None:
        """Check tasks."""
        check_tasks(self.tasks)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and labels, and how they are read."""

    source: Literal["bdd100k", "coco"] = "bdd100k"
    """form of the labels: BDD100K's (or YOLOP's downloads), or COCO JSON with mask files"""
    root: Path = Path("data/bdd100k")
    """folder that holds images/ and the labels"""
    train_split: str = "train"
    """name of the training images' folder"""
    val_split: str = "val"
    """name of the validation images' folder"""
    img_size: tuple[int, int] = (384, 640)
    """height and width of the network's input in pixels, multiples of 32"""
    classes: Literal["vehicle", "all"] = "vehicle"
    """of boxes: car, bus, truck and train as one, or all of the data's classes"""
    drivable_format: MaskFormat = "binary"
    """form of the drivable masks: binary (YOLOP's), value (official), color, index"""
    lane_format: MaskFormat = "binary"
    """form of the lane masks: binary (YOLOP's), bits (official), index"""
    area_classes: AreaClasses = "merged"
    """the alternative area: merged with the direct one, direct_only (background), or a third class
    (three)"""

    def __post_init__(self) -> None:
        """Check sizes and forms."""
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
        for name in GAINS:
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"loss.{name}", getattr(self, name), "0 or more", "correct it")
        if not 0 <= self.lane_alpha <= 1:
            raise InputError("loss.lane_alpha", self.lane_alpha, "0 to 1", "correct it")
        for name in ("focal_gamma", "lane_gamma", "lane_fp", "lane_fn"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"loss.{name}", getattr(self, name), "0 or more", "correct it")
        if not 0 < self.lane_exponent < math.inf:
            do = "correct it"
            raise InputError("loss.lane_exponent", self.lane_exponent, "more than 0", do)

    @property
    def gains(self) -> dict[str, float]:
        """The gain of each term, by the term's name."""
        return {f"loss_{name}": getattr(self, name) for name in GAINS}


GAINS = ("box", "obj", "cls", "drivable", "lane_focal", "lane_dice", "lane_iou")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
