"""Anchors fitted to a data set: k-means, then random changes that are kept where they fit better.

Sizes are (width, height) in pixels of the letterboxed image, never normalised: YOLOP scaled
normalised sizes by (height, width) and got anchors that are tall for cars that are wide.

The released YOLOPv2 has COCO's anchors unchanged, whatever its text says.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_utils.errors import InputError
from yolop_mtl.assignment import MAX_RATIO

Sizes = NDArray[np.float64]  # (n, 2)

CHANGED = 0.2  # share of the sides that a random change concerns
CHANGE = 0.1  # its deviation, as a share of the side


class AnchorFit(NamedTuple):
    """How well anchors fit boxes.

    Attributes:
        recall: share of boxes that some anchor matches.
        fitness: mean over boxes of the best anchor's fit, min over both sides of the smaller ratio;
            0 where none matches, 1 for a perfect anchor.
        per_box: anchors that match a box, on average.
    """

    recall: float
    fitness: float
    per_box: float


def letterboxed(sizes: Sizes, images: Sizes, img_size: tuple[int, int]) -> Sizes:
    """Sizes of boxes in the network's input.

    Args:
        sizes: (n, 2) width and height in pixels of their images.
        images: (n, 2) width and height of the image of each box.
        img_size: (H, W) of the input.
    """
    limits = np.array(img_size[::-1], dtype=np.float64)
    ratio: Sizes = (limits / images).min(1, keepdims=True)
    return sizes * ratio


def measure_anchors(sizes: Sizes, anchors: Sizes, *, max_ratio: float = MAX_RATIO) -> AnchorFit:
    """How well anchors (k, 2) fit boxes (n, 2), both in pixels of the input."""
    ratio = sizes[:, None] / anchors
    fit = np.minimum(ratio, 1 / ratio).min(2)  # (n, k)
    matches = fit > 1 / max_ratio
    best = fit.max(1)
    return AnchorFit(
        recall=float(matches.any(1).mean()),
        fitness=float((best * (best > 1 / max_ratio)).mean()),
        per_box=float(matches.sum(1).mean()),
    )


def fit_anchors(
    sizes: Sizes,
    *,
    num_scales: int = 3,
    num_anchors: int = 3,
    num_steps: int = 1000,
    min_size: float = 2.0,
    seed: int = 0,
) -> list[list[list[float]]]:
    """Anchors per scale, small to large by area, in pixels of the input.

    Args:
        sizes: (n, 2) width and height in pixels of the input (see `letterboxed`).
        num_scales: scales of the network.
        num_anchors: anchors of a scale.
        num_steps: random changes to try after k-means.
        min_size: boxes with a shorter side are left out, in pixels.
        seed: of k-means and of the changes.

    Raises: InputError where there are fewer boxes than anchors.
    """
    usable = sizes[(sizes >= min_size).all(1)]
    count = num_scales * num_anchors
    if len(np.unique(usable, axis=0)) < count:
        got = f"{len(usable)} of {len(sizes)} with sides of {min_size:g} pixels or more"
        do = "give more images, or a larger data.img_size"
        raise InputError("boxes", got, f"{count} different sizes or more", do)
    generator = np.random.default_rng(seed)
    anchors = _k_means(usable, count, generator)
    best = measure_anchors(usable, anchors).fitness
    for _ in range(num_steps):
        change = generator.normal(1, CHANGE, anchors.shape)
        changes = generator.random(anchors.shape) < CHANGED
        trial = (anchors * np.where(changes, change.clip(0.3, 3), 1)).clip(min=min_size)
        fitness = measure_anchors(usable, trial).fitness
        if fitness > best:
            anchors, best = trial, fitness
    ordered = anchors[anchors.prod(1).argsort()].reshape(num_scales, num_anchors, 2)
    rounded: list[list[list[float]]] = ordered.round(1).tolist()
    return rounded


def _k_means(sizes: Sizes, count: int, generator: np.random.Generator, rounds: int = 30) -> Sizes:
    """Centres of sizes in units of their deviation, started as k-means++ does."""
    scale = sizes.std(0).clip(min=1e-6)
    points = sizes / scale
    centres = points[generator.integers(len(points), size=1)]
    while len(centres) < count:
        far = _squares(points, centres).min(1)
        chosen = generator.choice(len(points), p=far / far.sum())
        centres = np.concatenate([centres, points[chosen : chosen + 1]])
    for _ in range(rounds):
        nearest = _squares(points, centres).argmin(1)
        sums = np.stack([np.bincount(nearest, points[:, axis], count) for axis in (0, 1)], 1)
        members = np.bincount(nearest, minlength=count)[:, None]
        centres = np.where(members > 0, sums / members.clip(min=1), centres)
    result: Sizes = centres * scale
    return result


def _squares(points: Sizes, centres: Sizes) -> Sizes:
    squares: Sizes = ((points[:, None] - centres) ** 2).sum(2)
    return squares
