"""What the parts of an mmengine model with sub-centroids have in common, and how they are found."""

from torch import nn

from dnc.classifier import NearestCentroidHead


class CentroidOwner(nn.Module):
    """A decoder or box head that classifies by sub-centroids.

    Attributes:
        classifier: the `NearestCentroidHead`.
        is_hooked: whether a `CentroidHook` calls `update`.
    """

    classifier: NearestCentroidHead
    is_hooked: bool


def centroid_heads(model: nn.Module) -> list[tuple[str, CentroidOwner]]:
    """The parts of a model that have sub-centroids, with their names; also auxiliary ones."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, CentroidOwner)]
