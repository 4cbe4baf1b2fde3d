"""Cosines to sub-centroids: the largest of each class, and those of a sample's own class.

Shapes: N samples, D width, C classes, K sub-centroids of a class.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Cosines held at once. More is not faster on any device; all of them are N C K numbers.
CHUNK = 2**24
WIDTH = 192  # columns of a product, a multiple of those that processors handle at once


def normalized(features: Tensor) -> Tensor:
    """Unit vectors (N, D), in float32, or float64 where the features are float64."""
    exact = features if features.dtype == torch.float64 else features.float()
    return F.normalize(exact, dim=1)


def max_similarity(z: Tensor, centroids: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Score of each class: the cosine to its nearest sub-centroid.  Paper: Sec. 3.1.

    The sub-centroids are constants. For the backward pass only the number of the nearest one is
    kept, N C small integers, not N C K cosines; where several are equally near the first counts.

    Args:
        z: (N, D) unit vectors, float32 or float64.
        centroids: (C, K, D) unit vectors of the same type; not to be changed before backward.
        chunk: cosines to hold at once.

    Returns: cosines (N, C), and the number of the nearest sub-centroid (N, C), uint8 or int16.
    """
    with torch.autocast(z.device.type, enabled=False):
        found: tuple[Tensor, Tensor] = _MaxSimilarity.apply(z, centroids, chunk)  # type: ignore[no-untyped-call]
    return found


def all_similarity(z: Tensor, centroids: Tensor) -> Tensor:
    """Cosines (N, C, K), rounded as in `max_similarity`; not for training, and not in parts."""
    with torch.autocast(z.device.type, enabled=False):
        found: Tensor = _cosines(z, centroids.flatten(0, 1)).unflatten(1, centroids.shape[:2])
    return found


def own_similarity(z: Tensor, labels: Tensor, centroids: Tensor, chunk: int = CHUNK) -> Tensor:
    """Cosines to all sub-centroids of each sample's own class.

    Args:
        z: (N, D) unit vectors.
        labels: (N,) int64 in [0, C).
        centroids: (C, K, D).
        chunk: numbers of gathered sub-centroids to hold at once.

    Returns: (N, K).
    """
    step = max(1, chunk // centroids[0].numel())
    with torch.autocast(z.device.type, enabled=False):
        parts = [
            torch.einsum("nd,nkd->nk", some, centroids[own])
            for some, own in zip(z.split(step), labels.split(step), strict=True)
        ]
    return torch.cat(parts) if parts else z.new_zeros(0, centroids.shape[1])


class _MaxSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, centroids: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        num_classes, num_centroids, _ = centroids.shape
        cosines = z.new_empty(len(z), num_classes)
        small = torch.uint8 if num_centroids <= 256 else torch.int16
        nearest = torch.empty(len(z), num_classes, dtype=small, device=z.device)
        for part in _classes(len(z), num_classes, num_centroids, chunk):
            found = _cosines(z, centroids[part].flatten(0, 1)).unflatten(1, (-1, num_centroids))
            values, places = found.max(dim=2)
            cosines[:, part], nearest[:, part] = values, places.to(small)
        ctx.save_for_backward(centroids, nearest)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(nearest)
        return cosines, nearest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        centroids, nearest = ctx.saved_tensors
        num_classes, num_centroids, width = centroids.shape
        grad_z = grad.new_zeros(len(grad), width)
        with torch.autocast(grad.device.type, enabled=False):
            for part in _classes(len(grad), num_classes, num_centroids, ctx.chunk):
                weights = grad.new_zeros(len(grad), part.stop - part.start, num_centroids)
                weights.scatter_(2, nearest[:, part, None].long(), grad[:, part, None])
                grad_z.addmm_(weights.flatten(1), centroids[part].flatten(0, 1))
        return grad_z, None, None


def _cosines(z: Tensor, points: Tensor) -> Tensor:
    """(N, D) and (M, D) -> (N, M).

    Scores are not to change when classes come and go. How a product is rounded depends on its size
    and on how threads share it, so all are of one width.
    """
    *whole, last = points.split(WIDTH)
    padded = F.pad(last, (0, 0, 0, WIDTH - len(last)))
    parts = [z @ block.T for block in (*whole, padded)]
    return torch.cat(parts, dim=1)[:, : len(points)]


def _classes(num_samples: int, num_classes: int, num_centroids: int, chunk: int) -> list[slice]:
    step = max(1, chunk // max(1, num_samples * num_centroids))
    whole = WIDTH // math.gcd(WIDTH, num_centroids)  # classes that fill products to the end
    if step > whole:
        step -= step % whole
    return [slice(start, min(start + step, num_classes)) for start in range(0, num_classes, step)]
