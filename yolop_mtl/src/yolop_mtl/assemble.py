"""From a configuration to data, network and losses: the one place where they meet."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from shared_utils.errors import InputError
from yolop_mtl import bdd100k, coco
from yolop_mtl.anchors import Sizes, fit_anchors, letterboxed, measure_anchors
from yolop_mtl.boxes import COCO_ANCHORS, Anchors
from yolop_mtl.config import DataConfig, LossConfig, ModelConfig, TrainConfig
from yolop_mtl.loss_weights import LossWeights, default_gains
from yolop_mtl.losses import Criterion
from yolop_mtl.model import PRESETS, YOLOPv2, build_model
from yolop_mtl.prepare_check import image_size
from yolop_mtl.records import ALL_BDD_CLASSES, VEHICLE_CLASS, VEHICLES, Classes, Record
from yolop_mtl.samples import check_masks, check_records
from yolop_mtl.synth import SynthConfig, generate
from yolop_mtl.trunk import STRIDES

SCENE_SEED = 0  # the scenes stay the same in runs of other seeds
TASK_OF_FIGURE = {"mAP50_95": "detection", "drivable_mIoU": "drivable", "lane_f1": "lane"}


class Split(NamedTuple):
    """Images of a split with their labels, and the names of the classes by number."""

    records: list[Record]
    class_names: tuple[str, ...]


class Splits(NamedTuple):
    """What a run trains on and is measured with."""

    train: list[Record]
    val: list[Record]
    class_names: tuple[str, ...]


def load_splits(cfg: TrainConfig, fabric: Any) -> Splits:
    """Labels of training and validation images, checked; scenes are generated where they lack.

    Args:
        cfg: of the run.
        fabric: of the processes; the first of them generates.

    Raises: InputError and MissingFileError for what is wrong with them.
    """
    data, tasks = cfg.data, cfg.model.tasks
    if data.source == "synthetic":
        if fabric.is_global_zero:
            generate_scenes(data)
        fabric.barrier()
    train, names = load_split(data, data.train_split)
    val, _ = load_split(data, data.val_split)
    check_records(train, tasks, f"data.train_split '{data.train_split}'")
    where = f"data.val_split '{data.val_split}'"
    labelled = labelled_tasks(val, tasks)
    check_records(val, labelled or tasks, where)
    if not any(w and TASK_OF_FIGURE[name] in labelled for name, w in cfg.fitness.weights.items()):
        wanted = ", ".join(name for name, weight in cfg.fitness.weights.items() if weight)
        do = "label validation images, or give other figures a weight"
        raise InputError("fitness", f"{wanted} alone", f"a figure that {where} gives", do)
    for split in (train, val):
        check_masks(split, data, tasks)
    count = PRESETS[cfg.model.preset].num_classes or len(names)
    # The release has 80 outputs, whatever the data's classes.
    names += tuple(f"class {number}" for number in range(len(names), count))
    return Splits(train, val, names)


def labelled_tasks(records: Sequence[Record], tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that some image is labelled for."""
    fields = {"detection": "boxes_xyxy", "drivable": "drivable", "lane": "lane"}
    return [t for t in tasks if any(getattr(r, fields[t]) is not None for r in records)]


def generate_scenes(data: DataConfig) -> None:
    """Write the scenes of source `synthetic` where they are not there yet.

    Raises: InputError where the folder holds something else.
    """
    try:
        generate(
            SynthConfig(
                out=data.root,
                num_train=data.num_scenes[0],
                num_val=data.num_scenes[1],
                size=data.scene_size,
                seed=SCENE_SEED,
            )
        )
    except InputError as error:
        if error.field != "out":
            raise
        found = str(error).partition(": got ")[2].rpartition("; ")[0]
        got, _, expected = found.partition(", expected ")
        do = "remove that folder, or name another one"
        raise InputError("data.root", got, expected, do) from error


def load_split(config: DataConfig, split: str) -> Split:
    """Read the labels of a split, not its images; the first `limit` of them where there is one.

    Raises: InputError and MissingFileError for what is wrong with them.
    """
    found = _load_split(config, split)
    return found._replace(records=found.records[: config.limit or None])


def _load_split(config: DataConfig, split: str) -> Split:
    if config.source != "coco":
        members = VEHICLE_CLASS if config.classes == "vehicle" else ALL_BDD_CLASSES
        classes = Classes(members, known=bdd100k.CATEGORIES)
        size = config.scene_size if config.source == "synthetic" else bdd100k.SIZE
        return Split(bdd100k.load_records(config.root, split, classes, size=size), classes.names)
    own = coco.find_classes(config.root, config.train_split)
    if own is not None and config.classes == "vehicle":
        own = Classes({"vehicle": _vehicles(own.names)}, known=own.names)
    names = () if own is None else own.names
    return Split(coco.load_records(config.root, split, own), names)


def _vehicles(names: Sequence[str]) -> list[str]:
    """The categories of a data set that are vehicles: by BDD100K's names, or by that very word.

    Raises: InputError where none is, since then every box would be left out.
    """
    known = (*VEHICLES, "vehicle")
    if found := [name for name in names if name in known]:
        return found
    got = f"vehicle, while the categories are {', '.join(names) or 'none'}"
    expected = f"one or more of {', '.join(known)} among them"
    raise InputError("data.classes", got, expected, "set it to all, or rename the categories")


def choose_anchors(cfg: TrainConfig, records: Sequence[Record]) -> tuple[Anchors, str]:
    """Anchors as configured, and what to say of them.

    Args:
        cfg: of the run.
        records: training images, whose boxes `auto` is fitted to.

    Raises: InputError where there are too few boxes to fit.
    """
    model = cfg.model
    if "detection" not in model.tasks or model.anchors == "coco":
        return COCO_ANCHORS, ""
    if model.anchors == "explicit":
        table: Anchors = np.array(model.anchor_sizes).reshape(len(STRIDES), -1, 2).tolist()
        return table, ""
    sizes = box_sizes(records, cfg.data.img_size)
    anchors = fit_anchors(sizes, num_scales=len(STRIDES), seed=cfg.run.seed)
    fits = [measure_anchors(sizes, np.array(a).reshape(-1, 2)) for a in (anchors, COCO_ANCHORS)]
    words = " ".join(f"{side:g}" for side in np.ravel(anchors))
    return anchors, (
        f"anchors fitted to {len(sizes):,} boxes, fitness {fits[0].fitness:.3f} (COCO's "
        f"{fits[1].fitness:.3f}): {words}"
    )


def box_sizes(records: Iterable[Record], img_size: tuple[int, int]) -> Sizes:
    """Width and height (n, 2) of all boxes in pixels of the network's input.

    Raises: InputError for an image that cannot be read.
    """
    parts = []
    for record in records:
        if record.boxes_xyxy is not None and len(record.boxes_xyxy):
            height, width = image_size(record.image)
            boxes = record.boxes_xyxy.astype(np.float64).clip(0, [width, height] * 2)
            size = np.array([[width, height]], dtype=np.float64)
            parts.append(letterboxed(boxes[:, 2:] - boxes[:, :2], size, img_size))
    return np.concatenate(parts) if parts else np.zeros((0, 2))


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
        lane_upsample=config.lane_upsample,
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
