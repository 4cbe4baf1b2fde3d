"""Images of a run: splits, transforms, loaders.

Everything random is a function of seeds and numbers: which images a split holds depends on a fixed
seed, their order on (run seed, epoch), an image's augmentation on (run seed, epoch, index). So the
number of loader processes changes nothing.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from dnc.config import DataConfig
from dnc.sources import Pool, load_pools
from shared_utils.checkpoint import reading
from shared_utils.errors import InputError
from shared_utils.seeding import seed_worker

CACHE_BYTES = 512 * 2**20  # of resized uint8 pixels of all splits together
SPLIT_SEED = 0
PADDING = 8  # a padded crop adds an eighth of the side


class ImageSet(Dataset[tuple[Tensor, int, int]]):
    """Images of one split: item i is (float32 (3, S, S) normalised, label, i)."""

    def __init__(self, pool: Pool, cfg: DataConfig, *, is_augmented: bool, seed: int) -> None:
        """`is_augmented`: draw the training augmentation, anew in every epoch."""
        self.pool, self.cfg, self.is_augmented, self.seed = pool, cfg, is_augmented, seed
        self.cut, self.drawn, self.finish = _transforms(cfg, is_augmented)
        # Shared memory, so that it reaches loader processes that live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._cache: list[Tensor] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pool)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64, not to be changed."""
        return self.pool.labels

    def set_epoch(self, epoch: int) -> None:
        """Draw order and augmentation of this epoch from now on."""
        self._epoch.fill_(epoch)

    def path(self, index: int) -> str:
        """How a user finds an image."""
        return self.pool.name(index)

    def image(self, index: int) -> Image.Image:
        """An image at its own size, for pictures."""
        return self.pool.image(index)

    def plain(self) -> "ImageSet":
        """The same images without augmentation."""
        twin = ImageSet(self.pool, self.cfg, is_augmented=False, seed=self.seed)
        if not _crops_freely(self.cfg, self.is_augmented):
            twin._cache = self._cache
        return twin

    def hold(self) -> None:
        """Keep the pixels in memory, as far as they are the same in every epoch."""
        if not _crops_freely(self.cfg, self.is_augmented):
            with ThreadPoolExecutor() as pool:
                self._cache = list(pool.map(self._pixels, range(len(self))))

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """Image, label and index.  Raises: InputError naming an image that cannot be read."""
        pixels = self._cache[index] if self._cache is not None else self._pixels(index)
        if self.is_augmented:
            with _drawing(_seed_of(self.seed, int(self._epoch), index)):
                pixels = self.finish(self.drawn(pixels))
        else:
            pixels = self.finish(pixels)
        return pixels, int(self.pool.labels[index]), index

    def _pixels(self, index: int) -> Tensor:
        pixels: Tensor = self.cut(self.pool.image(index))
        return pixels


@dataclass(frozen=True)
class DataSplits:
    """What `load_data` gives.

    Attributes:
        name: of the source.
        class_names: what is trained on: classes, or their groups.
        train: augmented.
        val: or None.
        test: or None.
        skipped: names of images that were left out.
        fine_names: the classes within the groups, or None.
        fine: split -> (N,) their labels, where there are groups.
    """

    name: str
    class_names: list[str]
    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    skipped: list[str]
    fine_names: list[str] | None
    fine: Mapping[str, np.ndarray]

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def summary(self) -> dict[str, Any]:
        """The `data` part of result.json."""
        sizes = {"train": self.train, "val": self.val, "test": self.test}
        counts = {f"{name}_images": len(part or ()) for name, part in sizes.items()}
        return {"name": self.name, **counts, "skipped": len(self.skipped)}


