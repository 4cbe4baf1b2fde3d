"""From a configuration to data, network and losses: the one place where they meet."""

from typing import NamedTuple

from yolop_mtl import bdd100k, coco
from yolop_mtl.boxes import COCO_ANCHORS, Anchors
from yolop_mtl.config import DataConfig, LossConfig, ModelConfig
from yolop_mtl.loss_weights import LossWeights, default_gains
from yolop_mtl.losses import Criterion
from yolop_mtl.model import YOLOPv2, build_model
from yolop_mtl.records import ALL_BDD_CLASSES, VEHICLE_CLASS, VEHICLES, Classes, Record
from yolop_mtl.trunk import STRIDES


class Split(NamedTuple):
    """Images of a split with their labels, and the names of the classes by number."""

    records: list[Record]
    class_names: tuple[str, ...]


def load_split(config: DataConfig, split: str) -> Split:
    """Read the labels of a split, not its images.

    Raises: InputError and MissingFileError for what is wrong with them.
    """
    if config.source == "bdd100k":
        members = VEHICLE_CLASS if config.classes == "vehicle" else ALL_BDD_CLASSES
        classes = Classes(members, known=bdd100k.CATEGORIES)
        return Split(bdd100k.load_records(config.root, split, classes), classes.names)
    own = coco.find_classes(config.root, config.train_split)
    if own is not None and config.classes == "vehicle":
        # Names as BDD100K's; a data set with others names its classes by itself.
        own = Classes({"vehicle": [n for n in own.names if n in VEHICLES]}, known=own.names)
    names = () if own is None else own.names
    return Split(coco.load_records(config.root, split, own), names)


def build_network(
    config: ModelConfig, data: DataConfig, *, num_classes: int, anchors: Anchors = COCO_ANCHORS
) -> YOLOPv2:
    """The network for a number of classes; preset `release` has its own 80."""
    return build_model(
        config.preset,
        num_classes=None if config.preset == "release" else num_classes,
        tasks=config.tasks,
        anchors=anchors,
        num_drivable=3 if data.area_classes == "three" else 2,
        use_repconv=config.use_repconv,
        use_attention=config.use_attention,
    )


def build_losses(
    config: LossConfig, model: YOLOPv2, img_size: tuple[int, int]
) -> tuple[Criterion, LossWeights]:
    """The terms, and what makes one number of them."""
    head = model.detection
    criterion = Criterion(
        anchors=COCO_ANCHORS if head is None else head.anchors,
        strides=STRIDES,
        assign=config.assign,
        focal_gamma=config.focal_gamma,
        lane_alpha=config.lane_alpha,
        lane_gamma=config.lane_gamma,
        lane_fp=config.lane_fp,
        lane_fn=config.lane_fn,
        lane_exponent=config.lane_exponent,
        lane_reduce=config.lane_reduce,
    )
    num_classes = 1 if head is None else head.num_classes
    gains = default_gains(num_classes=num_classes, img_size=img_size, base=config.gains)
    return criterion, LossWeights(gains=gains, tasks=model.tasks, is_learned=config.is_learned)
