"""Sub-centroids that are real training images, so that a decision can name what it rests on.

Paper: Sec. 3.3, sub-centroids restricted to training images.  Differs from the paper: the images of
a class are distinct, and when the network moves on they are embedded anew, so that a sub-centroid
is at any time what the network makes of its image.

Shapes: N images, D width, C classes, K sub-centroids of a class.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnc.classifier import NearestCentroidHead
from dnc.similarity import own_similarity
from shared_utils.errors import InputError

Embed = Callable[[Any], Tensor]
NONE = -1


@dataclass(frozen=True)
class Anchors:
    """The training image behind each sub-centroid.

    Attributes:
        indices: per class K places in the data set; -1 for a sub-centroid that is not in use or,
            in a class that was added later, no image of the data set.
        paths: per class K names, or None where the data set has none.
        hashes: per class K SHA-256 of what the encoder was given, as hex; "" without an image.
        cosines: per class K, how near each sub-centroid was to its image before.
    """

    indices: tuple[tuple[int, ...], ...]
    paths: tuple[tuple[str | None, ...], ...]
    hashes: tuple[tuple[str, ...], ...]
    cosines: tuple[tuple[float, ...], ...]

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> "Anchors":
        """From what `asdict` gave, or JSON of it."""
        return cls(**{name: tuple(tuple(row) for row in rows) for name, rows in data.items()})

    def with_class(self) -> "Anchors":
        """With a further class, whose images are not known."""
        count = len(self.indices[0])
        return Anchors(
            (*self.indices, (NONE,) * count),
            (*self.paths, (None,) * count),
            (*self.hashes, ("",) * count),
            (*self.cosines, (0.0,) * count),
        )

    def without_class(self, place: int) -> "Anchors":
        """Without one class."""

        def rest(rows: tuple[Any, ...]) -> tuple[Any, ...]:
            return rows[:place] + rows[place + 1 :]

        return Anchors(rest(self.indices), rest(self.paths), rest(self.hashes), rest(self.cosines))

    def places(self) -> list[tuple[int, int, int]]:
        """Class, sub-centroid and place in the data set of each image."""
        return [
            (c, k, index)
            for c, row in enumerate(self.indices)
            for k, index in enumerate(row)
            if index != NONE
        ]


@torch.no_grad()
def anchor(
    head: NearestCentroidHead,
    embed: Embed,
    dataset: Any,
    class_names: Sequence[str],
    batch_size: int = 64,
) -> Anchors:
    """Find K distinct images for each class and put its sub-centroids onto them.

    The pair of highest cosine comes first, then the next one of an image and a sub-centroid that
    are both free; of equals the earlier image. A class with fewer than K images keeps spare
    sub-centroids, which are not in use.

    Args:
        head: changed in place.
        embed: images -> unit vectors (N, D), in eval mode.
        dataset: items (image, label, ...), without augmentation.
        class_names: for messages.
        batch_size: images at a time.

    Raises: InputError where a class has no image.
    """
    rows, labels = [], []
    for images, own, _ in _batches(dataset, batch_size):
        z = embed(images)
        own = own.to(z.device)
        rows.append(own_similarity(z, own, head.centroids.to(z.dtype)).cpu())
        labels.append(own.cpu())
    similarity = torch.cat(rows).numpy()
    label = torch.cat(labels).numpy()
    active = head.active.cpu().numpy()
    indices = np.full(active.shape, NONE)
    cosines = np.zeros(active.shape)
    for c, name in enumerate(class_names):
        places = np.flatnonzero(label == c)
        if not len(places):
            raise InputError(
                "dataset", f"no image of {name}", "one at least of each class", "add some"
            )
        for place, k in _pairs(similarity[places], active[c]):
            indices[c, k] = places[place]
            cosines[c, k] = similarity[places[place], k]
    found = Anchors(
        tuple(tuple(map(int, row)) for row in indices),
        tuple(tuple(_path(dataset, int(i)) for i in row) for row in indices),
        tuple(
            tuple("" if i == NONE else content_hash(dataset[int(i)][0]) for i in row)
            for row in indices
        ),
        tuple(tuple(map(float, row)) for row in cosines),
    )
    head.active.copy_(torch.from_numpy(indices != NONE))
    head.seeded.copy_(head.active)
    follow(head, embed, dataset, found, batch_size)
    return found


@torch.no_grad()
def follow(
    head: NearestCentroidHead,
    embed: Embed,
    dataset: Any,
    anchors: Anchors,
    batch_size: int = 64,
) -> None:
    """Embed the images anew: the network has moved; arguments as for `anchor`."""
    places = anchors.places()
    for start in range(0, len(places), batch_size):
        part = places[start : start + batch_size]
        z = embed(_together([dataset[index][0] for _, _, index in part]))
        for (c, k, _), vector in zip(part, z, strict=True):
            head.centroids[c, k] = vector.to(head.centroids.dtype)
    first = head.active.int().argmax(dim=1)
    spare = head.centroids[torch.arange(len(first), device=first.device), first]
    head.centroids.copy_(torch.where(head.active[..., None], head.centroids, spare[:, None]))


def _pairs(similarity: np.ndarray, is_active: np.ndarray) -> Iterator[tuple[int, int]]:
    """(n, K) -> distinct (image, sub-centroid), the most similar first."""
    count = int(is_active.sum())
    free_images = set(range(len(similarity)))
    free_places: set[int] = set(np.flatnonzero(is_active).tolist())
    # No more than `count` images of a column can matter: the others of them are taken at most.
    order = np.argsort(-similarity, axis=0, kind="stable")[:count]
    pairs = sorted((-similarity[i, k], int(i), int(k)) for k in free_places for i in order[:, k])
    for _, image, k in pairs:
        if image in free_images and k in free_places:
            free_images.remove(image)
            free_places.remove(k)
            yield image, k


def _batches(dataset: Any, size: int) -> Iterator[tuple[Any, Tensor, list[int]]]:
    for start in range(0, len(dataset), size):
        places = list(range(start, min(start + size, len(dataset))))
        items = [dataset[i] for i in places]
        labels = torch.tensor([int(item[1]) for item in items])
        yield _together([item[0] for item in items]), labels, places


def _together(images: list[Any]) -> Any:
    return torch.stack(images) if isinstance(images[0], Tensor) else images


def _path(dataset: Any, index: int) -> str | None:
    return dataset.path(index) if index != NONE and hasattr(dataset, "path") else None


def content_hash(image: Any) -> str:
    """SHA-256 of an image's numbers: a tensor or a PIL image."""
    data = image.numpy().tobytes() if isinstance(image, Tensor) else image.tobytes()
    return hashlib.sha256(data).hexdigest()
