"""Samples of a loss that wait for the next update of the sub-centroids."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DOMINANT = 0.5  # the share of a soft label above which a sample counts as one of that class


class Samples(NamedTuple):
    """Detached features (N, D) of unit length, labels (N,), places in the data set (N,)."""

    z: Tensor
    labels: Tensor
    indices: Tensor


def with_class(
    z: Tensor, targets: Tensor, indices: Tensor, ignore_index: int
) -> tuple[Samples, Tensor]:
    """The samples that have one class, or one that dominates, and which these are (N,)."""
    if targets.is_floating_point():
        share, labels = targets.max(dim=1)
        has_class = share > DOMINANT
    else:
        labels, has_class = targets, targets != ignore_index
    return Samples(z[has_class], labels[has_class], indices[has_class]), has_class


def joined(waiting: Sequence[Samples], like: Tensor) -> Samples:
    """All that waits, as one, in float32; `like` (..., D) says of what width and where."""
    if not waiting:
        none = torch.zeros(0, dtype=torch.int64, device=like.device)
        return Samples(like.new_zeros(0, like.shape[-1]), none, none)
    found = Samples(*(torch.cat(parts) for parts in zip(*waiting, strict=True)))
    return found._replace(z=found.z.float())
