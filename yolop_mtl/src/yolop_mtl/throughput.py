"""How many training images a core makes in a second, from files to tensors."""

import time
from collections.abc import Sequence

import cv2
import torch

from yolop_mtl.augment_config import AugmentConfig
from yolop_mtl.config import DataConfig
from yolop_mtl.dataset import DrivingDataset
from yolop_mtl.records import Record


def loader_throughput(
    records: Sequence[Record],
    data: DataConfig,
    augment: AugmentConfig,
    *,
    tasks: Sequence[str],
    seconds: float = 10.0,
    seed: int = 0,
) -> float:
    """Images per second of processor time, on one thread.

    Processor time, not the clock's, so that other programs do not count; nor does waiting for a
    disk. Files are read once before, so they come from memory.

    Args:
        records: images and labels; they are gone through again and again.
        data: input size and form of the masks.
        augment: what is done to the images.
        tasks: whose labels are read.
        seconds: of processor time to measure at least; whole rounds are made.
        seed: of the augmentation.

    Raises: as `DrivingDataset` and `read_sample`.
    """
    dataset = DrivingDataset(records, data, tasks=tasks, augment=augment, seed=seed)
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        for index in range(len(dataset)):
            dataset.read(index)
        count, start = 0, time.process_time()
        while (spent := time.process_time() - start) < seconds or not count:
            dataset.set_epoch(count // len(dataset))
            for index in range(len(dataset)):
                dataset[index]
            count += len(dataset)
        return count / spent
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
