"""A network whose outputs are known, and a labelled set of a few images for it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from yolop_mtl.boxes import build_grid, encode_boxes
from yolop_mtl.dataset import Batch, Item, collate
from yolop_mtl.geometry import fit
from yolop_mtl.samples import Sample
from yolop_mtl.targets import ImageTargets

from .raw_outputs import ANCHORS, STRIDES

SIZE = (96, 160)  # of the input
NATIVE = [(720, 1280), (333, 500), (1280, 720), (1080, 1920), (96, 160)]


def autocast() -> AbstractContextManager[None]:
    return nullcontext()


class KnownNetwork(nn.Module):
    """Looks up what it gives for an image by the value of the image's first pixel."""

    def __init__(self, outputs: Sequence[dict[str, object]]) -> None:
        super().__init__()
        self.outputs = outputs
        self.detection = SimpleNamespace(anchors=ANCHORS)

    def forward(self, images: Tensor) -> dict[str, object]:
        numbers = (images[:, 0, 0, 0] * 255).round().long().tolist()
        found = [self.outputs[number] for number in numbers]
        result: dict[str, object] = {}
        for task in found[0]:
            if task == "detection":
                result[task] = [
                    torch.stack(maps) for maps in zip(*(x[task] for x in found), strict=True)
                ]
            else:
                result[task] = torch.stack([x[task] for x in found])
        return result


def raw_maps(
    boxes_xyxy: Tensor, scores: Sequence[float], labels: Sequence[int], num_classes: int
) -> list[Tensor]:
    """Maps of an image of `SIZE` that decode to the boxes: each by the anchor nearest in size."""
    maps = [torch.full((3, 5 + num_classes, SIZE[0] // s, SIZE[1] // s), -20.0) for s in STRIDES]
    sizes = [(x.shape[2], x.shape[3]) for x in maps]
    grid = build_grid(sizes, STRIDES, ANCHORS)
    for box, score, label in zip(boxes_xyxy, scores, labels, strict=True):
        size, centre = box[2:] - box[:2], (box[:2] + box[2:]) / 2
        ratio = torch.maximum(grid.anchors / size, size / grid.anchors).amax(1)
        away = ((centre / grid.strides[:, None] - grid.cells - 0.5).abs()).amax(1)
        row = int((ratio + 1e6 * (away > 0.5)).argmin())
        scale, cell = int(grid.scales[row]), grid.cells[row].long()
        anchor = int((ANCHORS[scale] == grid.anchors[row]).all(1).nonzero()[0])
        one = torch.tensor(row)
        cxcywh = torch.cat([centre, size])
        raw = encode_boxes(cxcywh, grid.cells[one], grid.strides[one], grid.anchors[one])
        slot = maps[scale][anchor, :, cell[1], cell[0]]
        slot[:4] = raw
        slot[4] = torch.logit(torch.tensor(score))
        slot[5:] = -20.0
        slot[5 + label] = 20.0
    return [x.flatten(0, 1) for x in maps]


def two_classes(mask: Tensor, sharpness: float = 8.0) -> Tensor:
    """Drivable logits (2, H, W) of a mask of 0 and 1."""
    share = (mask.float() * 2 - 1) * sharpness
    return torch.stack([-share, share])


def truths(seed: int = 0, count: int = 7, num_classes: int = 2) -> list[Sample]:
    """Images of several sizes with a few boxes, a road, and lanes; some lack a label."""
    rng = np.random.default_rng(seed)
    result = []
    for number in range(count):
        height, width = NATIVE[number % len(NATIVE)]
        # In tiles of 2 x 3, so that none hides another.
        tiles = rng.permutation(6)[: int(rng.integers(2, 5))]
        low = (np.stack([tiles % 3, tiles // 3], 1) + rng.random((len(tiles), 2)) * 0.2) / [3, 2]
        boxes = np.concatenate([low, low + (0.5 + rng.random(low.shape) * 0.3) / [3, 2]], 1)
        boxes *= [width, height, width, height]
        drivable = np.zeros((height, width), dtype=np.uint8)
        drivable[height // 2 :, int(width * rng.random() / 2) :] = 1
        drivable[: height // 10] = 255
        lane = np.zeros((height, width), dtype=np.uint8)
        column = int(width * (0.2 + 0.6 * rng.random()))
        lane[height // 2 :, column : column + width // 40] = 1
        result.append(
            Sample(
                np.zeros((0, 0, 3), dtype=np.uint8),
                None if number == 5 else boxes.astype(np.float32),
                None if number == 5 else rng.integers(num_classes, size=len(boxes)),
                None if number == 6 else drivable,
                None if number == 4 else lane,
            )
        )
    return result


def native_size(number: int) -> tuple[int, int]:
    return NATIVE[number % len(NATIVE)]


def outputs(samples: Sequence[Sample], noise: float, seed: int = 0) -> list[dict[str, object]]:
    """What a network gives that is right but for noise; with none it is right everywhere."""
    rng = np.random.default_rng(seed)
    result = []
    for number, sample in enumerate(samples):
        box = fit(native_size(number), SIZE)
        native = np.zeros((0, 4)) if sample.boxes_xyxy is None else sample.boxes_xyxy
        inside = box.boxes(native.astype(np.float64))
        inside += rng.normal(size=inside.shape) * noise * 8
        scores = (0.5 + 0.4 * rng.random(len(inside))).tolist()
        labels = [] if sample.labels is None else sample.labels.tolist()
        drivable, lane = (
            torch.from_numpy(np.zeros(SIZE, dtype=np.uint8) if mask is None else box.mask(mask))
            for mask in (sample.drivable, sample.lane)
        )
        blur = torch.from_numpy(rng.normal(size=(3, *SIZE)) * noise * 8).float()
        result.append(
            {
                "detection": raw_maps(torch.from_numpy(inside).float(), scores, labels, 2),
                "drivable": two_classes(drivable == 1) + blur[:2],
                "lane": ((lane == 1).float() * 16 - 8 + blur[2])[None],
            }
        )
    return result


def batches(
    samples: Sequence[Sample], batch_size: int, order: Sequence[int] | None = None
) -> list[Batch]:
    """The set as a loader gives it; the first pixel of each image is its number."""
    order = range(len(samples)) if order is None else order
    items = []
    for number in order:
        image = torch.zeros(3, *SIZE, dtype=torch.uint8)
        image[:, 0, 0] = number
        targets = ImageTargets(None, None)
        items.append(Item(image, targets, fit(native_size(number), SIZE), number, samples[number]))
    return [collate(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
