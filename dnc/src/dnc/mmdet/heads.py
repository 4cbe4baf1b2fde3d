"""The box head of a two-stage detector whose classifier is the nearest sub-centroid.

Paper: Sec. 3, whose classifier this puts into the second stage of Faster R-CNN; the paper itself
has no experiment on detection. Nothing of mmdet is copied: the linear classifier is replaced, and
the loss also shows the features of the sampled regions to the sub-centroids.
"""

from typing import Any

import torch
from mmdet.models import Shared2FCBBoxHead
from mmdet.registry import MODELS
from torch import Tensor, nn

from dnc.classifier import NearestCentroidHead
from dnc.mmseg.owners import CentroidOwner
from shared_utils.errors import InputError

NUM_CENTROIDS = 4


@MODELS.register_module()
class DNCShared2FCBBoxHead(CentroidOwner, Shared2FCBBoxHead):
    """Two shared layers, then boxes as in mmdet and classes by the nearest sub-centroid.

    Background is a class of its own, the last one, with sub-centroids of its own. A training step
    shows the classifier what the second layer gives for every sampled region that counts in the
    loss; the sub-centroids move after the optimiser's step by `CentroidHook`, or, without it, when
    the next loss begins.

    Attributes:
        fc_cls: the `NearestCentroidHead`, in the place of mmdet's linear layer; `classifier` too.
        embed_norm: the LayerNorm, or None.
        is_hooked: whether a `CentroidHook` calls `update`.
    """

    fc_cls: NearestCentroidHead

    def __init__(
        self,
        *args: Any,
        num_centroids: int = NUM_CENTROIDS,
        centroids: dict[str, Any] | None = None,
        embed_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the head and replace its classifier.

        Args:
            *args: of `Shared2FCBBoxHead`.
            num_centroids: K of every class and of the background.
            centroids: further options of `NearestCentroidHead`; its queue holds the last 64
                features of each class by default, since a batch has few regions of a class.
            embed_norm: a LayerNorm before the sub-centroids. The second layer ends in a ReLU and
                all its features lie in one orthant, where sub-centroids of different classes are
                alike; a network trained from random weights needs it.
            **kwargs: of `Shared2FCBBoxHead`.

        Raises: InputError for a loss on sigmoids: classes and background are scored together.
        """
        super().__init__(*args, **kwargs)
        base: Any = self
        if getattr(base.loss_cls, "use_sigmoid", False) or base.custom_cls_channels:
            raise InputError(
                "bbox_head.loss_cls",
                type(base.loss_cls).__name__ + " on sigmoids or with channels of its own",
                "CrossEntropyLoss with use_sigmoid=False",
                "change it",
            )
        self.fc_cls = NearestCentroidHead(
            base.num_classes + 1, base.cls_last_dim, num_centroids, **(centroids or {})
        )
        # mmengine would start a linear layer of that name.
        base.init_cfg = [
            part for part in base.init_cfg if part.get("override", {}) != {"name": "fc_cls"}
        ]
        self.is_hooked = False
        self._features: Tensor | None = None  # of the last forward pass in training
        self.embed_norm = nn.LayerNorm(base.cls_last_dim) if embed_norm else None
        self.fc_cls.register_forward_pre_hook(self._normed)
        self.fc_cls.register_forward_pre_hook(self._keep)

    @property
    def classifier(self) -> NearestCentroidHead:  # type: ignore[override]
        """The sub-centroids."""
        return self.fc_cls

    def loss(
        self, cls_score: Tensor, bbox_pred: Tensor, rois: Tensor, labels: Tensor,
        label_weights: Tensor, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Mmdet's loss; regions of weight 0 are left out of the update as they are of the loss."""
        features, self._features = self._features, None
        if self.training and torch.is_grad_enabled():
            if features is None or len(features) != len(labels):
                raise RuntimeError("the loss is not of the regions that were classified last")
            if not self.is_hooked:
                self.fc_cls.update()
            counted = torch.where(label_weights > 0, labels, self.fc_cls.ignore_index)
            self.fc_cls.observe(features, counted)
        return super().loss(cls_score, bbox_pred, rois, labels, label_weights, *args, **kwargs)

    def _normed(self, classifier: nn.Module, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return features if self.embed_norm is None else (self.embed_norm(features[0]),)

    def _keep(self, classifier: nn.Module, features: tuple[Tensor, ...]) -> None:
        if self.training and torch.is_grad_enabled():
            self._features = features[0].detach()
