"""The classifier: the class of the nearest sub-centroid, and nothing to train in it.

Paper: "Visual Recognition with Deep Nearest Centroids", W. Wang, C. Han, T. Zhou, D. Liu, ICLR
2023, Sec. 3. Written from the method; no code of the release.

Shapes: N samples (or pixels), D width of the embedding, C classes, K sub-centroids of a class.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnc import centroids as points_of
from dnc.assignment import Assignment, assign
from dnc.checks import (
    check_features,
    check_finite,
    check_head,
    check_indices,
    check_labels,
    check_map,
)
from dnc.memory import Bank, Queue
from dnc.processes import reduce, world_size
from dnc.samples import Samples, joined, with_class
from dnc.similarity import all_similarity, max_similarity, normalized, own_similarity
from shared_utils.errors import InputError

Memory = Literal["queue", "batch", "bank"]
LogitNorm = Literal["none", "standard", "affine"]


class Scores(NamedTuple):
    """What a prediction rests on: cosines (N, C) and the nearest sub-centroid's number (N, C)."""

    cosines: Tensor
    nearest: Tensor


class NearestCentroidHead(nn.Module):
    """Logits are cosines to the nearest sub-centroid of each class.  Paper: Sec. 3.

    Sub-centroids are buffers: statistics of training features, not weights. A training step is
    `loss`, backward, the optimiser's step and then `update`, which clusters the samples of the
    losses before it and moves the sub-centroids; so nothing that backward needs is changed.

    With several processes `update` and, as long as a class has no sub-centroids, `loss` in training
    mode are to be called by all of them. Sums and counts are added up, so all have the same
    sub-centroids; the memory of each is its own.

    Differs from the paper: cosines are divided by a fixed temperature, since a softmax of bare
    cosines cannot become certain; with `logit_norm="affine"`, the released code's trained
    normalisation over classes, the answer is no longer that of the nearest sub-centroid.

    Attributes:
        centroids: (C, K, D) float32, unit vectors.
        active: (C, K) bool, the places in use; see `limit_places`.
        seeded: (C, K) bool; a place without a sample of its own holds a copy of its class's first,
            which changes no score.
        updates: (C, K) int64, how often each moved.
        idle: (C, K) int64, how many updates of its class in a row brought it nothing.
        usage: (C, K) int64, samples assigned since the last `reset_usage`.
    """

    centroids: Tensor
    active: Tensor
    seeded: Tensor
    updates: Tensor
    idle: Tensor
    usage: Tensor

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        num_centroids: int = 4,
        *,
        momentum: float = 0.999,
        temperature: float = 0.1,
        memory: Memory = "queue",
        memory_size: int = 64,
        epsilon: float = 0.05,
        num_iters: int = 3,
        warm_start: bool = True,
        assignment: Assignment = "sinkhorn",
        reseed_after: int = 100,
        correct_only_after: int = -1,
        logit_norm: LogitNorm = "none",
        ignore_index: int = -100,
    ) -> None:
        """Build with random sub-centroids; the first samples of a class take their place.

        Args:
            num_classes: C, 2 or more.
            embed_dim: D.
            num_centroids: K.
            momentum: share of the old position in an update, in [0, 1).
            temperature: cosines are divided by it, more than 0.
            memory: what is clustered with a batch: the last features of each class (`queue`),
                nothing (`batch`), or nothing until `memory_size` batches are there (`bank`).
            memory_size: features per class (`queue`), shared by the processes there are now, or
                batches (`bank`); 0 means `batch`.
            epsilon: of `sinkhorn`.
            num_iters: of `sinkhorn`.
            warm_start: the first update replaces the position, the following are a running mean
                until `momentum` is reached.
            assignment: `sinkhorn`, or the ancestors' `gumbel`, which makes sub-centroids collapse.
            reseed_after: a sub-centroid that got nothing in so many updates of its class is put
                onto the sample least similar to any of them; 0 switches this off.
            correct_only_after: once a sub-centroid has moved so often only samples that are
                classified correctly count; -1 for never.
            logit_norm: `standard` normalises each sample's cosines over the classes instead of
                the temperature, `affine` with weights that train.
            ignore_index: label of samples that are left out.

        Raises: InputError where a value is out of its range.
        """
        super().__init__()
        if memory_size == 0 and memory == "queue":
            memory = "batch"
        check_head(locals())
        self.num_classes, self.embed_dim, self.num_centroids = num_classes, embed_dim, num_centroids
        self.momentum, self.temperature, self.warm_start = momentum, temperature, warm_start
        self.epsilon, self.num_iters, self.assignment = epsilon, num_iters, assignment
        self.reseed_after, self.correct_only_after = reseed_after, correct_only_after
        self.logit_norm, self.ignore_index, self.memory_kind = logit_norm, ignore_index, memory
        shape = (num_classes, num_centroids)
        start = F.normalize(torch.randn(*shape, embed_dim), dim=2)
        self.register_buffer("centroids", start)
        self.register_buffer("active", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("seeded", torch.zeros(shape, dtype=torch.bool))
        for name in ("updates", "idle", "usage"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
        self.memory: Queue | Bank | None = None
        if memory == "queue":
            self.memory = Queue(num_classes, embed_dim, -(-memory_size // world_size()))
        elif memory == "bank":
            self.memory = Bank(embed_dim, memory_size)
        self.norm = nn.LayerNorm(num_classes) if logit_norm == "affine" else None
        self._pending: list[Samples] = []

    @property
    def is_faithful(self) -> bool:
        """Whether logits rise with the cosines, so that the nearest sub-centroid decides."""
        return self.logit_norm != "affine"

    def forward(self, features: Tensor) -> Tensor:
        """Logits over classes; changes nothing.

        Args:
            features: (N, D) or (N, D, H, W) float of any precision and length.

        Returns: (N, C) or (N, C, H, W), float32, or float64 where the features are float64.
        Raises: InputError for another shape.
        """
        rows = self._rows(features)
        logits = self.logits_of(self.scores(rows).cosines)
        return logits if features.ndim == 2 else _as_map(logits, features)

    def scores(self, features: Tensor) -> Scores:
        """Cosines to the nearest sub-centroid of each class and its number, for (N, D)."""
        z = normalized(self._rows(features))
        # Of a copy, where backward is to come: an update may come before it.
        return Scores(*max_similarity(z, self.centroids.to(z.dtype, copy=z.requires_grad)))

    def cosines(self, features: Tensor) -> Tensor:
        """Cosines (N, C, K) of (N, D) to every sub-centroid; -inf to those not in use."""
        z = normalized(self._rows(features))
        found = all_similarity(z, self.centroids.to(z.dtype))
        return found.masked_fill(~self.active, -torch.inf)

    def loss(
        self, features: Tensor, labels: Tensor, indices: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy of the logits; in training mode the samples are kept for `update`.

        Samples of a class that is seen for the first time seed its sub-centroids before anything
        is scored. In eval mode and without gradients nothing is seeded or kept.

        Args:
            features: (N, D) or (N, D, H, W).
            labels: (N,) or (N, H, W) int64 in [0, C) or `ignore_index`; or soft, (N, C) float, of
                which samples with more than half of one class take part in the update.
            indices: (N,) int64, places of the samples in their data set; of maps, of each picture.

        Returns: `loss_dnc`, a scalar: the mean over what is not ignored; 0 where all is.
        Raises: InputError for shapes that do not fit or labels out of range.
        """
        rows = self._rows(features)
        check_map(labels, features)
        targets = labels if labels.is_floating_point() else labels.flatten()
        check_labels(targets, len(rows), self.num_classes, self.ignore_index)
        z = normalized(rows)
        kept, has_class = None, None
        if self.training and torch.is_grad_enabled():
            places = check_indices(indices, features)
            kept, has_class = with_class(z.detach(), targets, places, self.ignore_index)
        points = self.centroids
        if kept is not None and self._seed(kept):
            points = points.clone()  # the next loss may seed more before backward comes to this one
        cosines, _ = max_similarity(z, points.to(z.dtype))
        logits = self.logits_of(cosines)
        if kept is not None:
            self._keep(kept, logits[has_class] if self._is_selective else None)
        if targets.is_floating_point():
            loss = F.cross_entropy(logits, targets.to(logits.dtype), reduction="sum")
            return {"loss_dnc": loss / max(1, len(targets))}
        loss = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="sum")
        return {"loss_dnc": loss / (targets != self.ignore_index).sum().clamp(min=1)}

    @torch.no_grad()
    def observe(self, features: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Seed and keep samples as `loss` in training mode does; what is scored is another matter.

        For networks that make logits with `forward`, and perhaps of other features (dropout). Of
        maps only what is not ignored is copied. Arguments and errors: those of `loss`, hard labels.
        """
        check_features(features, self.embed_dim)
        check_map(labels, features)
        check_labels(labels.flatten(), labels.numel(), self.num_classes, self.ignore_index)
        if not self.training:
            return
        is_own = labels != self.ignore_index
        places = check_indices(indices, features)[is_own.flatten()]
        z = normalized(features.movedim(1, -1)[is_own])
        kept = Samples(z, labels[is_own], places)
        self._seed(kept)
        self._keep(kept, self(z) if self._is_selective else None)

    @torch.no_grad()
    def update(self) -> None:
        """Cluster the samples of the losses since the last update and move the sub-centroids.

        Every process has to call it, with samples or without; nothing happens where none has any.

        Raises: InputError where features are NaN or infinite; nothing has changed then.
        """
        z, labels, indices = joined(self._pending, self.centroids)
        self.drop_pending()
        check_finite(z)
        counts = reduce(torch.bincount(labels, minlength=self.num_classes), "sum")
        if not bool(counts.any()):
            return
        with torch.autocast(z.device.type, enabled=False):
            if isinstance(self.memory, Bank):
                self.memory.push(z, labels, indices)
                if self.memory.is_full:
                    self._cluster(*self.memory.take())
            elif isinstance(self.memory, Queue):
                old, old_labels = self.memory.read(counts.nonzero()[:, 0])
                self._cluster(torch.cat([old, z]), torch.cat([old_labels, labels]))
                self.memory.push(z, labels, indices)
            else:
                self._cluster(z, labels)

    @torch.no_grad()
    def limit_places(self, counts: Tensor) -> None:
        """Leave as many sub-centroids to a class as it has samples in the whole training set.

        Args:
            counts: (C,) int64, samples of each class.

        Raises: InputError naming the first class without any.
        """
        if tuple(counts.shape) != (self.num_classes,):
            raise InputError(
                "counts", tuple(counts.shape), f"({self.num_classes},)", "count each class"
            )
        if not bool((counts > 0).all()):
            missing = int((counts == 0).int().argmax())
            raise InputError(
                "labels",
                f"no sample of class {missing}",
                "at least one of each",
                "remove the class",
            )
        places = torch.arange(self.num_centroids, device=counts.device)
        self.active.copy_(places < counts[:, None])
        self.seeded &= self.active
        spare = self.seeded[:, :1] & ~self.seeded
        self.centroids.copy_(torch.where(spare[..., None], self.centroids[:, :1], self.centroids))

    def drop_pending(self) -> None:
        """Forget the samples of the losses since the last update."""
        self._pending.clear()

    def reset_usage(self) -> None:
        """Count assignments from zero."""
        self.usage.zero_()

    def _cluster(self, z: Tensor, labels: Tensor) -> None:
        """One assignment and one momentum update of the classes that have samples anywhere."""
        counts = reduce(torch.bincount(labels, minlength=self.num_classes), "sum")
        classes = counts.nonzero()[:, 0]  # (T,), the same in all processes
        compact = torch.full_like(counts, -1)
        compact[classes] = torch.arange(len(classes), device=classes.device)
        labels, counts = compact[labels], counts[classes]
        points, seeded = self.centroids[classes], self.seeded[classes]
        similarity = own_similarity(z, labels, points)
        masked = similarity.masked_fill(~seeded[labels], -2.0)
        chosen = assign(
            masked,
            labels,
            len(classes),
            epsilon=self.epsilon,
            num_iters=self.num_iters,
            how=self.assignment,
            is_partial=~seeded.all(dim=1),
        )
        flat = labels * self.num_centroids + chosen
        size = len(classes) * self.num_centroids
        used = reduce(torch.bincount(flat, minlength=size), "sum").view(len(classes), -1)
        sums = z.new_zeros(size, self.embed_dim).index_add(0, flat, z)
        sums = reduce(sums, "sum").view_as(points)
        kept = points_of.momentum_at(self.updates[classes], self.momentum, self.warm_start)
        points = points_of.moved(points, sums, used, kept)
        updates = self.updates[classes] + (used > 0)
        can_fill = (counts >= self.num_centroids)[:, None] & seeded
        idle = torch.where(used > 0, 0, self.idle[classes] + can_fill)
        if self.reseed_after:
            dead = idle >= self.reseed_after
            self._reseed(points, dead, z, labels, masked.amax(dim=1))
            slot = dead.int().argmax(dim=1, keepdim=True)
            first = torch.zeros_like(dead).scatter(1, slot, dead.any(dim=1, keepdim=True))
            updates, idle = updates.masked_fill(first, 0), idle.masked_fill(first, 0)
        # A place without a sample of its own follows the first, which it stands for.
        points = torch.where(seeded[..., None], points, points[:, :1])
        self.centroids[classes] = points
        self.updates[classes], self.idle[classes] = updates, idle
        self.usage[classes] += used

    def _reseed(
        self, points: Tensor, dead: Tensor, z: Tensor, labels: Tensor, closest: Tensor
    ) -> None:
        """Put the first dead sub-centroid of each class onto its least similar sample; in place."""
        if not bool(dead.any()):
            return
        score = closest.masked_fill(~dead.any(dim=1)[labels], torch.inf)
        found, features, _ = points_of.pick_lowest(score, z, labels, len(points))
        # Of a half-precision memory the length is 1 to rounding only.
        points[found, dead.int().argmax(dim=1)[found]] = F.normalize(features[found], dim=1)

    def _apply(self, *args: Any, **kwargs: Any) -> "NearestCentroidHead":
        """Move to a device, but stay in float32: `.half()` and the like are for weights."""
        exact = self.centroids
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.centroids.dtype != torch.float32:
            self.centroids = exact.to(self.centroids.device)
        return self

    def _rows(self, features: Tensor) -> Tensor:
        """(N, D) or (N, D, H, W) -> (N, D) or (N H W, D)."""
        check_features(features, self.embed_dim)
        return features if features.ndim == 2 else features.movedim(1, -1).flatten(0, 2)

    def logits_of(self, cosines: Tensor) -> Tensor:
        """Logits (N, C) of the cosines (N, C) to the nearest sub-centroid of each class."""
        if self.logit_norm == "none":
            return cosines / self.temperature
        if self.norm is None:
            return F.layer_norm(cosines, (self.num_classes,))
        with torch.autocast(cosines.device.type, enabled=False):
            logits: Tensor = self.norm(cosines)
        return logits

    @property
    def _is_selective(self) -> bool:
        """Whether only samples that are classified correctly count by now."""
        return 0 <= self.correct_only_after <= int(self.updates.max())

    def _seed(self, kept: Samples) -> bool:
        """Seed classes that have no sub-centroids yet; whether there were any such classes."""
        if not bool((self.active & ~self.seeded).any()):
            return False
        points_of.seed(self.centroids, self.seeded, self.active, kept.z.float(), kept.labels)
        return True

    def _keep(self, kept: Samples, logits: Tensor | None) -> None:
        """Let samples wait for `update`; of logits those that are right alone."""
        if logits is not None:
            is_right = logits.argmax(dim=1) == kept.labels
            kept = Samples(*(part[is_right] for part in kept))
        self._pending.append(kept)


def _as_map(logits: Tensor, features: Tensor) -> Tensor:
    """(N H W, C) -> (N, C, H, W)."""
    n, _, h, w = features.shape
    found: Tensor = logits.unflatten(0, (n, h, w)).movedim(-1, 1)
    return found
