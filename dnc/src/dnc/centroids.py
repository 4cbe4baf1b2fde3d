"""Where sub-centroids start, how they move, and what becomes of those that nothing comes to.

Paper: Sec. 3.1-3.2, momentum update of sub-centroids from the features assigned to them.
Differs from the paper: they start from real features, far from each other, instead of at random;
the first update replaces the start and later ones are a running mean until the momentum is
reached; one that gets nothing is put elsewhere; processes add up sums and counts, not centroids.

Shapes: N samples of this process, D width, C classes, K sub-centroids of a class, T some classes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dnc.processes import rank, reduce, world_size

NOBODY = torch.iinfo(torch.int64).max


def pick_lowest(
    score: Tensor, z: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sample of lowest score of each class, over all processes; every process calls it.

    Of equals the one of the first process and there the first counts.

    Args:
        score: (N,) float; infinite for samples that are out of the question.
        z: (N, D).
        labels: (N,) int64 in [0, T).
        num_classes: T.

    Returns: whether a class has one (T,), its features (T, D), and whether a sample of this process
        was picked (N,).
    """
    none = score.new_full((num_classes,), math.inf)
    lowest = reduce(none.scatter_reduce(0, labels, score, "amin"), "min")
    found = lowest.isfinite()
    is_candidate = found[labels] & (score == lowest[labels])
    place = torch.where(is_candidate, torch.arange(len(z), device=z.device), NOBODY)
    first = labels.new_full((num_classes,), NOBODY).scatter_reduce(0, labels, place, "amin")
    owner = torch.where(first < NOBODY, rank(), world_size())
    has = (first < NOBODY) & (reduce(owner.clone(), "min") == rank())
    features = z.new_zeros(num_classes, z.shape[1])
    features[has] = z[first[has]]
    picked = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    picked[first[has]] = True
    return found, reduce(features, "sum"), picked


def seed(centroids: Tensor, seeded: Tensor, active: Tensor, z: Tensor, labels: Tensor) -> None:
    """Fill free places of the classes that have samples, farthest first; in place.

    The first is the sample nearest to the class's mean, each further one the sample least similar
    to those that are there. Where samples run out, the places left hold copies of the first, so
    that they change no score, and stay free for later samples. Every process has to call it.

    Args:
        centroids: (C, K, D) float32.
        seeded: (C, K) bool, which places are taken.
        active: (C, K) bool, which places are in use at all; the first of each class is.
        z: (N, D) unit vectors of the same type.
        labels: (N,) int64 in [0, C).
    """
    num_classes, num_centroids, width = centroids.shape
    present = reduce(torch.bincount(labels, minlength=num_classes), "sum") > 0
    is_open = (active & ~seeded).any(dim=1)
    classes = (present & is_open).nonzero()[:, 0]  # (T,), the same in all processes
    if len(classes) == 0:
        return
    compact = labels.new_full((num_classes,), -1)
    compact[classes] = torch.arange(len(classes), device=classes.device)
    own = compact[labels] >= 0
    z, labels = z[own], compact[labels[own]]
    points, taken = centroids[classes], seeded[classes]
    free = active[classes] & ~taken
    mean = reduce(z.new_zeros(len(classes), width).index_add(0, labels, z), "sum")
    to_mean = (z * F.normalize(mean, dim=1)[labels]).sum(dim=1)
    closest = torch.einsum("nd,nkd->nk", z, points[labels])
    closest = closest.masked_fill(~taken[labels], -math.inf).amax(dim=1)
    out = z.norm(dim=1) == 0  # features of nothing but zeros have no direction
    for _ in range(num_centroids):
        is_first = ~taken.any(dim=1)[labels]
        score = torch.where(is_first, -to_mean, closest)
        score = score.masked_fill(out | ~free.any(dim=1)[labels], math.inf)
        found, features, picked = pick_lowest(score, z, labels, len(classes))
        slot = free.int().argmax(dim=1)
        points[found, slot[found]] = features[found]
        taken[found, slot[found]] = True
        free[found, slot[found]] = False
        out |= picked
        to_new = (z * features[labels]).sum(dim=1)
        closest = torch.where(found[labels], closest.maximum(to_new), closest)
    points = torch.where(taken[:, :, None], points, points[:, :1])
    centroids[classes], seeded[classes] = points, taken


def momentum_at(updates: Tensor, momentum: float, warm_start: bool) -> Tensor:
    """The share of the old position after `updates` updates: 0 at the first, a mean at first."""
    if not warm_start:
        return torch.full_like(updates, momentum, dtype=torch.float32)
    return (updates / (updates + 1.0)).clamp(max=momentum)


def moved(points: Tensor, sums: Tensor, counts: Tensor, kept: Tensor) -> Tensor:
    """Positions after one momentum update, of unit length.

    Args:
        points: (T, K, D) unit vectors.
        sums: (T, K, D) of the features assigned to each.
        counts: (T, K), how many these are; where none, the position stays as it is.
        kept: (T, K) share of the old position.

    Returns: (T, K, D).
    """
    towards = kept[..., None] * points + (1 - kept[..., None]) * F.normalize(sums, dim=2)
    # Opposite features may add up to nothing, which has no direction.
    moves = (counts > 0) & (towards.norm(dim=2) > 0)
    return torch.where(moves[..., None], F.normalize(towards, dim=2), points)
