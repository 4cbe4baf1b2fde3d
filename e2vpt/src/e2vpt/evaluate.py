"""Accuracy and loss of a model on one split, over any number of processes."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from e2vpt.config import DataConfig
from e2vpt.data import ImageSet, build_loader
from shared_utils.errors import InputError
from shared_utils.metrics import classification_metrics


class Diverged(InputError):
    """The loss, a weight or a logit is NaN or infinite."""


def evaluate(
    fabric: Fabric,
    model: nn.Module,
    images: ImageSet,
    cfg: DataConfig,
    num_classes: int,
    *,
    when: str = "",
    remedy: str = "try --precision 32-true",
) -> dict[str, float]:
    """`loss`, the mean cross-entropy in nats, `top1` and, from six classes on, `top5`, in [0, 1].

    Each image counts once.

    Args:
        fabric: device, precision and processes.
        model: maps (B, 3, H, W) to logits (B, num_classes), on the device; no DDP wrapper, which
            would wait for processes that have one batch less. Left in the mode it was in.
        images: the split; its augmentation is left out.
        cfg: batch size and loader processes.
        num_classes: C.
        when: of what and when, for the error.
        remedy: what the error tells the user to do.

    Raises: Diverged where a logit is NaN or infinite: its accuracy would mean nothing.
    """
    metrics = classification_metrics(num_classes).to(fabric.device)
    loss = MeanMetric().to(fabric.device)
    for logits, labels in _batches(fabric, model, images, cfg):
        if not torch.isfinite(logits).all():
            raise Diverged("logits", f"nan or inf{when}", "finite ones", remedy)
        metrics.update(logits, labels)
        loss.update(F.cross_entropy(logits, labels, reduction="none"))
    scores = {"loss": loss.compute(), **metrics.compute()}
    return {name: float(value) for name, value in scores.items()}


def predict_set(
    fabric: Fabric, model: nn.Module, images: ImageSet, cfg: DataConfig
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) float32 and labels (N,) of a whole split, on the CPU, in this process alone."""
    parts = [
        (logits.cpu(), labels.cpu())
        for logits, labels in _batches(fabric, model, images, cfg, alone=True)
    ]
    return torch.cat([logits for logits, _ in parts]), torch.cat([labels for _, labels in parts])


@torch.no_grad()
def _batches(
    fabric: Fabric, model: Any, images: ImageSet, cfg: DataConfig, alone: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    rank, world_size = (0, 1) if alone else (fabric.global_rank, fabric.world_size)
    loader = build_loader(
        images.with_augment("none"), cfg, train=False, rank=rank, world_size=world_size
    )
    was_training = model.training
    model.eval()
    try:
        for batch, labels in loader:
            with fabric.autocast():
                logits = model(batch.to(fabric.device))
            yield logits.float(), labels.to(fabric.device)
    finally:
        model.train(was_training)
