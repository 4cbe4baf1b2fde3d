"""What a batch is compared with: boxes and masks, and where they are not known.

An image may lack boxes or a mask. That is not the same as having none: what is unknown counts in no
loss and no metric. Masks hold 255 there; boxes have a mask of their own that says where they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = 255  # ignore_index of masks


class Targets(NamedTuple):
    """Truth of a batch. Shapes: B images of (H, W) pixels, T boxes of all of them.

    Attributes:
        boxes_cxcywh: (T, 4) float32, pixels of the network's input, not clipped where drawn so.
        labels: (T,) int64 class numbers.
        images: (T,) int64, the image that a box belongs to.
        known: (B, H, W) bool, False where boxes are not labelled; None: labelled everywhere.
        drivable: (B, H, W) uint8 or int64 class numbers, or 255; None: no image has any.
        lane: (B, H, W), 0 or 1, or 255; None: no image has any.
    """

    boxes_cxcywh: Tensor
    labels: Tensor
    images: Tensor
    known: Tensor | None = None
    drivable: Tensor | None = None
    lane: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """The same on another device."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        boxes, labels, images = (
            x.to(device, non_blocking=non_blocking)
            for x in (self.boxes_cxcywh, self.labels, self.images)
        )
        masks = (move(self.known), move(self.drivable), move(self.lane))
        return Targets(boxes, labels, images, *masks)


class ImageTargets(NamedTuple):
    """Truth of an image: the fields of `Targets` for one. None for what it is not labelled with.

    Attributes:
        boxes_cxcywh: (T, 4) float32; None where boxes are not labelled at all.
        labels: (T,) int64, or None with the boxes.
        known: (H, W) bool, where boxes are labelled in part (a mosaic); None: as `boxes_cxcywh`.
        drivable: (H, W), or None.
        lane: (H, W), or None.
    """

    boxes_cxcywh: Tensor | None
    labels: Tensor | None
    known: Tensor | None = None
    drivable: Tensor | None = None
    lane: Tensor | None = None


def collate_targets(items: Sequence[ImageTargets], size: tuple[int, int]) -> Targets:
    """Join images; a mask that only some have is 255 for the others.

    Args:
        items: one for each image of the batch.
        size: (H, W) of the images in pixels.
    """
    boxes = [torch.zeros(0, 4) if x.boxes_cxcywh is None else x.boxes_cxcywh for x in items]
    labels = [torch.zeros(0, dtype=torch.int64) if x.labels is None else x.labels for x in items]
    counts = torch.tensor([len(x) for x in boxes])
    known = None
    if any(x.known is not None or x.boxes_cxcywh is None for x in items):
        known = torch.stack([_known(x, size) for x in items])
    return Targets(
        boxes_cxcywh=torch.cat(boxes),
        labels=torch.cat(labels),
        images=torch.arange(len(items)).repeat_interleave(counts),
        known=known,
        drivable=_masks([x.drivable for x in items], size),
        lane=_masks([x.lane for x in items], size),
    )


def _known(item: ImageTargets, size: tuple[int, int]) -> Tensor:
    if item.known is not None:
        return item.known
    return torch.full(size, item.boxes_cxcywh is not None)


def _masks(masks: Sequence[Tensor | None], size: tuple[int, int]) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    unknown = torch.full(size, IGNORE, dtype=torch.uint8)
    return torch.stack([unknown if mask is None else mask.to(torch.uint8) for mask in masks])
