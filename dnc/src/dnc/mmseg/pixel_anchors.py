"""Sub-centroids of a segmentor that are real training pixels, so that a decision can show them.

Paper: Sec. 3.3, sub-centroids restricted to training data; here a pixel of the feature grid, named
by its image, row and column.

Shapes: C classes, K sub-centroids of a class, D width, h w the grid of features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dnc.mmseg.fit import pixel_features
from dnc.mmseg.heads import labels_at
from dnc.similarity import normalized
from shared_utils.errors import InputError


@dataclass(frozen=True)
class PixelAnchor:
    """A training pixel that a sub-centroid is.

    Attributes:
        class_index: its class.
        centroid: which sub-centroid of the class.
        index: place of the image in the training set.
        path: of the image.
        row: of the centre of the grid's cell, in pixels of the image.
        column: likewise.
        cosine: between the sub-centroid before and the pixel.
    """

    class_index: int
    centroid: int
    index: int
    path: str
    row: int
    column: int
    cosine: float


@dataclass(frozen=True)
class PixelAnchors:
    """All of them, by class and sub-centroid, and what the network makes of them."""

    anchors: Mapping[tuple[int, int], PixelAnchor]
    centroids: Tensor
    active: Tensor

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        rows = [asdict(anchor) for anchor in self.anchors.values()]
        return {"anchors": rows, "centroids": self.centroids.cpu(), "active": self.active.cpu()}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> "PixelAnchors":
        """From what `to_plain` gave."""
        rows = [PixelAnchor(**row) for row in data["anchors"]]
        named = {(row.class_index, row.centroid): row for row in rows}
        return cls(named, data["centroids"], data["active"])

    def apply(self, head: Any) -> None:
        """Put a `NearestCentroidHead`'s sub-centroids onto the pixels."""
        head.centroids.copy_(self.centroids)
        head.active.copy_(self.active)
        head.seeded.copy_(self.active)


@dataclass
class _Best:
    """The most similar pixel of each of a few images, per sub-centroid: (C, K, T)."""

    cosines: Tensor
    images: Tensor
    rows: Tensor
    columns: Tensor


@torch.no_grad()
def find_anchors(model: Any, dataset: Any, class_names: Sequence[str]) -> PixelAnchors:
    """Find for each sub-centroid of the decoder the training pixel of its class nearest to it.

    The pairs of highest cosine come first; the pixels of a class are from distinct images as long
    as there are enough. Changes nothing.

    Args:
        model: a segmentor in eval mode whose decoder has sub-centroids.
        dataset: training images with labels, without augmentation.
        class_names: for messages.

    Raises: InputError where a class has no pixel in the whole set.
    """
    head = model.decode_head.classifier
    num_classes, num_centroids, width = head.centroids.shape
    kept = 2 * num_centroids  # of an image's best pixels more than K cannot matter, but for ties
    shape = (num_classes, num_centroids, kept)
    device = head.centroids.device
    none = torch.full(shape, -2.0, device=device)
    whole = torch.full(shape, -1, dtype=torch.int64, device=device)
    best = _Best(none, whole, whole.clone(), whole.clone())
    paths: dict[int, str] = {}
    for index in range(len(dataset)):
        item = dataset[index]
        features, labels = pixel_features(model, item)
        paths[index] = str(item["data_samples"].img_path)
        feature = features["decode_head"]
        align = model.decode_head.align_corners
        grid = labels_at(labels, *feature.shape[2:], align_corners=align)[0]
        _merge(best, head, feature[0], grid, index, (labels.shape[1], labels.shape[2]))
    found: dict[tuple[int, int], PixelAnchor] = {}
    for c in range(num_classes):
        if not bool((best.cosines[c] > -2).any()):
            raise InputError(
                "data", f"no pixel of {class_names[c]}", "one at least of each class", "add images"
            )
        for k, t in _pairs(best, c):
            image = int(best.images[c, k, t])
            found[c, k] = PixelAnchor(
                class_index=c,
                centroid=k,
                index=image,
                path=paths[image],
                row=int(best.rows[c, k, t]),
                column=int(best.columns[c, k, t]),
                cosine=float(best.cosines[c, k, t]),
            )
    return _embedded(model, dataset, found, (num_classes, num_centroids, width))


