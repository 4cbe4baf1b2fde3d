"""The learned classifiers that the nonparametric one is compared with, under the same calls."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnc.checks import check_features, check_labels
from dnc.classifier import NearestCentroidHead
from dnc.config import ModelConfig
from shared_utils.errors import InputError

IGNORED = -100


class SoftmaxHead(nn.Module):
    """A linear layer and cross-entropy."""

    is_faithful = False  # its answer is no nearest anything

    def __init__(self, num_classes: int, embed_dim: int) -> None:
        """Build with timm's and torchvision's usual start."""
        super().__init__()
        self.num_classes, self.embed_dim = num_classes, embed_dim
        self.linear = nn.Linear(embed_dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> logits (N, C).  Raises: InputError for another shape."""
        check_features(features, self.embed_dim)
        logits: Tensor = self.linear(features.to(self.linear.weight.dtype))  # of bf16 encoders too
        return logits

    def loss(
        self, features: Tensor, labels: Tensor, indices: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`loss_ce`, for (N,) or soft (N, C) labels; `indices` are not used.

        Raises: InputError for shapes that do not fit or labels out of range.
        """
        logits = self(features).float()
        check_labels(labels, len(features), self.num_classes, IGNORED)
        targets = labels.to(logits.dtype) if labels.is_floating_point() else labels
        return {"loss_ce": F.cross_entropy(logits, targets)}

    def update(self) -> None:
        """Nothing: it learns by gradient."""

    def drop_pending(self) -> None:
        """Nothing: it keeps none."""


class CosineHead(SoftmaxHead):
    """Cosines to one learned vector per class, divided by a fixed temperature."""

    def __init__(self, num_classes: int, embed_dim: int, temperature: float) -> None:
        """Build; `temperature` as in `NearestCentroidHead`.  Raises: InputError unless above 0."""
        super().__init__(num_classes, embed_dim)
        if not temperature > 0:
            raise InputError("temperature", temperature, "more than 0", "correct it")
        self.temperature = temperature
        self.linear.register_parameter("bias", None)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> logits (N, C), float32.  Raises: InputError for another shape."""
        check_features(features, self.embed_dim)
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize(features.float(), dim=1)
            weight = F.normalize(self.linear.weight.float(), dim=1)
            return F.linear(z, weight) / self.temperature


def build_head(cfg: ModelConfig, num_classes: int, embed_dim: int) -> Any:
    """The head of a configuration."""
    if cfg.head == "softmax":
        return SoftmaxHead(num_classes, embed_dim)
    if cfg.head == "cosine":
        return CosineHead(num_classes, embed_dim, cfg.temperature)
    return NearestCentroidHead(
        num_classes,
        embed_dim,
        cfg.num_centroids,
        momentum=cfg.momentum,
        warm_start=cfg.warm_start,
        temperature=cfg.temperature,
        memory=cfg.memory,
        memory_size=cfg.memory_size,
        epsilon=cfg.epsilon,
        num_iters=cfg.num_iters,
        assignment=cfg.assignment,
        reseed_after=cfg.reseed_after,
        correct_only_after=cfg.correct_only_after,
        logit_norm=cfg.logit_norm,
    )
