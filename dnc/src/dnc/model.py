"""An encoder and its sub-centroids as one classifier, whose classes come and go without training.

Shapes: N images, D width, C classes, K sub-centroids of a class.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dnc import anchors as anchoring
from dnc.anchors import Anchors
from dnc.classifier import NearestCentroidHead
from dnc.fitter import CentroidFitter
from dnc.similarity import normalized
from dnc.sources import to_rgb
from shared_utils.checkpoint import reading
from shared_utils.errors import InputError, near_miss

BATCH = 64  # images at a time, where the caller does not say

Images = Tensor | Sequence[str | Path | Image.Image]


class NearestCentroidClassifier(nn.Module):
    """Logits are cosines to the nearest sub-centroid of each class.

    Attributes:
        encoder: (N, 3, H, W) -> (N, D).
        head: the sub-centroids.
        class_names: C names.
        transform: PIL image -> (3, H, W), or None where images come as tensors only.
        anchors: which training image each sub-centroid is, or None before `anchor`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: NearestCentroidHead,
        class_names: Sequence[str],
        transform: Any = None,
    ) -> None:
        """Put the parts together; nothing is copied."""
        super().__init__()
        self.encoder, self.head = encoder, head
        self.class_names, self.transform = list(class_names), transform
        self.anchors: Anchors | None = None

    def forward(self, images: Images) -> Tensor:
        """Logits (N, C) of a tensor (N, 3, H, W), or of paths or PIL images with a transform.

        Raises: InputError where an image cannot be read, or needs a transform that is not there.
        """
        logits: Tensor = self.head(self.encoder(self.prepared(images)))
        return logits

    @torch.no_grad()
    def embed(self, images: Images) -> Tensor:
        """Unit feature vectors (N, D) in eval mode."""
        was_training = self.training
        self.eval()
        z = normalized(self.encoder(self.prepared(images)))
        self.train(was_training)
        return z

    def prepared(self, images: Images) -> Tensor:
        """(N, 3, H, W) on the classifier's device."""
        device = self.head.centroids.device
        if isinstance(images, Tensor):
            return images.to(device)
        if self.transform is None:
            raise InputError(
                "images",
                "paths or PIL images without a transform",
                "a tensor (N, 3, H, W)",
                "give fit or the classifier a transform",
            )
        return torch.stack([self.transform(_opened(image)) for image in images]).to(device)

    def add_class(self, name: str, images: Images) -> None:
        """Learn a class from examples; the scores of the others stay as they are, to the bit.

        Args:
            name: of the new class, the last one from now on.
            images: one at least; with fewer than K the spare sub-centroids are not in use.

        Raises: InputError for a name that is taken or no image.
        """
        if name in self.class_names:
            raise InputError("name", name, "a class that is not there yet", "remove it first")
        if not len(images):
            raise InputError("images", f"none of {name}", "one at least", "give some")
        head = self.head
        fitter = CentroidFitter(1, head.embed_dim, head.num_centroids, device=head.centroids.device)
        for start in range(0, len(images), BATCH):
            z = self.embed(images[start : start + BATCH])
            fitter.add(z, torch.zeros(len(z), dtype=torch.int64, device=z.device))
        points, active = fitter.finish()
        self.head = _resized(
            head,
            torch.cat([head.centroids, points]),
            torch.cat([head.active, active]),
        )
        self.class_names.append(name)
        if self.anchors is not None:
            self.anchors = self.anchors.with_class()

    def remove_class(self, name: str) -> None:
        """Forget a class; the scores of the others stay as they are, to the bit.

        Raises: InputError for an unknown name, or where fewer than two classes would be left.
        """
        place = self._place(name)
        if len(self.class_names) < 3:
            raise InputError("name", name, "a class among three or more", "add another class first")
        keep = [i for i in range(len(self.class_names)) if i != place]
        self.head = _resized(self.head, self.head.centroids[keep], self.head.active[keep])
        del self.class_names[place]
        if self.anchors is not None:
            self.anchors = self.anchors.without_class(place)

    def anchor(self, dataset: Any, batch_size: int = BATCH) -> Anchors:
        """Put every sub-centroid onto the training image nearest to it.  Paper: Sec. 3.3.

        Args:
            dataset: map-style, items (image, label, ...): tensors (3, H, W), or PIL images with a
                transform; `path(i)`, where it has one, names them.
            batch_size: images at a time.

        Returns: the images, which `anchors` holds from now on.
        Raises: InputError where a class has no image.
        """
        self.anchors = anchoring.anchor(
            self.head, self.embed, dataset, self.class_names, batch_size
        )
        return self.anchors

    def explain(self, image: Any, top: int = 5) -> dict[str, Any]:
        """Why an image gets its class, as plain data.

        Args:
            image: a tensor (3, H, W), a path or a PIL image.
            top: classes to name, the predicted one included.

        Returns: source, class, class_index, score (a cosine), probability, winner, rivals and
            anchors (class_index, class_name, centroid, index, path, cosine), margin, rule (short,
            full, comparisons) and counterfactual (without, class, text).
        Raises: InputError before `anchor`, or where logits do not rise with the cosines.
        """
        from dnc.explain import explain_features, num_comparisons
        from dnc.page import explanation_dict

        images = image[None] if isinstance(image, Tensor) else [image]
        source = str(image) if isinstance(image, str | Path) else ""
        found = explain_features(self, self.embed(images)[0], source=source, top=top)
        return explanation_dict(found, num_comparisons(self, found.predicted.class_index))

    def _place(self, name: str) -> int:
        if name not in self.class_names:
            raise InputError("name", name, "a class", near_miss(name, self.class_names))
        return self.class_names.index(name)


def _opened(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    with reading(Path(image), "an image"), Image.open(image) as opened:
        return to_rgb(opened)


def _resized(head: NearestCentroidHead, points: Tensor, active: Tensor) -> NearestCentroidHead:
    """The same head with other classes, for use: its memory and counters start anew."""
    if head.logit_norm == "affine":
        raise InputError(
            "logit_norm",
            "affine, which has weights for each class",
            "none or standard",
            "train without it",
        )
    fresh = NearestCentroidHead(
        len(points),
        head.embed_dim,
        head.num_centroids,
        temperature=head.temperature,
        memory_size=0,
        logit_norm=head.logit_norm,
    ).to(points.device)
    fresh.centroids.copy_(points)
    fresh.active.copy_(active)
    fresh.seeded.copy_(active)
    return fresh.train(head.training)
