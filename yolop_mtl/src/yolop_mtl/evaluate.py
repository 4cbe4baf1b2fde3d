"""A network's figures on a labelled set: both ways of counting, image by image, over processes.

Names without prefix are strict: COCO's rules for boxes, one table of pixels for masks. They do not
depend on batches, order or processes. Names with `legacy_` are YOLOP's way, which averages batches
of 32 in the order of the set.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from shared_utils.errors import InputError
from yolop_mtl.box_metrics import BoxCurves, ImageBoxes, box_metrics
from yolop_mtl.boxes import Detections
from yolop_mtl.clock import Clock
from yolop_mtl.config import DataConfig
from yolop_mtl.dataset import Batch
from yolop_mtl.geometry import Letterbox
from yolop_mtl.legacy_box_metrics import legacy_box_metrics
from yolop_mtl.mask_metrics import (
    DrivableCounts,
    LaneCounts,
    LaneCurve,
    at_threshold,
    count_drivable,
    count_lane,
    drivable_metrics,
    lane_curve,
    lane_metrics,
    legacy_drivable_metrics,
    legacy_lane_metrics,
)
from yolop_mtl.postprocess import detect, native_detections
from yolop_mtl.samples import Sample

Autocast = Callable[[], AbstractContextManager[Any]]
Gather = Callable[[object], list[object]]


class ImageResult(NamedTuple):
    """What is kept of an image; None for a task that is off or that it is not labelled for.

    Neither pixels nor masks: at most `max_det` detections of 28 bytes, which COCO's average
    precision needs to the end of the set, 24 bytes for each truth, and counts of less than 2 KiB.
    So memory grows with the images, by some 10 KB for each at 300 detections, and not with their
    size.

    Attributes:
        number: of the image in its split.
        boxes: detections and truth.
        drivable: pixel counts.
        lane: pixel counts.
    """

    number: int
    boxes: ImageBoxes | None
    drivable: DrivableCounts | None
    lane: LaneCounts | None


class Evaluation(NamedTuple):
    """Figures and what they were made of.

    Attributes:
        metrics: name to value, fractions of 1; names of a task that is off or that no image is
            labelled for are absent, those of boxes also where there is no box at all.
        boxes: curves over confidence and recall, or None.
        lane: curve over thresholds, or None.
        images: of all processes, in the order of the split; `summarize` takes any part of them.
    """

    metrics: dict[str, float]
    boxes: BoxCurves | None
    lane: LaneCurve | None
    images: list[ImageResult]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    class_names: Sequence[str],
    data: DataConfig,
    device: torch.device | str,
    autocast: Autocast,
    conf: float = 0.001,
    iou: float = 0.65,
    max_det: int = 300,
    gather: Gather | None = None,
    clock: Clock | None = None,
) -> Evaluation:
    """Run a network over a labelled set and count.

    Batches are taken one by one; of an image its detections and some counts are kept. The network
    is in eval mode meanwhile, and in its former mode afterwards.

    Args:
        model: on `device`; as `YOLOPv2` it gives raw outputs by task.
        batches: of this process's share of the set, with letterboxes and truths.
        class_names: of boxes, by number.
        data: whether alternative areas are a class of their own.
        device: to run on.
        autocast: gives the context of the forward pass, and with it its precision.
        conf: a detection needs a higher score.
        iou: of two detections of one class that overlap more, the better one stays.
        max_det: detections of an image at most.
        gather: called once with what this process has, gives what each process has; None: there is
            one process. An image that several have had counts once.
        clock: told after each part: load (the wait for the loader), network (with the way to the
            device), postprocessing (boxes), counting.

    Raises: InputError for batches without truth, no image at all, or a network of other classes.
    """
    was_training = model.training
    model.eval()
    try:
        results = []
        for batch in batches:
            _lap(clock, "load")
            limits = (conf, iou, max_det)
            results += _run(model, batch, class_names, data, device, autocast, limits, clock)
            if clock is not None:
                clock.end_batch(len(batch.indices))
    finally:
        model.train(was_training)
    if gather is not None:
        parts = cast(list[list[ImageResult]], gather(results))
        results = [result for part in parts for result in part]
    unique = {result.number: result for result in results}
    if not unique:
        raise InputError("data", "no image to evaluate", "one or more", "check the split")
    return summarize([unique[number] for number in sorted(unique)], len(class_names))


def summarize(images: Sequence[ImageResult], num_classes: int) -> Evaluation:
    """The figures of images, of all or of some.

    Args:
        images: in the order of the split, which the legacy figures depend on.
        num_classes: of boxes.
    """
    boxes = [image.boxes for image in images if image.boxes is not None]
    drivable = [image.drivable for image in images if image.drivable is not None]
    lanes = [image.lane for image in images if image.lane is not None]
    metrics: dict[str, float] = {}
    box_curves = curve = None
    if boxes:
        found, box_curves = box_metrics(boxes, num_classes)
        metrics |= found | _named("legacy_", legacy_box_metrics(boxes, num_classes))
    if drivable:
        total = np.sum([counts.strict for counts in drivable], axis=0)
        legacy = legacy_drivable_metrics([counts.legacy for counts in drivable])
        metrics |= _named("drivable_", drivable_metrics(total))
        metrics |= _named("legacy_drivable_", legacy)
    if lanes:
        total = np.sum([counts.by_probability for counts in lanes], axis=0)
        inner, outer = np.sum([counts.tolerant for counts in lanes], axis=0).tolist()
        curve = lane_curve(total)
        best = int(curve.IoU.argmax())
        metrics |= _named("lane_", lane_metrics(at_threshold(total)))
        metrics["lane_tolerant_IoU"] = inner / outer if outer else 0.0
        metrics["lane_best_threshold"] = float(curve.threshold[best])
        metrics["lane_best_IoU"] = float(curve.IoU[best])
        legacy = legacy_lane_metrics([counts.legacy for counts in lanes])
        metrics |= _named("legacy_lane_", legacy)
    return Evaluation(metrics, box_curves, curve, list(images))


def _named(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in metrics.items()}


def _run(
    model: nn.Module,
    batch: Batch,
    class_names: Sequence[str],
    data: DataConfig,
    device: torch.device | str,
    autocast: Autocast,
    limits: tuple[float, float, int],
    clock: Clock | None,
) -> list[ImageResult]:
    if batch.letterboxes is None or batch.truths is None:
        do = "evaluate a set that is not augmented"
        raise InputError("batches", "one without truth in native pixels", "one with", do)
    images = batch.images.to(device, non_blocking=True).float() / 255
    with autocast():
        outputs = model(images)
    _lap(clock, "network")
    _check_drivable(outputs, data)
    rows = list(zip(batch.indices, batch.letterboxes, batch.truths, strict=True))
    boxes: list[ImageBoxes | None] = [None] * len(rows)
    drivable: list[DrivableCounts | None] = [None] * len(rows)
    lanes: list[LaneCounts | None] = [None] * len(rows)
    if "detection" in outputs:
        conf, iou, max_det = limits
        anchors = cast(Tensor, cast(nn.Module, model.detection).anchors)
        num_classes = outputs["detection"][0].shape[1] // anchors.shape[1] - 5
        if num_classes != len(class_names):
            do = "evaluate it on the classes it was trained for"
            raise InputError("model", f"{num_classes} classes of boxes", f"{len(class_names)}", do)
        found = detect(
            outputs["detection"],
            anchors,
            conf=conf,
            iou=iou,
            max_det=max_det,
            is_multi_label=len(class_names) > 1,
        )
        boxes = [_boxes(x, row[2], row[1]) for x, row in zip(found, rows, strict=True)]
        _lap(clock, "postprocessing")
    if "drivable" in outputs:
        drivable = [
            None if truth.drivable is None else count_drivable(logits, truth.drivable, letterbox)
            for logits, (_, letterbox, truth) in zip(outputs["drivable"], rows, strict=True)
        ]
    if "lane" in outputs:
        lanes = [
            None if truth.lane is None else count_lane(logits, truth.lane, letterbox)
            for logits, (_, letterbox, truth) in zip(outputs["lane"], rows, strict=True)
        ]
    _lap(clock, "counting")
    columns = (batch.indices, boxes, drivable, lanes)
    return [ImageResult(*row) for row in zip(*columns, strict=True)]


def _lap(clock: Clock | None, part: str) -> None:
    if clock is not None:
        clock.lap(part)


def _check_drivable(outputs: dict[str, Any], data: DataConfig) -> None:
    if "drivable" not in outputs:
        return
    got, expected = outputs["drivable"].shape[1], 3 if data.area_classes == "three" else 2
    if got != expected:
        do = "set data.area_classes as in training"
        raise InputError("model", f"{got} classes of area", f"{expected}", do)


def _boxes(found: Detections, truth: Sample, letterbox: Letterbox) -> ImageBoxes | None:
    if truth.boxes_xyxy is None or truth.labels is None:
        return None
    boxes, scores, labels = (x.numpy() for x in native_detections(found, letterbox))
    return ImageBoxes(boxes, scores, labels, truth.boxes_xyxy, truth.labels)
