"""What of a run is evaluated and saved: averaged weights, anchored sub-centroids, measures."""

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dnc import anchors as anchoring
from dnc.anchors import Anchors
from dnc.classifier import NearestCentroidHead
from dnc.config import TrainConfig
from dnc.data import DataSplits, ImageSet, eval_transform
from dnc.evaluate import centroid_purity, embed_set, evaluate, retrieval
from dnc.fitter import CentroidFitter
from dnc.model import NearestCentroidClassifier
from dnc.processes import alone

FIT_ROWS = 4096  # features at a time


class Network(nn.Module):
    """What trains: encoder and head, together, so that processes wait for each other once.

    Attributes:
        encoder: (B, 3, H, W) -> (B, D).
        head: a `NearestCentroidHead`, or a learned one under the same calls.
    """

    head: Any

    def __init__(self, encoder: nn.Module, head: Any) -> None:
        """Put them together."""
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """Loss terms of a batch, by name."""
        terms: dict[str, Tensor] = self.head.loss(self.encoder(images), labels, indices)
        return terms


class Deployed:
    """The network as it is evaluated and saved.

    Attributes:
        average: the averaged network, or None.
        anchors: the training images that sub-centroids are, from the moment they are.
    """

    def __init__(
        self, cfg: TrainConfig, fabric: Fabric, trained: Network, splits: DataSplits
    ) -> None:
        """Watch over `trained`, on its device already."""
        self.cfg, self.fabric, self.trained, self.splits = cfg, fabric, trained, splits
        self.is_dnc = isinstance(trained.head, NearestCentroidHead)
        self.average: AveragedModel | None = None
        if cfg.optim.ema_decay:
            rule = get_ema_multi_avg_fn(cfg.optim.ema_decay)
            self.average = AveragedModel(trained, multi_avg_fn=rule)
        self.anchors: Anchors | None = None

    @property
    def network(self) -> Any:
        """The averaged network where there is one, otherwise that which trains."""
        return self.trained if self.average is None else self.average.module

    @property
    def classifier(self) -> NearestCentroidClassifier:
        """Encoder and head with names and transform; shares them."""
        return self._classifier(self.network)

    def after_step(self) -> None:
        """Move the sub-centroids, or leave them on their images; average the weights."""
        head: Any = self.trained.head
        if self.anchors is None:
            head.update()
        else:
            head.drop_pending()
        if self.average is not None:
            self.average.update_parameters(self.trained)

    def after_epoch(self, epoch: int) -> None:
        """Bring sub-centroids to where evaluation wants them; `epoch` epochs are done."""
        if not self.is_dnc:
            return
        self._share_statistics()
        anchored = 0 if self.cfg.anchor.skip else self.cfg.anchor.epochs
        if anchored and self.anchors is None and epoch >= self.cfg.optim.epochs - anchored:
            self._anchor(self.trained)
        elif self.anchors is not None:
            self._follow(self.trained, self.anchors)
        if self.average is not None:
            self._estimate(self.network)

    def finish(self) -> dict[str, Any]:
        """After the last epoch: anchors, where they are still to come, and what is asked once.

        Returns: for result.json: `before_anchoring`, metrics; `fine_retrieval_top1`.
        """
        extra: dict[str, Any] = {}
        splits = self.splits
        if splits.fine_names is not None and splits.test is not None:
            known, _ = self.embedded(splits.train)
            queries, _ = self.embedded(splits.test)
            fine = {name: torch.from_numpy(splits.fine[name]) for name in ("train", "test")}
            extra["fine_retrieval_top1"] = retrieval(queries, fine["test"], known, fine["train"])
        if self.is_dnc and not self.cfg.anchor.skip and self.anchors is None:
            before = self.scores("val", splits.val) | self.scores("test", splits.test)
            extra["before_anchoring"] = {k: v for k, v in before.items() if "_top" in k}
            self._anchor(self.network)
        return extra

    def embedded(self, images: ImageSet) -> tuple[Tensor, Tensor]:
        """Features and labels of a split, on the CPU."""
        network = self.network
        return embed_set(self.fabric, network.encoder, network.head, images, self.cfg.data)

    def scores(self, split: str, images: ImageSet | None, remedy: str = "") -> dict[str, float]:
        """Metrics by name, those of a split with its prefix; none without images."""
        if images is None:
            return {}
        network = self.network
        found = evaluate(
            self.fabric,
            network.encoder,
            network.head,
            images,
            self.cfg.data,
            self.splits.num_classes,
            remedy=remedy,
        )
        scores = {f"{split}_{name}": value for name, value in found.items()}
        if self.is_dnc and split == "val":
            features, labels = self.embedded(images)
            fine = self.splits.fine.get(split)
            labels = labels if fine is None else torch.from_numpy(fine)
            on_device = features.to(self.fabric.device)
            scores["centroid_purity"] = centroid_purity(network.head, on_device, labels)
        return scores

    def _share_statistics(self) -> None:
        """Give all processes the running statistics of the first: each has seen its own images."""
        if self.fabric.world_size > 1:
            for buffer in self.trained.encoder.buffers():
                buffer.copy_(self.fabric.broadcast(buffer).to(buffer.device))

    def _estimate(self, network: Any) -> None:
        """Sub-centroids for averaged weights: those of the weights that train are not theirs."""
        if self.anchors is not None:
            network.head.active.copy_(self.trained.head.active)
            self._follow(network, self.anchors)
            return
        head, device = network.head, self.fabric.device
        features, labels = self.embedded(self.splits.train)
        fitter = CentroidFitter(head.num_classes, head.embed_dim, head.num_centroids, device=device)
        with alone():
            for part, own in zip(features.split(FIT_ROWS), labels.split(FIT_ROWS), strict=True):
                fitter.add(part.to(device), own.to(device))
            points, active = fitter.finish()
        head.centroids.copy_(points)
        head.active.copy_(active)
        head.seeded.copy_(active)

    def _anchor(self, network: Any) -> None:
        with self.fabric.autocast():
            self.anchors = self._classifier(network).anchor(
                self.splits.train.plain(), self.cfg.data.batch_size
            )

    def _follow(self, network: Any, anchors: Anchors) -> None:
        with self.fabric.autocast():
            anchoring.follow(
                network.head,
                self._classifier(network).embed,
                self.splits.train.plain(),
                anchors,
                self.cfg.data.batch_size,
            )

    def _classifier(self, network: Any) -> NearestCentroidClassifier:
        transform = eval_transform(self.cfg.data)
        names = self.splits.class_names
        made = NearestCentroidClassifier(network.encoder, network.head, names, transform)
        made.anchors = self.anchors
        return made
