"""What a person wants to see of a run: the images it trains on, and truth beside prediction."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.ops import box_convert

from yolop_mtl.dataset import DrivingDataset, Item
from yolop_mtl.draw import overlay, sheet
from yolop_mtl.learner import scaled
from yolop_mtl.model import YOLOPv2
from yolop_mtl.postprocess import detect, native_detections, native_drivable, native_lane
from yolop_mtl.samples import Pixels, Sample
from yolop_mtl.targets import IGNORE

NUM_TRAIN, NUM_VAL = 8, 8
PANEL = 640  # pixels, the longest side of a picture of a sheet


def train_images(items: Sequence[Item], class_names: Sequence[str], path: Path) -> None:
    """Images as the network gets them, with their labels."""
    panels = []
    for item in items[:NUM_TRAIN]:
        truth = item.targets
        boxes = truth.boxes_cxcywh
        panels.append(
            overlay(
                np.ascontiguousarray(item.image.permute(1, 2, 0).numpy()),
                drivable=None if truth.drivable is None else _area(truth.drivable.numpy()),
                lane=None if truth.lane is None else truth.lane.numpy() == 1,
                boxes_xyxy=None if boxes is None else box_convert(boxes, "cxcywh", "xyxy").numpy(),
                labels=None if truth.labels is None else truth.labels.numpy(),
                class_names=class_names,
            )
        )
    _save(panels, path, columns=2)


@torch.no_grad()
def predictions(
    model: YOLOPv2,
    dataset: DrivingDataset,
    class_names: Sequence[str],
    path: Path,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> None:
    """Validation images, from all over the split: truth to the left, prediction to the right.

    Args:
        model: in eval mode, on the device.
        dataset: not augmented.
        class_names: of boxes.
        path: the picture to write.
        device: of the model.
        autocast: makes the context to compute in.
    """
    panels = []
    count = min(NUM_VAL, len(dataset))
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
        sample = dataset.read(index)
        panels.append(_truth(sample, class_names))
        item = dataset[index]
        box = item.letterbox
        if box is None:
            raise ValueError("dataset: got an augmented one, expected letterboxed images")
        with autocast():
            out = model(scaled(item.image[None].to(device)))
        found = None
        if model.detection is not None:
            maps = [x.float() for x in out["detection"]]
            found = native_detections(detect(maps, model.detection.anchors)[0], box)
        panels.append(
            overlay(
                sample.image,
                drivable=native_drivable(out["drivable"][0], box) > 0
                if "drivable" in out
                else None,
                lane=native_lane(out["lane"][0], box) if "lane" in out else None,
                boxes_xyxy=None if found is None else found.boxes_xyxy.numpy(),
                labels=None if found is None else found.labels.numpy(),
                scores=None if found is None else found.scores.numpy(),
                class_names=class_names,
            )
        )
    _save(panels, path, columns=2)


def _truth(sample: Sample, class_names: Sequence[str]) -> Pixels:
    return overlay(
        sample.image,
        drivable=None if sample.drivable is None else _area(sample.drivable),
        lane=None if sample.lane is None else sample.lane == 1,
        boxes_xyxy=sample.boxes_xyxy,
        labels=sample.labels,
        class_names=class_names,
    )


def _area(mask: Pixels) -> NDArray[np.bool_]:
    """Where a mask has any drivable area; unknown is none."""
    area: NDArray[np.bool_] = (mask > 0) & (mask != IGNORE)
    return area


def _save(panels: Sequence[Pixels], path: Path, *, columns: int) -> None:
    shrunk = []
    for panel in panels:
        image = Image.fromarray(panel)
        image.thumbnail((PANEL, PANEL), Image.Resampling.LANCZOS)
        shrunk.append(np.asarray(image))
    Image.fromarray(sheet(shrunk, columns)).save(path)
