"""Items, batches and loaders: letterboxed or augmented, the same in any number of processes."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from yolop_mtl.augment_config import AugmentConfig
from yolop_mtl.config import DataConfig
from yolop_mtl.dataset import Batch, DrivingDataset, build_loader, collate
from yolop_mtl.model import TASKS
from yolop_mtl.records import Record
from yolop_mtl.throughput import loader_throughput

from .coloured_scenes import scene, write

SIZE = (90, 160)
DATA = DataConfig(img_size=(64, 96))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("scenes")
    return [write(folder, str(seed), scene(seed, SIZE, num_boxes=seed % 3)) for seed in range(7)]


def build(
    records: list[Record], augment: AugmentConfig | None = None, seed: int = 0
) -> DrivingDataset:
    return DrivingDataset(records, DATA, tasks=TASKS, augment=augment, seed=seed)


def load(dataset: DrivingDataset, **options: object) -> list[Batch]:
    given = {"batch_size": 2, "shuffle": True, "num_workers": 0, "seed": 0, "drop_last": False}
    return list(build_loader(dataset, **(given | options)))


def equal(first: Batch, second: Batch) -> bool:
    pairs = zip(first.targets, second.targets, strict=True)
    same = all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
    return same and torch.equal(first.images, second.images) and first.indices == second.indices


# ---- items ----------------------------------------------------------------------------------


def test_without_augmentation_an_item_is_letterboxed_and_keeps_its_truth(
    records: list[Record],
) -> None:
    item = build(records)[2]
    truth = scene(2, SIZE, num_boxes=2)
    assert (item.image.shape, item.image.dtype) == ((3, 64, 96), torch.uint8)
    assert (item.letterbox.inner, item.letterbox.top, item.index) == ((54, 96), 5, 2)
    assert (item.image[:, :5] == 114).all()
    boxes = item.targets.boxes_cxcywh.numpy()
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    assert np.allclose(item.letterbox.native_boxes(corners), truth.boxes_xyxy, atol=1e-3)
    assert item.truth.image.shape == (0, 0, 3)
    for one, two in zip(item.truth[1:], truth[1:], strict=True):
        assert np.array_equal(one, two)
    # Red, green and blue are where the truth says.
    red, green = item.image[0] > 127, item.image[1] > 127
    assert (green == (item.targets.drivable == 1)).float().mean() > 0.99
    inside = torch.zeros(64, 96, dtype=torch.bool)
    for x1, y1, x2, y2 in corners.round().astype(int):
        inside[y1:y2, x1:x2] = True
    assert (red == inside).float().mean() > 0.99


def test_an_augmented_item_has_neither_letterbox_nor_truth(records: list[Record]) -> None:
    item = build(records, AugmentConfig())[0]
    assert (item.image.shape, item.image.dtype) == ((3, 64, 96), torch.uint8)
    assert (item.letterbox, item.truth, item.targets.known) == (None, None, None)
    assert item.targets.lane.shape == (64, 96)
    assert item.targets.boxes_cxcywh.dtype == torch.float32


def test_an_item_depends_on_seed_epoch_and_index_alone(records: list[Record]) -> None:
    dataset = build(records, AugmentConfig())
    first = dataset[3].image
    dataset[1]
    assert torch.equal(dataset[3].image, first)
    assert not torch.equal(build(records, AugmentConfig(), seed=1)[3].image, first)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[3].image, first)
    dataset.set_epoch(0)
    assert torch.equal(dataset[3].image, first)
    dataset.set_epoch(0, close_mosaic=True)
    closed = build(records, AugmentConfig(mosaic=0, mixup=0))
    assert not torch.equal(dataset[3].image, first)
    assert {len(dataset[i].targets.labels) for i in (0, 3, 6)} == {0}
    assert dataset[3].image.shape == closed[3].image.shape


def test_no_record_and_unknown_tasks_are_refused(records: list[Record]) -> None:
    with pytest.raises(ValueError, match="data: got no image, expected one or more"):
        build([])
    with pytest.raises(ValueError, match="tasks: got 'lanes', expected known tasks; did you mean"):
        DrivingDataset(records, DATA, tasks=("lanes",), augment=None, seed=0)


# ---- batches --------------------------------------------------------------------------------


def test_a_batch_of_differently_labelled_images(records: list[Record]) -> None:
    partly = [records[1], records[2]._replace(boxes_xyxy=None, lane=None), records[0]]
    dataset = build(partly)
    batch = collate([dataset[i] for i in range(3)])
    assert batch.images.shape == (3, 3, 64, 96)
    assert batch.indices == [0, 1, 2]
    assert batch.targets.images.tolist() == [0]
    assert batch.targets.known.all((1, 2)).tolist() == [True, False, True]
    assert (batch.targets.lane[1] == 255).all()
    assert not (batch.targets.drivable == 255).any()
    assert [len(batch.letterboxes), len(batch.truths)] == [3, 3]
    assert batch.truths[1].lane is None


# ---- loaders --------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [None, AugmentConfig(mixup=0.5)])
def test_worker_processes_change_nothing_and_see_the_epoch(
    records: list[Record], augment: AugmentConfig | None
) -> None:
    dataset, alone = build(records, augment), build(records, augment)
    options = {"batch_size": 2, "shuffle": True, "seed": 5, "drop_last": False}
    # The same processes serve all epochs.
    loader = build_loader(dataset, num_workers=2, **options)
    orders = []
    for epoch, close in ((0, False), (1, False), (1, True)):
        dataset.set_epoch(epoch, close_mosaic=close)
        alone.set_epoch(epoch, close_mosaic=close)
        many, one = list(loader), list(build_loader(alone, num_workers=0, **options))
        assert all(equal(a, b) for a, b in zip(many, one, strict=True))
        orders.append([index for batch in many for index in batch.indices])
    assert orders[0] != orders[1] == orders[2]
    assert sorted(orders[0]) == list(range(7))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_have_disjoint_shares(records: list[Record], world_size: int) -> None:
    dataset = build(records)

    def shares(shuffle: bool) -> list[list[int]]:
        return [
            [
                i
                for b in load(dataset, shuffle=shuffle, rank=r, world_size=world_size)
                for i in b.indices
            ]
            for r in range(world_size)
        ]

    # In validation each image once, however many there are.
    assert Counter(i for share in shares(False) for i in share) == Counter(range(7))
    # In training equally many, so that no process waits for another.
    first = shares(True)
    assert {len(share) for share in first} == {7 // world_size}
    assert max(Counter(i for share in first for i in share).values()) == 1
    dataset.set_epoch(1)
    assert shares(True) != first


def test_a_last_batch_is_smaller_or_left_out(records: list[Record]) -> None:
    dataset = build(records)
    sizes = [len(b.indices) for b in load(dataset, batch_size=3, shuffle=False)]
    assert sizes == [3, 3, 1]
    assert [len(b.indices) for b in load(dataset, batch_size=3, drop_last=True)] == [3, 3]
    with pytest.raises(ValueError, match="data: got 7 images, expected 8 or more for a batch"):
        load(dataset, batch_size=4, drop_last=True, world_size=2)


def test_a_worker_names_the_broken_file(records: list[Record], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"nothing")
    dataset = build([records[0]._replace(image=broken)])
    with pytest.raises(
        ValueError, match=r"broken\.jpg: got a damaged or unread.*labels$"
    ) as caught:
        load(dataset, num_workers=1)
    assert "\n" not in str(caught.value)


def test_throughput_is_a_rate_and_leaves_threads_alone(records: list[Record]) -> None:
    threads = torch.get_num_threads(), cv2.getNumThreads()
    rate = loader_throughput(records, DATA, AugmentConfig(), tasks=TASKS, seconds=0.1)
    assert np.isfinite(rate)
    assert rate > 0
    assert (torch.get_num_threads(), cv2.getNumThreads()) == threads
