"""Sub-centroids of features that come in batches, in one pass.

The first features of a class are clustered in balance (`dnc.assignment`); every later one joins the
nearest sub-centroid, which is the mean of what joined it. So memory does not grow with the data,
and with one sub-centroid per class it is exactly the mean of the normalised features.

Shapes: N samples, D width, C classes, K sub-centroids of a class, M features that a class starts
with.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dnc.assignment import assign
from dnc.centroids import seed
from dnc.checks import check_features, check_finite, check_labels
from dnc.processes import alone
from dnc.similarity import normalized, own_similarity
from shared_utils.errors import InputError

ROUNDS = 10  # of clustering what a class starts with
NONE = -(2**31)  # no label is this one


class CentroidFitter:
    """Takes batches of features and gives sub-centroids."""

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        num_centroids: int = 4,
        *,
        num_first: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start without samples; M = `num_first`, at least 8 for each sub-centroid."""
        self.num_classes, self.num_centroids = num_classes, num_centroids
        self.num_first = max(num_first, 8 * num_centroids)
        self.first = torch.zeros(num_classes, self.num_first, embed_dim, device=device)
        self.filled = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.started = torch.zeros(num_classes, dtype=torch.bool, device=device)
        shape = (num_classes, num_centroids)
        self.sums = torch.zeros(*shape, embed_dim, device=device)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            features: (N, D) float.
            labels: (N,) int64 in [0, C).

        Raises: InputError for shapes, labels or numbers that do not fit; nothing has changed then.
        """
        check_features(features, self.first.shape[2])
        check_labels(labels, len(features), self.num_classes, NONE)
        with alone():
            check_finite(features)
        z = normalized(features)
        order = labels.argsort(stable=True)
        z, labels = z[order], labels[order]
        counts = torch.bincount(labels, minlength=self.num_classes)
        turn = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels]
        place = self.filled[labels] + turn
        is_first = ~self.started[labels] & (place < self.num_first)
        self.first[labels[is_first], place[is_first]] = z[is_first].float()
        self.filled = torch.where(
            self.started, self.filled, (self.filled + counts).clamp(max=self.num_first)
        )
        self._start(~self.started & (self.filled == self.num_first))
        self._join(z[~is_first].float(), labels[~is_first])

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Tensor]:
        """What came of it.

        Returns: sub-centroids (C, K, D), unit vectors, and which of them are in use (C, K): all but
            the spare ones of classes with fewer than K samples, which repeat the class's first.
        Raises: InputError naming the first class that had no sample.
        """
        if not bool((self.filled > 0).all()):
            missing = int((self.filled == 0).int().argmax())
            raise InputError(
                "labels", f"no sample of class {missing}", "one at least", "remove the class"
            )
        self._start(~self.started)
        active = self.counts > 0
        points = torch.where(active[..., None], self.sums, self.sums[:, :1])
        return F.normalize(points, dim=2), active

    def _start(self, which: Tensor) -> None:
        """Cluster what these classes begin with."""
        classes = which.nonzero()[:, 0]
        if not len(classes):
            return
        filled = self.filled[classes]
        kept = torch.arange(self.num_first, device=classes.device) < filled[:, None]
        labels = torch.arange(len(classes), device=classes.device)[:, None].expand_as(kept)[kept]
        z = self.first[classes][kept]
        points = torch.zeros_like(self.sums[classes])
        taken = torch.zeros(points.shape[:2], dtype=torch.bool, device=z.device)
        places = torch.arange(self.num_centroids, device=z.device)
        active = places < filled[:, None]
        with alone():
            seed(points, taken, active, z, labels)
            for _ in range(ROUNDS):
                similarity = own_similarity(z, labels, points).masked_fill(~active[labels], -2.0)
                chosen = assign(similarity, labels, len(classes), is_partial=~active.all(dim=1))
                sums, counts = self._sums(z, labels, chosen, len(classes))
                has = counts > 0
                points = torch.where(has[..., None], F.normalize(sums, dim=2), points)
        # One that the last round left empty stays where it was, as a sample of itself.
        empty = active & (counts == 0)
        self.sums[classes] = torch.where(empty[..., None], points, sums)
        self.counts[classes] = counts + empty
        self.started |= which

    def _join(self, z: Tensor, labels: Tensor) -> None:
        """Add samples of started classes to the nearest of their class's sub-centroids."""
        if not len(z):
            return
        points = F.normalize(self.sums, dim=2)
        similarity = own_similarity(z, labels, points)
        chosen = similarity.masked_fill((self.counts == 0)[labels], -2.0).argmax(dim=1)
        sums, counts = self._sums(z, labels, chosen, self.num_classes)
        self.sums += sums
        self.counts += counts

    def _sums(
        self, z: Tensor, labels: Tensor, chosen: Tensor, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        flat = labels * self.num_centroids + chosen
        size = num_classes * self.num_centroids
        sums = z.new_zeros(size, z.shape[1]).index_add(0, flat, z)
        counts = torch.bincount(flat, minlength=size)
        return sums.unflatten(0, (num_classes, -1)), counts.view(num_classes, -1)