def cell_of(row: int, column: int, size: Sequence[int], grid: Sequence[int]) -> tuple[int, int]:
    """The cell (r, c) of a grid (h, w) that a pixel of an image (H, W) lies in."""
    return row * grid[0] // size[0], column * grid[1] // size[1]


def centre_of(cell: tuple[int, int], size: Sequence[int], grid: Sequence[int]) -> tuple[int, int]:
    """The pixel at the centre of a cell, as `labels_at` takes it."""
    y, x = ((cell[i] + 0.5) * (size[i] / grid[i]) for i in range(2))
    return int(y), int(x)


def _merge(
    best: _Best, head: Any, feature: Tensor, grid: Tensor, index: int, size: tuple[int, int]
) -> None:
    """Take the best pixels of one image in: feature (D, h, w), labels of the grid (h, w)."""
    for c in grid[grid != head.ignore_index].unique().tolist():
        where = (grid == c).nonzero()  # (n, 2)
        z = normalized(feature[:, where[:, 0], where[:, 1]].T)
        cosines, places = (z @ head.centroids[c].T).max(dim=0)  # (K,)
        lowest = best.cosines[c].argmin(dim=1)  # (K,)
        better = cosines > best.cosines[c].gather(1, lowest[:, None])[:, 0]
        k = better.nonzero()[:, 0]
        t = lowest[k]
        cells = where[places[k]]
        best.cosines[c, k, t] = cosines[k].to(best.cosines.dtype)
        best.images[c, k, t] = index
        centres = [centre_of((y, x), size, grid.shape) for y, x in cells.tolist()]
        pixels = torch.tensor(centres, dtype=torch.int64, device=grid.device).view(-1, 2)
        best.rows[c, k, t], best.columns[c, k, t] = pixels.unbind(1)


def _pairs(best: _Best, c: int) -> list[tuple[int, int]]:
    """A place t for each k of a class that can have one; of distinct images where possible."""
    images, rows, columns = best.images[c], best.rows[c], best.columns[c]
    order = sorted(
        (-float(best.cosines[c, k, t]), int(images[k, t]), k, t)
        for k, t in (best.cosines[c] > -2).nonzero().tolist()
    )
    chosen: dict[int, int] = {}
    used_images: set[int] = set()
    used_pixels: set[tuple[int, int, int]] = set()
    for needs_new_image in (True, False):
        for _, image, k, t in order:
            pixel = (image, int(rows[k, t]), int(columns[k, t]))
            taken = image in used_images if needs_new_image else pixel in used_pixels
            if k not in chosen and not taken:
                chosen[k] = t
                used_images.add(image)
                used_pixels.add(pixel)
    return sorted(chosen.items())


def _embedded(
    model: Any,
    dataset: Any,
    found: dict[tuple[int, int], PixelAnchor],
    shape: tuple[int, int, int],
) -> PixelAnchors:
    """What the network makes of the pixels; spare places repeat their class's first."""
    device = next(model.parameters()).device
    centroids = torch.zeros(shape, device=device)
    active = torch.zeros(shape[:2], dtype=torch.bool, device=device)
    by_image: dict[int, list[PixelAnchor]] = {}
    for anchor in found.values():
        by_image.setdefault(anchor.index, []).append(anchor)
    for index, anchors in by_image.items():
        features, labels = pixel_features(model, dataset[index])
        feature = features["decode_head"][0]
        for anchor in anchors:
            y, x = cell_of(anchor.row, anchor.column, labels.shape[1:], feature.shape[1:])
            centroids[anchor.class_index, anchor.centroid] = normalized(feature[None, :, y, x])[0]
            active[anchor.class_index, anchor.centroid] = True
    first = active.int().argmax(dim=1)
    spare = centroids[torch.arange(len(first), device=device), first]
    return PixelAnchors(found, torch.where(active[..., None], centroids, spare[:, None]), active)
