"""Raw outputs to what a person asked for: boxes and masks, in pixels of the image itself.

One code for validation and prediction. `detect` stays in pixels of the network's input; the
`native_` functions go from there to an image of any size.
"""

import warnings
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from yolop_mtl.boxes import MAX_CANDIDATES, Decoded, Detections, decode, suppress
from yolop_mtl.geometry import Letterbox
from yolop_mtl.trunk import STRIDES

FIRST_LOOK = 2048  # boxes of an image that are compared before it shows whether more are needed


@torch.no_grad()
def detect(
    maps: Sequence[Tensor],
    anchors: Tensor,
    strides: Sequence[int] = STRIDES,
    *,
    conf: float = 0.25,
    iou: float = 0.45,
    max_det: int = 300,
    is_class_agnostic: bool = False,
    is_multi_label: bool = False,
) -> list[Detections]:
    """Boxes of a batch from the raw maps, doubles suppressed.

    The best 2048 boxes of an image are looked at first, four times as many wherever the weaker ones
    could still change the result; so it is that of all boxes, and takes a fraction of the time.
    There is no time limit. Only where 30,000 boxes do not settle it the rest is left, with a
    warning.

    Args:
        maps: per scale (B, A (5 + C), H/s, W/s), raw.
        anchors: (L, A, 2) pixels.
        strides: pixels per cell of each scale.
        conf: a box needs a higher score, 0 to 1.
        iou: of two boxes of one class that overlap more, the better one stays.
        max_det: at most so many for an image.
        is_class_agnostic: boxes of different classes suppress one another too.
        is_multi_label: a box may stand for several classes, each with its score.

    Returns: per image the boxes in pixels of the input, best first, on the device of the maps.
    """
    decoded = decode(maps, anchors, strides)
    results, is_capped = [], False
    for boxes, scores in zip(decoded.boxes_xyxy, decoded.scores, strict=True):
        best = scores.amax(1)
        rows = (best > conf).nonzero()[:, 0]
        rows = rows[best[rows].argsort(descending=True, stable=True)]
        count = FIRST_LOOK
        while True:
            look = rows[:count]
            found = suppress(
                Decoded(boxes[look][None], scores[look][None]),
                conf_threshold=conf,
                iou_threshold=iou,
                max_detections=max_det,
                is_class_agnostic=is_class_agnostic,
                is_multi_label=is_multi_label,
            )[0]
            if count >= len(rows):
                break
            # A box is suppressed by better ones only: what is left cannot change those above it.
            if len(found.scores) == max_det and bool(found.scores[-1] >= best[rows[count]]):
                break
            if count == MAX_CANDIDATES:
                is_capped = True
                break
            count = min(4 * count, MAX_CANDIDATES)
        results.append(found)
    if is_capped:
        # The same words each time, so that Python's filters show it once.
        warnings.warn(
            f"more than {MAX_CANDIDATES} boxes of an image pass conf {conf}: "
            "only the best so many are looked at",
            stacklevel=2,
        )
    return results


def native_detections(found: Detections, letterbox: Letterbox) -> Detections:
    """Detections of the input -> of the image, on the CPU, clipped; those in the padding go."""
    boxes = letterbox.native_boxes(found.boxes_xyxy.cpu().double().numpy())
    moved = torch.from_numpy(boxes.astype(np.float32))
    is_inside = (moved[:, :2] < moved[:, 2:]).all(1)
    return Detections(
        moved[is_inside], found.scores.cpu()[is_inside], found.labels.cpu()[is_inside]
    )


@torch.no_grad()
def native_drivable(logits: Tensor, letterbox: Letterbox) -> NDArray[np.uint8]:
    """Drivable logits (C, H, W) of the input -> class numbers of the image, (h, w) of its size.

    Probabilities are interpolated, then the class is chosen: edges stay smooth in a larger image.
    """
    inner = _crop(logits, letterbox)
    if len(inner) == 2:  # one map says it all
        return _above((inner[1:] - inner[:1]).sigmoid(), letterbox.size, 0.5).view(np.uint8)
    number = _resize(inner.softmax(0), letterbox.size).argmax(0)
    return number.to(torch.uint8).cpu().numpy()


@torch.no_grad()
def native_lane(logits: Tensor, letterbox: Letterbox, threshold: float = 0.5) -> NDArray[np.bool_]:
    """Lane logits (1, H, W) of the input -> where the image has lanes, (h, w) of its size.

    Args:
        logits: of one image.
        letterbox: how the image lies in the input.
        threshold: a lane pixel needs a higher probability, 0 to 1.
    """
    return _above(_crop(logits, letterbox).sigmoid(), letterbox.size, threshold)


def _crop(logits: Tensor, letterbox: Letterbox) -> Tensor:
    return logits[:, letterbox.rows, letterbox.columns].float()


def _above(share: Tensor, size: tuple[int, int], threshold: float) -> NDArray[np.bool_]:
    """Where a map (1, H, W), at another size, is above a threshold: (h, w)."""
    result: NDArray[np.bool_] = (_resize(share, size)[0] > threshold).cpu().numpy()
    return result


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) -> (C, h, w), bilinear, of averages where it shrinks."""
    if maps.shape[1:] == size:
        return maps
    shrinks = size[0] < maps.shape[1] or size[1] < maps.shape[2]
    if maps.device.type == "cpu" and not shrinks:
        # The same numbers in a quarter of torch's time.
        planes = maps.permute(1, 2, 0).contiguous().numpy()
        scaled = cv2.resize(planes, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
        return torch.from_numpy(scaled.reshape(*size, -1)).permute(2, 0, 1)
    # Without `antialias` where nothing shrinks: it changes nothing there, and takes twice the time.
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False, antialias=shrinks)[
        0
    ]
