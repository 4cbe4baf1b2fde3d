"""Images of a split as the network takes them: items, batches, loaders.

Everything random is a function of numbers: the order of images of (seed, epoch), the augmentation
of an image of (seed, epoch, index). So the number of loader processes changes nothing.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.ops import box_convert

from shared_utils.errors import InputError
from shared_utils.seeding import seed_worker
from yolop_mtl.augment_config import AugmentConfig
from yolop_mtl.config import DataConfig
from yolop_mtl.geometry import Letterbox, fit
from yolop_mtl.model import check_tasks
from yolop_mtl.mosaic import draw_sample
from yolop_mtl.records import Record
from yolop_mtl.samples import Sample, read_sample
from yolop_mtl.targets import ImageTargets, Targets, collate_targets


class Item(NamedTuple):
    """An image for the network.

    Attributes:
        image: (3, H, W) uint8, RGB.
        targets: its truth, in pixels of the input.
        letterbox: how the file's image lies in the input; None when augmented.
        index: number of the image in its split.
        truth: its truth in pixels of the file, with an image of (0, 0, 3); None when augmented.
    """

    image: Tensor
    targets: ImageTargets
    letterbox: Letterbox | None
    index: int  # type: ignore[assignment]  # tuple has a method of that name
    truth: Sample | None


class Batch(NamedTuple):
    """Images together: the fields of `Item` for B of them, None where an item has None.

    Attributes:
        images: (B, 3, H, W) uint8, RGB.
        targets: their truth, in pixels of the input.
        letterboxes: one for each image.
        indices: numbers of the images in their split.
        truths: one for each image.
    """

    images: Tensor
    targets: Targets
    letterboxes: list[Letterbox] | None
    indices: list[int]
    truths: list[Sample] | None


class DrivingDataset(Dataset[Item]):
    """Images of a split: letterboxed, or augmented anew in every epoch."""

    def __init__(
        self,
        records: Sequence[Record],
        data: DataConfig,
        *,
        tasks: Sequence[str],
        augment: AugmentConfig | None,
        seed: int,
    ) -> None:
        """Build.

        Args:
            records: of the split, one or more.
            data: input size and form of the masks.
            tasks: whose labels are read.
            augment: how to augment; None: letterbox alone, and items hold the truth too.
            seed: of the augmentation.

        Raises: InputError for no record, or an unknown task.
        """
        if not records:
            raise InputError("data", "no image", "one or more", "check data.root and the split")
        self.records, self.data, self.augment, self.seed = list(records), data, augment, seed
        self.tasks = check_tasks(tasks)
        # Shared memory, so that it reaches loader processes that live longer than an epoch.
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that order and augmentation are drawn for."""
        return int(self._state[0])

    def set_epoch(self, epoch: int, *, close_mosaic: bool = False) -> None:
        """Draw order and augmentation of this epoch from now on.

        Args:
            epoch: from 0.
            close_mosaic: go without mosaic and mixup.
        """
        self._state[0], self._state[1] = epoch, int(close_mosaic)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def __getitem__(self, index: int) -> Item:
        """An image. Raises: as `read_sample`."""
        if self.augment is None:
            return self._letterboxed(index)
        sample = draw_sample(
            self.read,
            index,
            len(self),
            self.augment,
            self.data.img_size,
            np.random.default_rng((self.seed, self.epoch, index)),
            close_mosaic=bool(self._state[1]),
        )
        return Item(_tensor(sample.image), image_targets(sample), None, index, None)

    def read(self, index: int) -> Sample:
        """An image as its files have it. Raises: as `read_sample`."""
        return read_sample(self.records[index], self.data, self.tasks)

    def _letterboxed(self, index: int) -> Item:
        sample = self.read(index)
        height, width = sample.image.shape[:2]
        box = fit((height, width), self.data.img_size)
        boxes = sample.boxes_xyxy
        inside = Sample(
            box.image(sample.image),
            None if boxes is None else box.boxes(boxes.astype(np.float64)).astype(np.float32),
            sample.labels,
            None if sample.drivable is None else box.mask(sample.drivable),
            None if sample.lane is None else box.mask(sample.lane),
        )
        truth = sample._replace(image=np.zeros((0, 0, 3), dtype=np.uint8))
        return Item(_tensor(inside.image), image_targets(inside), box, index, truth)


def image_targets(sample: Sample) -> ImageTargets:
    """The labels of a sample as tensors; its pixels are those of the input."""
    boxes = None
    if sample.boxes_xyxy is not None:
        boxes = box_convert(torch.from_numpy(sample.boxes_xyxy), "xyxy", "cxcywh")
    rest = (sample.labels, sample.known, sample.drivable, sample.lane)
    labels, known, drivable, lane = (None if x is None else torch.from_numpy(x) for x in rest)
    return ImageTargets(boxes, labels, known, drivable, lane)


def _tensor(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def collate(items: Sequence[Item]) -> Batch:
    """Join images of one size."""
    images = torch.stack([item.image for item in items])
    height, width = images.shape[2:]
    targets = collate_targets([item.targets for item in items], (height, width))
    letterboxes = [item.letterbox for item in items if item.letterbox is not None]
    truths = [item.truth for item in items if item.truth is not None]
    return Batch(
        images,
        targets,
        letterboxes if len(letterboxes) == len(items) else None,
        [item.index for item in items],
        truths if len(truths) == len(items) else None,
    )


def build_loader(
    dataset: DrivingDataset,
    *,
    batch_size: int,
    shuffle: bool,
    num_workers: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool,
) -> DataLoader[Item]:
    """Batches of this process's share of the images.

    Shuffled, every process has equally many, and those left over, others in every epoch, wait for
    another epoch. Otherwise every image is in exactly one share, and a process may have one less.

    Args:
        dataset: its `set_epoch` sets the order too.
        batch_size: images of a batch.
        shuffle: in an order drawn from (seed, epoch).
        num_workers: loader processes; 0: none but this one.
        seed: of the order.
        rank: number of this process.
        world_size: number of processes.
        drop_last: leave out a last batch that is smaller.

    Raises: InputError where a process would have no image, or no whole batch with `drop_last`.
    """
    share = _Share(dataset, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
    least = world_size * (batch_size if drop_last else 1)
    if shuffle and len(dataset) < least:
        got, do = f"{len(dataset)} images", "add images, or make the batch smaller"
        raise InputError("data", got, f"{least} or more for a batch", do)
    # OpenCV's own threads do not live on in a forked process, which would wait for them for ever.
    cv2.setNumThreads(1)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=share,
        num_workers=num_workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(seed),
    )


def _start_worker(number: int) -> None:
    seed_worker(number)
    cv2.setNumThreads(1)  # the processes are parallel enough


class _Share(Sampler[int]):
    """The indices of one process."""

    def __init__(
        self, dataset: DrivingDataset, *, shuffle: bool, seed: int, rank: int, world_size: int
    ) -> None:
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        count = len(self.dataset)
        if self.shuffle:
            return count // self.world_size
        return len(range(self.rank, count, self.world_size))

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)
        if not self.shuffle:
            yield from range(self.rank, count, self.world_size)
            return
        order = np.random.default_rng((self.seed, self.dataset.epoch)).permutation(count)
        yield from map(int, order[self.rank :: self.world_size][: len(self)])
