"""Whether sub-centroids are of use: how alike they are, how evenly used, how pure, how far moved.

Sub-centroids that all end in one place are no worse for accuracy at first sight, so they are
watched in every epoch.
"""

import torch
from torch import Tensor

from dnc.classifier import NearestCentroidHead


@torch.no_grad()
def collapse_metrics(head: NearestCentroidHead, before: Tensor) -> dict[str, float]:
    """What became of the sub-centroids in an epoch.

    Args:
        head: its `usage` counts the assignments of the epoch.
        before: (C, K, D), the sub-centroids when it began.

    Returns: `centroid_cosine`, the mean cosine between sub-centroids of one class (1: collapsed;
        left out where no class has two); `centroid_usage`, the mean over classes of the entropy of
        their use, over its largest value (1: all alike; left out where no class that had a sample
        has two in use); `centroid_unused`, the share of those without a sample;
        `centroid_movement`, the mean angle moved, in degrees.
    """
    points, active = head.centroids, head.active
    found: dict[str, float] = {}
    pairs = active[:, :, None] & active[:, None, :]
    pairs &= ~torch.eye(points.shape[1], dtype=torch.bool, device=points.device)
    if bool(pairs.any()):
        cosines = points @ points.transpose(1, 2)
        found["centroid_cosine"] = float(cosines[pairs].mean())
    usage = head.usage.double()
    used = usage.sum(dim=1) > 0
    if bool(used.any()):
        found["centroid_unused"] = float((usage[used] == 0)[active[used]].double().mean())
        places = active.sum(dim=1)
        if bool((used := used & (places > 1)).any()):
            share = usage[used] / usage[used].sum(dim=1, keepdim=True)
            entropy = -(share * share.clamp(min=1e-300).log()).sum(dim=1)
            found["centroid_usage"] = float((entropy / places[used].double().log()).mean())
    # Not the arc cosine, which in float32 knows no angles below a fiftieth of a degree.
    angle = 2 * torch.atan2((points - before).norm(dim=2), (points + before).norm(dim=2))
    found["centroid_movement"] = float(torch.rad2deg(angle[active].mean()))
    return found


def purity(nearest: Tensor, labels: Tensor) -> float:
    """Mean over the sub-centroids that have images of the share of their most frequent label.

    Args:
        nearest: (N,) int64, the sub-centroid of all classes that is nearest to each image.
        labels: (N,) int64; of finer classes where there are such.
    """
    _, own = nearest.unique(return_inverse=True)
    table = torch.zeros(int(own.max()) + 1, int(labels.max()) + 1, dtype=torch.int64)
    table.index_put_((own, labels), torch.ones_like(labels), accumulate=True)
    return float((table.amax(dim=1) / table.sum(dim=1)).mean())
