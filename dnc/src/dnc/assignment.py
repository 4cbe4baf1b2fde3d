"""Balanced assignment of samples to the sub-centroids of their own class.

Paper: Sec. 3.1, clustering within a class as entropic optimal transport, solved by Sinkhorn-Knopp.
All classes are solved at once, in the log domain: the plan has a column per sub-centroid of the
sample's own class, so its size does not depend on the number of classes, and the normalisation over
a class's samples is a sum over rows of one label.

Differs from the paper: its released code does not solve this problem (it assigns to the farthest
sub-centroid and draws the assignment at random), and its ancestor draws from a softmax of the
plan's entries, after which all sub-centroids of a class end in one place. Here the plan's largest
entry decides; the ancestor's draw is there as `gumbel`, for comparison.

Shapes: N samples of this process, C classes, K sub-centroids of a class.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from dnc.processes import reduce

Assignment = Literal["sinkhorn", "gumbel"]


@torch.no_grad()
def sinkhorn(
    similarity: Tensor,
    labels: Tensor,
    num_classes: int,
    epsilon: float = 0.05,
    num_iters: int = 3,
) -> Tensor:
    """The transport plan between each class's samples and its sub-centroids.  Paper: Sec. 3.1.

    It maximises the mean similarity plus `epsilon` times its entropy, with mass 1 for each sample
    and N_c / K for each sub-centroid of a class with N_c samples. Samples are normalised last, so
    after finitely many rounds their mass is exact and that of sub-centroids approximate. With
    several processes the samples of all count, and each process has the rows of its own; every
    process has to call it.

    Args:
        similarity: (N, K) float of any precision, to the sub-centroids of the sample's own class.
            Solved in float32, or float64 where it is float64; left unchanged.
        labels: (N,) int64 in [0, C).
        num_classes: C.
        epsilon: weight of the entropy, more than 0, on the scale of the similarities.
        num_iters: rounds, 1 or more.

    Returns: (N, K), rows that sum to 1.
    """
    dtype = torch.float64 if similarity.dtype == torch.float64 else torch.float32
    # Of a half-precision tensor exp() would overflow. A row per sub-centroid from here on: sums
    # over long rows take a tenth of the time on a CPU.
    log_plan = (similarity.to(dtype) / epsilon).t().contiguous()  # (K, N)
    counts = reduce(torch.bincount(labels, minlength=num_classes), "sum")
    log_mass = counts.to(dtype).log() - math.log(similarity.shape[1])  # (C,)
    surplus = _logsumexp_by_label(log_plan, labels, num_classes) - log_mass  # (K, C)
    for left in reversed(range(num_iters)):
        log_plan = (log_plan - surplus.index_select(1, labels)).log_softmax(dim=0)
        if left:
            # No largest entry has to be taken out from here on: with masses N_c / K of the
            # sub-centroids no sample had more than N_c, so that normalised they have 1 / K or more.
            surplus = _sum_by_label(log_plan.exp(), labels, num_classes).log() - log_mass
    # exp() of it, with sums that are exact to rounding
    return log_plan.softmax(dim=0).t().contiguous()


def _logsumexp_by_label(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(K, N) -> (K, C) over the samples of each class in all processes; -inf without any."""
    top = values.new_full((len(values), num_classes), -math.inf)
    top = reduce(top.scatter_reduce(1, labels.expand_as(values), values, "amax"), "max")
    total = _sum_by_label((values - top.index_select(1, labels)).exp(), labels, num_classes)
    return top + total.log()


def _sum_by_label(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(K, N) -> (K, C) over the samples of each class in all processes."""
    total = values.new_zeros(len(values), num_classes)
    return reduce(total.scatter_add(1, labels.expand_as(values), values), "sum")


@torch.no_grad()
def assign(
    similarity: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    epsilon: float = 0.05,
    num_iters: int = 3,
    how: Assignment = "sinkhorn",
    is_partial: Tensor | None = None,
) -> Tensor:
    """The sub-centroid of each sample: the largest entry of its row of the plan.

    A class with fewer samples than sub-centroids, or with some that are not in use, cannot fill
    them evenly (a single sample's row is uniform whatever the similarities are): its samples go to
    the nearest one.

    Args:
        similarity: (N, K), as for `sinkhorn`.
        labels: (N,) int64.
        num_classes: C.
        epsilon: as for `sinkhorn`.
        num_iters: as for `sinkhorn`.
        how: `sinkhorn`; or `gumbel`, the ancestor's draw from a softmax over the plan's entries,
            which takes even a certain sample's own sub-centroid with probability e / (e + K - 1)
            only.
        is_partial: (C,) bool, classes with sub-centroids that are not in use; their similarities
            are to be less than -1.

    Returns: (N,) int64 in [0, K).
    """
    plan = sinkhorn(similarity, labels, num_classes, epsilon, num_iters)
    if how == "gumbel":
        noise = -torch.empty_like(plan).exponential_().log()
        drawn = plan + noise
        if is_partial is not None:
            is_unused = is_partial[labels][:, None] & (similarity < -1)
            drawn = drawn.masked_fill(is_unused, -math.inf)
        return drawn.argmax(dim=1)
    counts = reduce(torch.bincount(labels, minlength=num_classes), "sum")
    takes_nearest = counts < similarity.shape[1]
    if is_partial is not None:
        takes_nearest |= is_partial
    return torch.where(takes_nearest[labels], similarity.argmax(dim=1), plan.argmax(dim=1))
