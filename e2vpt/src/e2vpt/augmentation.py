"""What `e2vpt pretrain` does to whole batches of images: normalise, flip, crop, mix.

Shapes: B batch, H W size in pixels. Randomness comes from torch's own generator.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CROP_PADDING = 4  # pixels


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float, ImageNet statistics."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def augment(images: Tensor) -> Tensor:
    """Flips and crops after padding by 4 pixels, each image its own. uint8 (B, 3, H, W), a copy."""
    b, _, h, w = images.shape
    padded = F.pad(images, (CROP_PADDING,) * 4)
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, b, 1, 1))
    rows = top + torch.arange(h).view(1, h, 1)
    columns = left + torch.arange(w).view(1, 1, w)
    flip = torch.rand(b, 1, 1) < 0.5
    columns = torch.where(flip, columns.flip(-1), columns)
    index = torch.arange(b).view(b, 1, 1)
    return padded.permute(0, 2, 3, 1)[index, rows, columns].permute(0, 3, 1, 2)


def cutmix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Put a box of a shuffled copy of the batch into it: images, other labels, own share."""
    _, _, h, w = images.shape
    area = float(torch.rand(()))
    box_h, box_w = round(h * area**0.5), round(w * area**0.5)
    top = int(torch.randint(0, h - box_h + 1, ()))
    left = int(torch.randint(0, w - box_w + 1, ()))
    order = torch.randperm(len(images))
    mixed = images.clone()
    mixed[:, :, top : top + box_h, left : left + box_w] = images[
        order, :, top : top + box_h, left : left + box_w
    ]
    return mixed, labels[order], 1 - box_h * box_w / (h * w)
