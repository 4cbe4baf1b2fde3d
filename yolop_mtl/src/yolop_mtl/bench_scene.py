"""A street for the benchmark: what a trained network gives for a generated scene, made by hand.

Time of the network does not depend on its weights, that of everything after it does: on how many
boxes pass the threshold, and on how much road and lane there is.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolop_mtl.boxes import build_grid, encode_boxes
from yolop_mtl.geometry import Letterbox, fit
from yolop_mtl.synth import Scene, draw_scene
from yolop_mtl.trunk import STRIDES

SEED, LOOKED_AT = 0, 8  # of the scenes, and out of how many the fullest is taken
PER_BOX = 10  # predictions that fire for a vehicle, as several anchors and cells do
REACH, FIT = 0.9, 3.5  # cells from a prediction to the centre, ratio of sides to its anchor
JITTER = 0.03  # of a box's sides
QUIET = -7.0  # logit of objectness elsewhere
SURE = 6.0  # logit of road and lane
BLUR = 1.5  # pixels over which a mask's edge rises


class Street(NamedTuple):
    """A scene, how it lies in the network's input, and what a network gives for it.

    Attributes:
        scene: generated, of the size asked for.
        letterbox: of its image.
        raw: outputs for a batch of one, in float32.
        num_fired: predictions with a score above 0.3.
    """

    scene: Scene
    letterbox: Letterbox
    raw: dict[str, Any]
    num_fired: int


def make_street(
    anchors: Tensor, num_classes: int, img_size: tuple[int, int], size: tuple[int, int]
) -> Street:
    """The fullest of some generated scenes, with outputs that find its labels.

    Args:
        anchors: (L, A, 2) of the network.
        num_classes: of boxes; all vehicles are of class 0.
        img_size: (H, W) of the network's input.
        size: (h, w) of the scene.
    """
    scenes = (draw_scene(SEED, index, size) for index in range(LOOKED_AT))
    scene = max(scenes, key=lambda one: len(one.categories))
    letterbox = fit(size, img_size)
    random = np.random.default_rng(SEED)
    boxes = letterbox.boxes(scene.boxes_xyxy.astype(np.float64))
    maps, num_fired = _box_maps(boxes, anchors, num_classes, img_size, random)
    road = _logits(letterbox.mask((scene.drivable > 0).astype(np.uint8)))
    raw = {
        "detection": maps,
        "drivable": torch.stack([-road / 2, road / 2])[None],
        "lane": _logits(letterbox.mask(scene.lane))[None, None],
    }
    return Street(scene, letterbox, raw, num_fired)


def _box_maps(
    boxes_xyxy: NDArray[np.float64],
    anchors: Tensor,
    num_classes: int,
    img_size: tuple[int, int],
    random: np.random.Generator,
) -> tuple[list[Tensor], int]:
    """Maps per scale (1, A (5 + C), H/s, W/s), and how many predictions fire."""
    sizes = [(img_size[0] // stride, img_size[1] // stride) for stride in STRIDES]
    grid = build_grid(sizes, STRIDES, anchors)
    flat = torch.from_numpy(random.normal(0, 0.3, (len(grid.scales), 5 + num_classes))).float()
    flat[:, 4] += QUIET
    fired: set[int] = set()
    for x1, y1, x2, y2 in boxes_xyxy:
        centre, side = (
            torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2]),
            torch.tensor([x2 - x1, y2 - y1]),
        )
        away = (centre / grid.strides[:, None] - grid.cells - 0.5).abs().amax(1)
        ratio = torch.maximum(grid.anchors / side, side / grid.anchors).amax(1)
        near = ((away < REACH) & (ratio < FIT)).nonzero()[:, 0]
        near = near[(away + ratio)[near].argsort()[:PER_BOX]]
        shift = torch.from_numpy(random.normal(0, JITTER, (len(near), 4)))
        wanted = torch.cat([centre + shift[:, :2] * side, side * (1 + shift[:, 2:])], 1)
        flat[near, :4] = encode_boxes(
            wanted, grid.cells[near], grid.strides[near], grid.anchors[near]
        ).float()
        scores = torch.from_numpy(random.uniform(0.35, 0.95, len(near))).float()
        flat[near, 4], flat[near, 5] = torch.logit(scores), SURE
        fired |= set(near.tolist())
    maps = []
    num_anchors = anchors.shape[1]
    for part, (height, width) in zip(
        flat.split([num_anchors * h * w for h, w in sizes]), sizes, strict=True
    ):
        maps.append(
            part.view(num_anchors, height, width, -1).permute(0, 3, 1, 2).flatten(0, 1)[None]
        )
    return [x.contiguous() for x in maps], len(fired)


def _logits(mask: NDArray[np.uint8]) -> Tensor:
    """(H, W) of 0 and 1 -> logits with edges that rise over some pixels."""
    share = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), BLUR)
    return torch.from_numpy(np.asarray((2 * share - 1) * SURE, dtype=np.float32))
