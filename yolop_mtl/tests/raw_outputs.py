"""Raw outputs, truth and losses that tests of the losses share."""

import torch

from yolop_mtl.boxes import COCO_ANCHORS
from yolop_mtl.losses import Criterion
from yolop_mtl.targets import Targets

STRIDES = (8, 16, 32)
ANCHORS = torch.tensor(COCO_ANCHORS, dtype=torch.float32)
SIZE = (64, 96)
TERMS = (
    "loss_box",
    "loss_obj",
    "loss_cls",
    "loss_drivable",
    "loss_lane_focal",
    "loss_lane_dice",
    "loss_lane_iou",
)


def outputs(
    num_classes: int = 2, batch: int = 2, fill: float | None = None, seed: int = 0
) -> dict[str, object]:
    """Raw outputs that want a gradient: random, or all of one value."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator) if fill is None else torch.full(shape, fill)
        return x.requires_grad_()

    height, width = SIZE
    return {
        "detection": [leaf(batch, 3 * (5 + num_classes), height // s, width // s) for s in STRIDES],
        "drivable": leaf(batch, 2, height, width),
        "lane": leaf(batch, 1, height, width),
    }


def leaves(out: dict[str, object]) -> list[torch.Tensor]:
    return [*out["detection"], out["drivable"], out["lane"]]


def truth(num_classes: int = 2, seed: int = 1) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    height, width = SIZE
    return Targets(
        boxes_cxcywh=torch.tensor(
            [[30.0, 20.0, 30.0, 20.0], [60, 40, 44, 30], [50, 30, 12, 20], [80, 50, 16, 20]]
        ),
        labels=torch.tensor([0, 1, 1, 0]) % num_classes,
        images=torch.tensor([0, 0, 1, 1]),
        drivable=torch.randint(2, (2, height, width), generator=generator).byte(),
        lane=torch.randint(2, (2, height, width), generator=generator).byte(),
    )


def criterion(**options: object) -> Criterion:
    return Criterion(anchors=COCO_ANCHORS, strides=STRIDES, **options)