def load_data(cfg: DataConfig, *, seed: int) -> DataSplits:
    """Read, split and check a source.

    Raises: InputError for what the user can mend: a class without a training image, a single class,
        images that cannot be read unless `skip_bad`.
    """
    pools = split_pools(load_pools(cfg.source, cfg.root), cfg)
    fine_names, fine = None, {}
    if cfg.groups is not None:
        fine_names = pools["train"].class_names
        fine = {name: pool.labels for name, pool in pools.items()}
        pools = _grouped(pools, cfg.groups)
    sets = {
        name: ImageSet(pool, cfg, is_augmented=name == "train", seed=seed)
        for name, pool in pools.items()
    }
    total = sum(len(pool) for pool in pools.values()) * 3 * cfg.img_size**2
    skipped: list[str] = []
    if total <= CACHE_BYTES:
        for name in list(sets):
            pool, bad = _readable(pools[name], cfg.skip_bad)
            if bad:
                skipped += [pools[name].name(i) for i in bad]
                keep = np.setdiff1d(np.arange(len(pools[name])), bad)
                fine = {**fine, name: fine[name][keep]} if fine else fine
                sets[name] = ImageSet(pool, cfg, is_augmented=name == "train", seed=seed)
            sets[name].hold()
    train = sets["train"]
    _check_classes(train.pool)
    return DataSplits(
        Path(cfg.source).name,
        train.pool.class_names,
        train,
        sets.get("val"),
        sets.get("test"),
        skipped,
        fine_names,
        fine,
    )


def load_other(cfg: DataConfig, source: str, split: str) -> ImageSet:
    """Images of another source than the run's own, without augmentation.

    Args:
        cfg: of the run; its counts of images are its own source's and mean nothing here.
        source: as `data.source`.
        split: `train`, `val` or `test` of a source that tells them apart; of any other all images.

    Raises: MissingFileError, or InputError for a split that the source has not.
    """
    pools = load_pools(source, cfg.root)
    if cfg.groups is not None:
        pools = _grouped(pools, cfg.groups)
    if len(pools) > 1 and split not in pools:
        raise InputError("split", f"'{split}', which {source} has not", "another", "name it")
    pool = pools[split] if len(pools) > 1 else pools["train"]
    images = ImageSet(pool, cfg, is_augmented=False, seed=0)
    if len(images) * 3 * cfg.img_size**2 <= CACHE_BYTES:
        images = ImageSet(_readable(pool, cfg.skip_bad)[0], cfg, is_augmented=False, seed=0)
        images.hold()
    return images


def split_pools(pools: Mapping[str, Pool], cfg: DataConfig) -> dict[str, Pool]:
    """Draw the splits that the source has not from its training images, by a fixed seed."""
    train, found = pools["train"], dict(pools)
    order = np.random.RandomState(SPLIT_SEED).permutation(len(train))
    if "val" not in pools:
        wants_test = "test" not in pools
        num_val = cfg.num_val or len(train) // 10
        num_test = cfg.num_test if wants_test else 0
        num_train = cfg.num_train or len(train) - num_val - num_test
        if wants_test and cfg.num_train and not cfg.num_test:
            num_test = max(0, len(train) - num_train - num_val)
        if num_train < 1 or num_train + num_val + num_test > len(train):
            raise InputError(
                "data.num_train, num_val and num_test",
                f"{num_train} + {num_val} + {num_test}",
                f"at most {len(train)}, the images of {cfg.source}, and some to train on",
                "lower them",
            )
        ends = np.cumsum([num_train, num_val, num_test])
        parts = np.split(order[: ends[-1]], ends[:-1])
        for name, part in zip(("train", "val", "test"), parts, strict=True):
            if len(part):
                found[name] = train.some(part)
    if cfg.limit:
        for name, pool in found.items():
            found[name] = pool.some(_spread(pool.labels, cfg.limit))
    return found


