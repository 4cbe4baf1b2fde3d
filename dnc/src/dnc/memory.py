"""Features of earlier batches, which are clustered together with those of the present one.

Paper: Sec. 3.2, external memory: where a batch has fewer samples than there are classes it cannot
be clustered alone.  Differs from the paper: its released code collects whole batches, clusters once
1000 of them are there and forgets them (`Bank`); `Queue` keeps the latest features of each class
and takes part in every update. Both keep the data set index of every feature.

With several processes each has a memory of its own.

Shapes: N samples, D width, C classes, M places of a class.
"""

from typing import Any

import torch
from torch import Tensor, nn

from shared_utils.errors import InputError


class Queue(nn.Module):
    """The last M features of each class.

    Attributes:
        features: (C, M, D) float16, unit vectors to rounding.
        indices: (C, M) int64 data set indices, -1 where unknown.
        pushed: (C,) int64, how many each class has received; the next one goes to `pushed` mod M.
    """

    features: Tensor
    indices: Tensor
    pushed: Tensor

    def __init__(self, num_classes: int, embed_dim: int, size: int) -> None:
        """Start empty, with M = `size`."""
        super().__init__()
        self.size = size
        half = torch.zeros(num_classes, size, embed_dim, dtype=torch.float16)
        self.register_buffer("features", half)
        self.register_buffer("indices", torch.full((num_classes, size), -1))
        self.register_buffer("pushed", torch.zeros(num_classes, dtype=torch.int64))

    def read(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of some classes.

        Args:
            classes: (T,) int64.

        Returns: features (n, D) float32, and their labels (n,).
        """
        filled = self.pushed[classes].clamp(max=self.size)
        kept = torch.arange(self.size, device=classes.device) < filled[:, None]  # (T, M)
        labels = classes[:, None].expand_as(kept)[kept]
        return self.features[classes][kept].float(), labels

    def push(self, features: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Take in (N, D) unit vectors; of more than M of one class the last M stay."""
        order = labels.argsort(stable=True)
        labels, features, indices = labels[order], features[order], indices[order]
        counts = torch.bincount(labels, minlength=len(self.pushed))
        starts = counts.cumsum(0) - counts
        turn = torch.arange(len(labels), device=labels.device) - starts[labels]
        keep = turn >= counts[labels] - self.size
        place = (self.pushed[labels] + turn)[keep] % self.size
        self.features[labels[keep], place] = features[keep].to(self.features.dtype)
        self.indices[labels[keep], place] = indices[keep]
        self.pushed += counts


class Bank(nn.Module):
    """Whole batches, until there are enough: the released code's schedule, for reproduction.

    Attributes:
        features: (N, D) float32, of all batches so far.
        labels: (N,) int64.
        indices: (N,) int64, -1 where unknown.
        num_batches: how many batches that is, () int64.
    """

    features: Tensor
    labels: Tensor
    indices: Tensor
    num_batches: Tensor

    def __init__(self, embed_dim: int, size: int) -> None:
        """Start empty; full with `size` batches."""
        super().__init__()
        self.size = size
        self.register_buffer("features", torch.zeros(0, embed_dim))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("indices", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    @property
    def is_full(self) -> bool:
        """Whether it is time to cluster."""
        return int(self.num_batches) >= self.size

    def push(self, features: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Take in one batch."""
        self.features = torch.cat([self.features, features.float()])
        self.labels = torch.cat([self.labels, labels])
        self.indices = torch.cat([self.indices, indices])
        self.num_batches += 1

    def take(self) -> tuple[Tensor, Tensor]:
        """Features and labels of everything; the bank is empty then."""
        found = self.features, self.labels
        for name in ("features", "labels", "indices"):  # a slice of none would keep all in memory
            held = getattr(self, name)
            setattr(self, name, held.new_empty(0, *held.shape[1:]))
        self.num_batches.zero_()
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the size of what is loaded: it grows with every batch."""
        for name in ("features", "labels", "indices"):
            loaded = state_dict.get(prefix + name)
            own = getattr(self, name)
            if loaded is None:
                continue
            if loaded.shape[1:] != own.shape[1:]:
                raise InputError(
                    f"{prefix}{name}",
                    f"width {tuple(loaded.shape[1:])}",
                    f"{tuple(own.shape[1:])}",
                    "load it into a head of that width",
                )
            setattr(self, name, own.new_zeros(loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
