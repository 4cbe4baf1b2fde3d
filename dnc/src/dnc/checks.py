"""What the head takes: ranges of its options, shapes, labels, finite numbers."""

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from dnc.assignment import Assignment
from dnc.processes import reduce
from shared_utils.errors import InputError, near_miss

# Name -> smallest, whether that is still allowed, first value that is not.
_RANGES: dict[str, tuple[float, bool, float]] = {
    "num_classes": (2, True, float("inf")),
    "embed_dim": (1, True, float("inf")),
    "num_centroids": (1, True, 2**15),
    "momentum": (0, True, 1),
    "temperature": (0, False, float("inf")),
    "memory_size": (0, True, float("inf")),
    "epsilon": (0, False, float("inf")),
    "num_iters": (1, True, float("inf")),
    "reseed_after": (0, True, float("inf")),
    "correct_only_after": (-1, True, float("inf")),
}
_FRACTIONS = ("momentum", "temperature", "epsilon")
_CHOICES: dict[str, tuple[str, ...]] = {
    "memory": ("queue", "batch", "bank"),
    "assignment": get_args(Assignment),
    "logit_norm": ("none", "standard", "affine"),
}


def check_head(options: Mapping[str, Any]) -> None:
    """Raises: InputError for the first option of `NearestCentroidHead` that is out of range."""
    for name, (least, is_allowed, end) in _RANGES.items():
        value = options[name]
        kind = float if name in _FRACTIONS else int
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            told = "a number" if kind is float else "a whole number"
            raise InputError(name, repr(value), told, "correct it")
        if not (least < value < end or (is_allowed and value == least)):
            expected = f"{least} or more" if is_allowed else f"more than {least}"
            expected += f" and less than {end}" * (end != float("inf"))
            raise InputError(name, value, expected, "correct it")
    for name, choices in _CHOICES.items():
        if options[name] not in choices:
            told = ", ".join(choices)
            raise InputError(name, options[name], told, near_miss(str(options[name]), choices))
    if options["memory"] == "bank" and options["memory_size"] == 0:
        raise InputError("memory_size", 0, "1 or more batches for a bank", "or use memory batch")


def check_features(features: Tensor, embed_dim: int) -> None:
    """Raises: InputError unless features are float, (N, D) or (N, D, H, W)."""
    shape = tuple(features.shape)
    if features.ndim not in (2, 4) or shape[1] != embed_dim:
        expected = f"(N, {embed_dim}) or (N, {embed_dim}, H, W)"
        raise InputError("features", f"shape {shape}", expected, "pool the encoder's output to it")
    if not features.is_floating_point():
        raise InputError("features", features.dtype, "a float type", "convert them")


def check_labels(labels: Tensor, num_samples: int, num_classes: int, ignore_index: int) -> None:
    """Raises: InputError for labels that do not fit the features or are out of range."""
    expected = (num_samples, num_classes) if labels.is_floating_point() else (num_samples,)
    if tuple(labels.shape) != expected:
        raise InputError(
            "labels",
            f"shape {tuple(labels.shape)}",
            f"{expected}, one for each feature vector",
            "give one label, or one row of class shares, to each",
        )
    if labels.is_floating_point() or not len(labels):
        return
    if labels.dtype != torch.int64:
        raise InputError("labels", labels.dtype, "torch.int64", "convert them with .long()")
    counted = labels[labels != ignore_index]
    if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < num_classes:
        wrong = counted.min() if counted.min() < 0 else counted.max()
        raise InputError(
            "labels",
            int(wrong),
            f"0 to {num_classes - 1}, or {ignore_index} to leave a sample out",
            "check num_classes and how the data set counts its classes",
        )


def check_map(labels: Tensor, features: Tensor) -> None:
    """Raises: InputError for a map of labels (N, H, W) that is not that of the features."""
    expected = (len(features), *features.shape[2:])
    if labels.is_floating_point() or labels.ndim == 1 or tuple(labels.shape) == expected:
        return
    raise InputError(
        "labels",
        f"shape {tuple(labels.shape)}",
        f"{expected}, one for each feature vector",
        "resize them to the features' map, or the other way round",
    )


def check_indices(indices: Tensor | None, features: Tensor) -> Tensor:
    """The place in the data set of each feature vector, -1 where unknown.

    Args:
        indices: one for each vector (N, D), or for each picture of maps (N, D, H, W).
        features: what they belong to.

    Raises: InputError unless there are as many.
    """
    count, *size = len(features), *features.shape[2:]
    if indices is None:
        indices = torch.full((count,), -1, device=features.device)
    if tuple(indices.shape) != (count,):
        raise InputError(
            "indices", f"shape {tuple(indices.shape)}", f"({count},)", "give one for each sample"
        )
    return indices.repeat_interleave(math.prod(size)) if size else indices


def check_finite(features: Tensor) -> None:
    """Raises: InputError in all processes where a feature vector of one is NaN or infinite.

    One that stopped alone would leave the others waiting for it.
    """
    bad = (~torch.isfinite(features)).any(dim=1).sum()
    counts = reduce(torch.stack([bad, torch.full_like(bad, len(features))]), "sum")
    if bool(counts[0]):
        raise InputError(
            "features",
            f"NaN or infinity in {int(counts[0])} of {int(counts[1])} vectors",
            "finite numbers",
            "lower the learning rate, or run in float32",
        )