def build_loader(
    images: ImageSet, cfg: DataConfig, *, train: bool, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """Batches of (B, 3, S, S), labels (B,) and indices (B,), of this process's share.

    In training all processes have the same number of images, the last ones twice where they do not
    divide; otherwise each image is had once by one of them.
    """
    sampler = _Share(images, is_shuffled=train, rank=rank, world_size=world_size)
    # A single image has no statistics for a batch norm behind the last pooling.
    is_lone = train and len(sampler) > cfg.batch_size and len(sampler) % cfg.batch_size == 1
    return DataLoader(
        images,
        batch_size=cfg.batch_size,
        sampler=sampler,
        drop_last=is_lone,
        num_workers=cfg.num_workers,
        persistent_workers=cfg.num_workers > 0,
        worker_init_fn=seed_worker,
        pin_memory=torch.cuda.is_available(),
    )


class _Share(Sampler[int]):
    def __init__(self, images: ImageSet, *, is_shuffled: bool, rank: int, world_size: int) -> None:
        self.images, self.is_shuffled = images, is_shuffled
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        count = len(self.images)
        if self.is_shuffled:
            return -(-count // self.world_size)
        return len(range(self.rank, count, self.world_size))

    def __iter__(self) -> Iterator[int]:
        count = len(self.images)
        if not self.is_shuffled:
            yield from range(self.rank, count, self.world_size)
            return
        rng = np.random.default_rng((self.images.seed, int(self.images._epoch)))
        order = rng.permutation(count)
        padded = np.resize(order, len(self) * self.world_size)
        yield from map(int, padded[self.rank :: self.world_size])


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Seed the CPU's generator, from which torchvision draws, and put its state back after.

    Ten times quicker than torch.random.fork_rng and torch.manual_seed, which visit all devices.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def eval_transform(cfg: DataConfig) -> v2.Compose:
    """PIL image -> (3, S, S) float32, normalised: what evaluation sees."""
    cut, _, finish = _transforms(cfg, False)
    return v2.Compose([cut, finish])


def _crops_freely(cfg: DataConfig, is_augmented: bool) -> bool:
    """Whether an image's crop depends on more than its centre, so that it is cut anew each time."""
    return is_augmented and cfg.crop == "resized"


def _transforms(cfg: DataConfig, is_augmented: bool) -> tuple[Any, Any, Any]:
    """What is the same in every epoch, what is drawn, and what makes numbers of it."""
    size = cfg.img_size
    bicubic = v2.InterpolationMode.BICUBIC
    cut: list[Any] = [v2.PILToTensor()]
    if not _crops_freely(cfg, is_augmented):
        cut += [v2.Resize(cfg.resize or size, bicubic, antialias=True), v2.CenterCrop(size)]
    drawn: list[Any] = []
    if cfg.crop == "pad":
        drawn.append(v2.RandomCrop(size, padding=size // PADDING))
    elif cfg.crop == "resized":
        drawn.append(v2.RandomResizedCrop(size, interpolation=bicubic, antialias=True))
    if cfg.flip:
        drawn.append(v2.RandomHorizontalFlip())
    if cfg.randaugment:
        drawn.append(v2.RandAugment(2, 9))
    finish: list[Any] = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(cfg.mean, cfg.std)]
    if cfg.erasing and is_augmented:
        finish.append(v2.RandomErasing(cfg.erasing))
    nothing = v2.Identity()
    return v2.Compose(cut), v2.Compose(drawn) if drawn else nothing, v2.Compose(finish)


def _readable(pool: Pool, skip_bad: bool) -> tuple[Pool, list[int]]:
    def is_bad(place: int) -> bool:
        try:
            pool.image(place)
        except InputError:
            return True
        return False

    with ThreadPoolExecutor() as threads:
        bad = [i for i, found in enumerate(threads.map(is_bad, range(len(pool)))) if found]
    if bad and not skip_bad:
        told = ", ".join(pool.name(i) for i in bad[:3]) + ", ..." * (len(bad) > 3)
        raise InputError(
            "data.source",
            f"{len(bad)} images that cannot be read ({told})",
            "readable ones",
            "remove them or give --data.skip-bad",
        )
    return pool.some(np.setdiff1d(np.arange(len(pool)), bad)) if bad else pool, bad


def _spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Places of at most `count` images, as evenly over the classes as there are."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        turn[own] = np.arange(len(own))
    return np.sort(np.argsort(turn, kind="stable")[:count])


def _grouped(pools: Mapping[str, Pool], path: Path) -> dict[str, Pool]:
    with reading(path, "a JSON file {class: group}"):
        groups = json.loads(path.read_text())
    names = pools["train"].class_names
    missing = [name for name in names if name not in groups]
    if missing:
        raise InputError(
            "data.groups",
            f"no group for {missing[0]} ({len(missing)} of {len(names)} classes)",
            "one for each class",
            f"add them to {path}",
        )
    told = sorted({str(groups[name]) for name in names})
    number = np.array([told.index(str(groups[name])) for name in names])
    return {
        split: Pool(number[pool.labels], told, pool.read, pool.name)
        for split, pool in pools.items()
    }


def _check_classes(pool: Pool) -> None:
    if len(pool.class_names) < 2:
        raise InputError(
            "data.source", "one class", "two or more", "add a folder of images for another"
        )
    counts = np.bincount(pool.labels, minlength=len(pool.class_names))
    if (counts == 0).any():
        name = pool.class_names[int(counts.argmin())]
        raise InputError(
            "data.source",
            f"no training image of class {name}",
            "at least one of each class",
            "add some or remove the class",
        )
