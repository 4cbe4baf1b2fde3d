"""Data sets of the E²VPT commands: splits, the check for bad images, augmentation, loaders.

Everything random is a function of seeds and numbers: which images a split holds depends on a fixed
seed, their order on (run seed, epoch), an image's augmentation on (run seed, epoch, index). So the
number of loader processes changes nothing.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from e2vpt.config import DataConfig
from e2vpt.images import IMAGENET_MEAN, IMAGENET_STD, Augment, Preprocessing, UnreadableImage
from e2vpt.readers import Pool, some_of
from e2vpt.sources import load_source
from e2vpt.splits import limited, split_source
from shared_utils.errors import InputError
from shared_utils.seeding import seed_worker

FULL_CHECK_BYTES = 256 * 2**20  # encoded; splits above it have only their headers read
CACHE_BYTES = 512 * 2**20  # resized uint8 pixels of all splits together
CHUNK = 64  # images per piece of a thread's work
ORDER, AUGMENT = 1, 2  # first words of the seeds, so that the two streams differ


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images of one split: item i is (float32 (3, H, W) normalised, label).

    Args:
        pool: the images and labels.
        preprocessing: resize, crop, normalise.
        augment: none, flip, crop or crop-flip, drawn anew in every epoch.
        seed: of order and augmentation.
        cache: uint8 (3, h, w) per image, what `preprocessing.resized` gives, if held in memory.
    """

    def __init__(
        self,
        pool: Pool,
        preprocessing: Preprocessing,
        *,
        augment: Augment = "none",
        seed: int = 0,
        cache: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.pool, self.preprocessing, self.augment = pool, preprocessing, augment
        self.seed = seed % 2**63
        self._cache = cache
        # Shared memory, so that set_epoch reaches loader processes that live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pool)

    @property
    def labels(self) -> list[int]:
        """The label of every image, not to be changed."""
        return self.pool.labels

    @property
    def epoch(self) -> int:
        """The epoch whose order and augmentation are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw order and augmentation of this epoch from now on; call it before iterating."""
        self._epoch.fill_(epoch)

    def path(self, index: int) -> str:
        """How the user finds image `index`: its path, or the packed file and its number there."""
        return self.pool.name(index)

    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB at its own size, for pictures."""
        return self.pool.image(index)

    def with_augment(self, augment: Augment) -> "ImageSet":
        """The same images (cache shared) with another augmentation, `none` to evaluate on them."""
        return ImageSet(
            self.pool, self.preprocessing, augment=augment, seed=self.seed, cache=self._cache
        )

    def with_seed(self, seed: int) -> "ImageSet":
        """The same images (cache shared) in another order, with other augmentation."""
        return ImageSet(
            self.pool, self.preprocessing, augment=self.augment, seed=seed, cache=self._cache
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image and label.

        Raises:
            UnreadableImage: naming the path; only where the check at loading did not decode it, or
                the file has changed since.
        """
        prep = self.preprocessing
        if self._cache is not None:
            pixels = torch.from_numpy(self._cache[index])
        else:
            pixels = prep.resized(self.pool.image(index))
        if self.augment == "none":
            pixels = prep.center_crop(pixels)
        else:
            rng = np.random.default_rng((AUGMENT, self.seed, self.epoch, index % len(self)))
            pixels = prep.augmented(pixels, self.augment, rng)
        return prep.normalized(pixels), self.pool.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int] | UnreadableImage]:
        """A batch, for torch's loader.

        In a loader process an unreadable image becomes an item: torch would wrap an exception in
        another one with a traceback, and the user could not see the one line.
        """
        try:
            return [self[i] for i in indices]
        except UnreadableImage as error:
            if get_worker_info() is None:
                raise
            return [error]


