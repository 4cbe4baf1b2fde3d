"""Measures of a classifier on images: accuracy, purity, unknown images, finer classes."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.functional.classification import binary_auroc

from dnc.classifier import NearestCentroidHead
from dnc.collapse import purity
from dnc.config import DataConfig
from dnc.data import ImageSet, build_loader
from dnc.similarity import normalized
from shared_utils.errors import InputError
from shared_utils.metrics import classification_metrics


class Diverged(InputError):
    """The loss, a weight or a logit is NaN or infinite."""


def evaluate(
    fabric: Fabric,
    encoder: nn.Module,
    head: nn.Module,
    images: ImageSet,
    cfg: DataConfig,
    num_classes: int,
    *,
    remedy: str = "try --precision 32-true",
) -> dict[str, float]:
    """`loss` in nats, `top1` and, from six classes on, `top5`; each image counts once.

    Raises: Diverged where a logit is NaN or infinite: its accuracy would mean nothing.
    """
    metrics = classification_metrics(num_classes).to(fabric.device)
    loss = MeanMetric().to(fabric.device)
    for features, labels in _features(fabric, encoder, head, images, cfg):
        logits = head(features).float()
        if not torch.isfinite(logits).all():
            raise Diverged("logits", "nan or inf", "finite ones", remedy)
        metrics.update(logits, labels)
        loss.update(F.cross_entropy(logits, labels, reduction="none"))
    scores = {"loss": loss.compute(), **metrics.compute()}
    return {name: float(value) for name, value in scores.items()}


def embed_set(
    fabric: Fabric, encoder: nn.Module, head: nn.Module, images: ImageSet, cfg: DataConfig
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels (N,) of a whole split, on the CPU, in this process."""
    parts = [
        (features.float().cpu(), labels.cpu())
        for features, labels in _features(fabric, encoder, head, images, cfg, alone=True)
    ]
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])


@torch.no_grad()
def centroid_purity(head: NearestCentroidHead, features: Tensor, labels: Tensor) -> float:
    """`purity` of features (N, D) on the head's device, by labels (N,) that may be finer."""
    cosines, nearest = head.scores(features)
    winner = cosines.argmax(dim=1)
    place = nearest.gather(1, winner[:, None])[:, 0].long()
    return purity((winner * head.num_centroids + place).cpu(), labels.cpu())


def retrieval(queries: Tensor, query_labels: Tensor, known: Tensor, known_labels: Tensor) -> float:
    """Share of queries whose nearest known image, by cosine, has the same label.

    Args:
        queries: (N, D) features.
        query_labels: (N,) int64.
        known: (M, D) features, of other images.
        known_labels: (M,).
    """
    z, others = normalized(queries), normalized(known)
    found = torch.cat([(part @ others.T).argmax(dim=1) for part in z.split(1024)])
    return float((known_labels[found] == query_labels).double().mean())


def unknown_auroc(known: Tensor, unknown: Tensor) -> float:
    """How well a score tells known images from unknown ones; known ones are to score higher.

    Args:
        known: (N,) scores.
        unknown: (M,) scores.

    Returns: area under the ROC curve, in [0, 1]; 0.5 says nothing.
    """
    target = torch.cat([torch.ones_like(known), torch.zeros_like(unknown)]).long()
    # Ranks alone count; torchmetrics takes scores in [0, 1].
    ranks = torch.cat([known, unknown]).unique(return_inverse=True)[1].double()
    return float(binary_auroc(ranks / ranks.max().clamp(min=1), target))


@torch.no_grad()
def _features(
    fabric: Fabric,
    encoder: nn.Module,
    head: nn.Module,
    images: ImageSet,
    cfg: DataConfig,
    alone: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    rank, world_size = (0, 1) if alone else (fabric.global_rank, fabric.world_size)
    loader: Any = build_loader(images.plain(), cfg, train=False, rank=rank, world_size=world_size)
    modes = [(module, module.training) for module in (encoder, head)]
    for module, _ in modes:
        module.eval()
    try:
        for batch, labels, _ in loader:
            with fabric.autocast():
                features = encoder(batch.to(fabric.device))
            yield features, labels.to(fabric.device)
    finally:
        for module, mode in modes:
            module.train(mode)
