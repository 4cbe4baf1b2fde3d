"""Decoders of mmsegmentation whose classifier is the nearest sub-centroid.

Paper: Sec. 3 and the experiments on segmentation: the last 1x1 convolution of FCN, DeepLabV3 and
UPerNet gives way to sub-centroids of pixel features, 10 per class, with no memory beyond the crops
of a batch.  Nothing of mmseg is copied: a mixin overrides the one method through which all these
decoders classify (`cls_seg`) and replaces its convolution.

Shapes: N crops, D width of the decoder, C classes, h w the grid of features, H W of the labels.
"""

from typing import Any

import torch
from mmseg.models.decode_heads import (
    ASPPHead,
    DepthwiseSeparableASPPHead,
    FCNHead,
    SegformerHead,
    UPerHead,
)
from mmseg.registry import MODELS
from torch import Tensor, nn

from dnc.classifier import NearestCentroidHead
from dnc.mmseg.owners import CentroidOwner
from shared_utils.errors import InputError

NUM_CENTROIDS = 10


class NearestCentroidMixin(CentroidOwner):
    """Put before a decode head of mmseg: `class DNCFCNHead(NearestCentroidMixin, FCNHead)`.

    Loss, sampler, resizing, prediction and everything else stay the decoder's. A training step
    shows `classifier` the features before dropout at the resolution that they have, with labels
    taken at the centre of each cell; features are never enlarged. The sub-centroids move after the
    optimiser's step by `CentroidHook`; without the hook, when the next loss begins.

    Attributes:
        classifier: the `NearestCentroidHead`; `conv_seg` is an empty place.
        embed_norm: the LayerNorm, or None.
        is_hooked: whether a `CentroidHook` calls `update`.
    """

    align_corners: bool

    def __init__(
        self,
        *args: Any,
        num_centroids: int = NUM_CENTROIDS,
        centroids: dict[str, Any] | None = None,
        embed_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the decoder and take its classifier away.

        Args:
            *args: of the decoder.
            num_centroids: K.
            centroids: further options of `NearestCentroidHead`, such as `momentum`, `temperature`,
                `epsilon`, `assignment`; `memory` is `batch` by default.
            embed_norm: a LayerNorm over each pixel's channels, before anything else is done with
                its features. Behind a ReLU all features lie in one orthant, where sub-centroids
                of different classes are alike; a network trained from random weights needs it.
                Differs from the paper, which takes the decoder's features as they are.
            **kwargs: of the decoder.

        Raises: InputError where `out_channels` is not `num_classes`: there is no single logit that
            a threshold could cut.
        """
        num_classes, out_channels = kwargs.get("num_classes"), kwargs.get("out_channels")
        if out_channels not in (None, num_classes):
            raise InputError(
                "out_channels",
                out_channels,
                f"{num_classes}, as num_classes: each class has sub-centroids of its own",
                "leave it out",
            )
        kwargs["out_channels"] = num_classes
        super().__init__(*args, **kwargs)
        base: Any = self
        base.conv_seg = nn.Identity()  # mmseg initialises it by name
        options = {"memory": "batch", "memory_size": 0, **(centroids or {})}
        self.classifier = NearestCentroidHead(
            base.num_classes,
            base.channels,
            num_centroids,
            ignore_index=-100 if base.ignore_index is None else base.ignore_index,
            **options,
        )
        self.embed_norm = nn.LayerNorm(base.channels) if embed_norm else None
        self.is_hooked = False
        self._labels: Tensor | None = None  # of the loss that is being computed

    def loss(self, inputs: Any, batch_data_samples: Any, *args: Any, **kwargs: Any) -> Any:
        """The decoder's loss; its features are kept for the update of the sub-centroids.

        Raises: InputError for a label that is no class, naming the image.
        """
        base: Any = self
        labels = base._stack_batch_gt(batch_data_samples).squeeze(1)  # (N, H, W)
        self._require_classes(labels, batch_data_samples)
        if self.training and not self.is_hooked:
            self.classifier.update()
        self._labels = labels
        try:
            return super().loss(inputs, batch_data_samples, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._labels = None

    def cls_seg(self, feat: Tensor) -> Tensor:
        """Logits (N, C, h, w), float32, of features (N, D, h, w) of any precision."""
        base: Any = self
        if self.embed_norm is not None:
            feat = self.embed_norm(feat.movedim(1, -1)).movedim(-1, 1)
        if self._labels is not None and self.training and torch.is_grad_enabled():
            labels = labels_at(self._labels, *feat.shape[2:], align_corners=base.align_corners)
            self.classifier.observe(feat.detach(), labels)
        if base.dropout is not None:
            feat = base.dropout(feat)
        logits: Tensor = self.classifier(feat)
        return logits

    def _require_classes(self, labels: Tensor, samples: Any) -> None:
        ignored = self.classifier.ignore_index
        wrong = (labels != ignored) & ((labels < 0) | (labels >= self.classifier.num_classes))
        if not bool(wrong.any()):
            return
        n = int(wrong.flatten(1).any(dim=1).int().argmax())
        name = samples[n].metainfo.get("seg_map_path") or samples[n].metainfo.get("img_path")
        raise InputError(
            f"label of {name}",
            int(labels[n][wrong[n]][0]),
            f"0 to {self.classifier.num_classes - 1}, or {ignored} to leave a pixel out",
            "check num_classes, and reduce_zero_label of the data set",
        )


def labels_at(labels: Tensor, height: int, width: int, *, align_corners: bool = False) -> Tensor:
    """Labels of the pixels at the centres of a grid's cells.

    Args:
        labels: (N, H, W).
        height: h.
        width: w.
        align_corners: whether the corner cells are centred on the corner pixels, as the decoder
            enlarges its logits.

    Returns: (N, h, w).
    """
    rows, columns = (
        _centres(count, size, align_corners).to(labels.device)
        for count, size in ((height, labels.shape[1]), (width, labels.shape[2]))
    )
    return labels[:, rows[:, None], columns]


def _centres(count: int, size: int, align_corners: bool) -> Tensor:
    """The pixel at the centre of each of `count` cells that cover `size` pixels."""
    if align_corners and count > 1:
        return (torch.arange(count) * ((size - 1) / (count - 1))).round().long()
    return ((torch.arange(count) + 0.5) * (size / count)).long()


@MODELS.register_module()
class DNCFCNHead(NearestCentroidMixin, FCNHead):
    """FCN; also as an auxiliary head."""


@MODELS.register_module()
class LayerNormFCNHead(FCNHead):
    """mmseg's FCN, softmax, with the LayerNorm of `DNCFCNHead(embed_norm=True)`: its control."""

    def __init__(self, **kwargs: Any) -> None:
        """Build; options are those of `FCNHead`."""
        super().__init__(**kwargs)
        self.embed_norm = nn.LayerNorm(self.channels)

    def cls_seg(self, feat: Tensor) -> Tensor:
        """Logits (N, C, h, w) of features (N, D, h, w)."""
        logits: Tensor = super().cls_seg(self.embed_norm(feat.movedim(1, -1)).movedim(-1, 1))
        return logits


@MODELS.register_module()
class DNCASPPHead(NearestCentroidMixin, ASPPHead):
    """DeepLabV3."""


@MODELS.register_module()
class DNCDepthwiseSeparableASPPHead(NearestCentroidMixin, DepthwiseSeparableASPPHead):
    """DeepLabV3+."""


@MODELS.register_module()
class DNCUPerHead(NearestCentroidMixin, UPerHead):
    """UPerNet, for Swin and ConvNeXt."""


@MODELS.register_module()
class DNCSegformerHead(NearestCentroidMixin, SegformerHead):
    """SegFormer."""