@dataclass(frozen=True)
class DataSplits:
    """What `load_data` gives; val or test is None where the source has none."""

    name: str
    class_names: list[str]
    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    skipped: list[str]
    """paths of the images left out by `skip_bad`"""
    preprocessing: Preprocessing

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def num_skipped(self) -> int:
        """How many unreadable images were left out."""
        return len(self.skipped)

    def summary(self) -> dict[str, Any]:
        """The `data` part of result.json."""
        counts = {
            f"{split}_images": len(images) if images is not None else 0
            for split, images in (("train", self.train), ("val", self.val), ("test", self.test))
        }
        return {"name": self.name, **counts, "skipped_images": self.num_skipped}


def load_data(
    cfg: DataConfig,
    *,
    img_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> DataSplits:
    """List, split, limit and check the images of `cfg.source`.

    Splits are those of `splits.split_source`; they do not depend on `seed`.

    Check. Splits of up to 256 MiB of files are decoded once by a few threads; of larger ones only
    the headers are read. If the resized pixels of all splits fit into 512 MiB, those of the
    decoded splits stay in memory, and training decodes nothing.

    Args:
        cfg: the data part of the configuration.
        img_size: (H, W), the backbone's own input; `cfg.img_size` overrides it.
        mean: the backbone's pixel statistics, per channel on values 0 to 1, ...
        std: ... used with `normalize="checkpoint"`.
        seed: of order and augmentation.

    Raises:
        MissingFileError, InputError: the source or what it lists is wrong, see `load_source`;
            counts that do not fit it; unreadable images, all named at once (5 shown).
    """
    preprocessing = build_preprocessing(cfg, img_size=img_size, mean=mean, std=std)
    source = load_source(cfg.source, skip_missing=cfg.skip_bad)
    pools = split_source(source, cfg)
    if cfg.limit:
        pools = {split: limited(pool, cfg.limit) for split, pool in pools.items()}
    caches: dict[str, list[np.ndarray] | None] = {}
    unreadable: list[UnreadableImage] = []
    budget = CACHE_BYTES
    for split, pool in pools.items():
        good, caches[split], bad = _check(pool, preprocessing, budget)
        budget -= sum(pixels.nbytes for pixels in caches[split] or ())
        unreadable += bad
        pools[split] = pool.take(good)
    if unreadable and not cfg.skip_bad:
        told = some_of([f"{error.name} ({error.reason})" for error in unreadable])
        raise InputError(
            "data.source",
            f"{len(unreadable)} unreadable image{'s' * (len(unreadable) > 1)}: {told}",
            "readable ones only",
            "remove them or give --data.skip-bad",
        )
    for split, pool in pools.items():
        if len(pool) == 0:
            raise InputError(
                "data.source",
                f"only unreadable images in the {split} split",
                "some images",
                "restore them",
            )
    sets = {
        split: ImageSet(
            pool,
            preprocessing,
            augment=cfg.augment if split == "train" else "none",
            seed=seed,
            cache=caches[split],
        )
        for split, pool in pools.items()
    }
    return DataSplits(
        source.name,
        source.class_names,
        sets["train"],
        sets.get("val"),
        sets.get("test"),
        [error.name for error in unreadable],
        preprocessing,
    )


def build_preprocessing(
    cfg: DataConfig, *, img_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Preprocessing:
    """The fixed part of the input pipeline; the arguments are those of `load_data`."""
    if cfg.normalize == "imagenet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif cfg.normalize == "none":
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    size = (cfg.img_size, cfg.img_size) if cfg.img_size else (int(img_size[0]), int(img_size[1]))
    return Preprocessing(size, tuple(map(float, mean)), tuple(map(float, std)), cfg.resize)


def _check(
    pool: Pool,
    preprocessing: Preprocessing,
    budget: int,
) -> tuple[list[int], list[np.ndarray] | None, list[UnreadableImage]]:
    """Positions of the readable images, their resized pixels if they fit into `budget`, the bad."""
    decode = sum(pool.reader.num_bytes(i) for i in pool.indices) <= FULL_CHECK_BYTES
    keep = (
        decode and len(pool) * 3 * preprocessing.img_size[0] * preprocessing.img_size[1] <= budget
    )

    def check(start: int) -> list[np.ndarray | UnreadableImage | None]:
        found: list[np.ndarray | UnreadableImage | None] = []
        for position in range(start, min(start + CHUNK, len(pool))):
            try:
                if decode:
                    image = pool.image(position)
                    found.append(preprocessing.resized(image).numpy() if keep else None)
                else:
                    pool.reader.probe(pool.indices[position])
                    found.append(None)
            except UnreadableImage as error:
                found.append(error)
        return found

    good: list[int] = []
    cache: list[np.ndarray] = []
    bad: list[UnreadableImage] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for found in threads.map(check, range(0, len(pool), CHUNK)):
            for result in found:
                position = len(good) + len(bad)
                if isinstance(result, UnreadableImage):
                    bad.append(result)
                    continue
                good.append(position)
                if keep and result is not None:
                    cache.append(result)
                    budget -= result.nbytes
            if budget < 0:  # larger than thought, as a crop's resized images are: keep none
                keep = False
                cache.clear()
    return good, cache if keep else None, bad


class EpochOrder(Sampler[int]):
    """This process's share of all positions in a random order.

    The order is that of (seed, epoch) of the set, or drawn from `generator`. Shares have one
    length: the order is filled up from its start, so that all processes take as many steps.

    It has no `set_epoch`: Fabric would call that with a count of its own, which restarts when a run
    is resumed.
    """

    def __init__(
        self,
        images: ImageSet,
        generator: torch.Generator | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.generator = images, generator
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Number of images of this process."""
        return -(-len(self.images) // self.world_size)

    def __iter__(self) -> Iterator[int]:
        """The order, drawn once per pass in the calling process."""
        if self.generator is not None:
            order = torch.randperm(len(self.images), generator=self.generator).tolist()
        else:
            rng = np.random.default_rng((ORDER, self.images.seed, self.images.epoch))
            order = rng.permutation(len(self.images)).tolist()
        order += order[: len(self) * self.world_size - len(order)]
        return iter(order[self.rank :: self.world_size])


class ImageLoader(DataLoader[tuple[Tensor, int]]):
    """A loader that raises what its processes could not read as it is, without a wrapping."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        """Batches: float32 (B, 3, H, W) and int64 (B,). Raises UnreadableImage."""
        bad = None
        for batch in super().__iter__():
            if isinstance(batch, UnreadableImage):
                bad = batch
                break
            yield batch
        if bad is not None:
            self._iterator = None  # ends its processes now; left to the collector it takes seconds
            raise bad


def build_loader(
    image_set: ImageSet,
    cfg: DataConfig,
    *,
    train: bool,
    generator: torch.Generator | None = None,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> ImageLoader:
    """Batches of `cfg.batch_size`, the last one may be smaller.

    Args:
        image_set: call its `set_epoch` before each pass.
        cfg: batch size and number of loader processes.
        train: shuffle; otherwise the set's own order.
        generator: draw the order from it, once per pass; without it, which makes resuming simple,
            the order is that of (seed, epoch) of the set. No other random state is touched.
        rank: which of `world_size` processes this is. In training all get as many images; in
            evaluation each image goes to one process.
        world_size: number of processes that share the set.
        pin_memory: page-locked batches, for copying to a GPU.
    """
    return ImageLoader(
        image_set,
        batch_size=cfg.batch_size,
        sampler=(
            EpochOrder(image_set, generator, rank=rank, world_size=world_size)
            if train
            else range(rank, len(image_set), world_size)
        ),
        num_workers=cfg.num_workers,
        collate_fn=_collate,
        worker_init_fn=seed_worker,
        generator=torch.Generator().manual_seed(image_set.seed),
        persistent_workers=cfg.num_workers > 0,
        pin_memory=pin_memory,
    )


def _collate(items: Sequence[tuple[Tensor, int] | UnreadableImage]) -> Any:
    bad = next((item for item in items if isinstance(item, UnreadableImage)), None)
    return bad if bad is not None else default_collate(list(items))
