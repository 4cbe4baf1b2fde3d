"""A trained network becomes a nearest-centroid classifier: one pass, no training."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dnc.classifier import NearestCentroidHead
from dnc.encoders import build_encoder, check_encoder
from dnc.fitter import CentroidFitter
from dnc.model import NearestCentroidClassifier
from shared_utils.errors import InputError


def fit(
    encoder: nn.Module | str,
    loader: Iterable[Sequence[Tensor]],
    num_classes: int,
    num_centroids: int = 4,
    class_names: Sequence[str] | None = None,
    transform: Any = None,
    *,
    temperature: float = 0.1,
) -> NearestCentroidClassifier:
    """Turn a trained network into a nearest-centroid classifier, in one pass and without training.

    Args:
        encoder: any module that maps (N, 3, H, W) to (N, D), used in eval mode on the device of its
            parameters; or a timm name, whose published weights are taken.
        loader: yields (images, labels) or (images, labels, indices) in batches.
        num_classes: C.
        num_centroids: K.
        class_names: C names; by default the numbers.
        transform: PIL image -> (3, H, W), so that the classifier takes paths and PIL images.
        temperature: of the logits.

    Raises: InputError where the encoder gives no (N, D), a class has no sample, or labels or
        features do not fit.
    """
    if isinstance(encoder, str):
        encoder = build_encoder(encoder, pretrained=True)
    names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes:
        raise InputError(
            "class_names", f"{len(names)} names", f"{num_classes}, num_classes", "name each class"
        )
    head = fitted_head(encoder, loader, num_classes, num_centroids, temperature=temperature)
    return NearestCentroidClassifier(encoder, head, names, transform)


@torch.no_grad()
def fitted_head(
    encoder: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    num_classes: int,
    num_centroids: int,
    *,
    temperature: float = 0.1,
) -> NearestCentroidHead:
    """A head with the sub-centroids of an encoder's features; arguments as for `fit`."""
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    was_training = encoder.training
    encoder.eval()
    fitter: CentroidFitter | None = None
    try:
        for images, labels, *_ in loader:
            images = images.to(device)
            if fitter is None:
                width = check_encoder(encoder, images[:1])
                fitter = CentroidFitter(num_classes, width, num_centroids, device=device)
            fitter.add(encoder(images), labels.to(device))
    finally:
        encoder.train(was_training)
    if fitter is None:
        raise InputError("loader", "no batch", "at least one", "check the data")
    points, active = fitter.finish()
    head = NearestCentroidHead(
        num_classes,
        points.shape[2],
        num_centroids,
        temperature=temperature,
        memory_size=0,
    ).to(device)
    head.centroids.copy_(points)
    head.active.copy_(active)
    head.seeded.copy_(active)
    return head.eval()
