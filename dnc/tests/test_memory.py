"""The queue against lists in plain Python, and the bank that collects whole batches."""

import io
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from dnc import NearestCentroidHead
from dnc.memory import Bank, Queue
from shared_utils.errors import InputError

CLASSES, WIDTH, SIZE = 4, 3, 5


def batch(number: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features that carry the index of their sample, which no two samples share."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, CLASSES - 1, (n,), generator=generator)  # the last has none
    indices = 100 * number + torch.arange(n)
    features = torch.stack([indices / 1024, labels.float(), torch.ones(n)], dim=1)
    return features, labels, indices


class Lists:
    """The last features of each class: the reference."""

    def __init__(self) -> None:
        self.kept: dict[int, list[tuple[list[float], int]]] = defaultdict(list)

    def push(self, features: Tensor, labels: Tensor, indices: Tensor) -> None:
        for feature, label, index in zip(features, labels.tolist(), indices.tolist(), strict=True):
            self.kept[label] = [*self.kept[label], (feature.tolist(), index)][-SIZE:]


def contents(queue: Queue, label: int) -> list[tuple[list[float], int]]:
    """Features and indices of a class, oldest first."""
    pushed = int(queue.pushed[label])
    places = [turn % SIZE for turn in range(max(0, pushed - SIZE), pushed)]
    return [(queue.features[label, p].tolist(), int(queue.indices[label, p])) for p in places]


# Batches of one or none, of many of one class, and several rounds of the ring.
@pytest.mark.parametrize("sizes", [[3, 1, 0, 4, 7], [60], [1] * 30, [2, 25, 2, 40, 11]])
def test_queue_keeps_the_last_of_each_class(sizes: list[int]) -> None:
    queue, lists = Queue(CLASSES, WIDTH, SIZE), Lists()
    for number, n in enumerate(sizes):
        queue.push(*batch(number, n))
        lists.push(*batch(number, n))
        for c in range(CLASSES):
            assert contents(queue, c) == lists.kept[c]
        features, labels = queue.read(torch.arange(CLASSES))
        for c in range(CLASSES):
            assert sorted(features[labels == c].tolist()) == sorted(f for f, _ in lists.kept[c])
    assert (queue.pushed > SIZE).any()  # the ring was closed


def test_indices_stay_with_their_features() -> None:
    queue = Queue(CLASSES, WIDTH, SIZE)
    assert (queue.indices == -1).all()
    for number in range(6):
        queue.push(*batch(number, 9))
    filled = queue.indices >= 0
    assert filled.sum(1).tolist() == [SIZE, SIZE, SIZE, 0]
    labels = torch.arange(CLASSES)[:, None].expand_as(filled)[filled]
    assert torch.equal((queue.features[filled][:, 0].float() * 1024).round(), queue.indices[filled])
    assert torch.equal(queue.features[filled][:, 1].long(), labels)


def test_reading_some_classes() -> None:
    queue = Queue(CLASSES, WIDTH, SIZE)
    queue.push(*batch(0, 7))
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    features, labels = queue.read(torch.tensor([3, 1]))
    assert features.dtype == torch.float32
    assert labels.eq(1).all()
    assert len(features) == len(labels) == int(queue.pushed[1]) > 0
    assert torch.equal(features[:, 1], labels.float())
    assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())


def test_what_is_read_is_a_copy() -> None:
    queue = Queue(CLASSES, WIDTH, SIZE)
    queue.push(*batch(0, 7))
    features, _ = queue.read(torch.arange(CLASSES))
    kept = features.clone()
    queue.push(*batch(1, 60))
    assert torch.equal(features, kept)


def test_nothing_to_read_and_nothing_to_push() -> None:
    queue = Queue(CLASSES, WIDTH, SIZE)
    none = torch.zeros(0, dtype=torch.int64)
    queue.push(torch.zeros(0, WIDTH), none, none)
    features, labels = queue.read(torch.arange(CLASSES))
    assert features.shape == (0, WIDTH)
    assert labels.shape == (0,)
    assert queue.read(none)[0].shape == (0, WIDTH)


def test_queue_is_in_half_precision_and_in_the_checkpoint() -> None:
    queue, other = Queue(CLASSES, WIDTH, SIZE), Queue(CLASSES, WIDTH, SIZE)
    queue.push(*batch(0, 30))
    state = queue.state_dict()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "features": (torch.float16, (CLASSES, SIZE, WIDTH)),
        "indices": (torch.int64, (CLASSES, SIZE)),
        "pushed": (torch.int64, (CLASSES,)),
    }
    other.load_state_dict(state)
    for memory in (queue, other):  # the place of the next one is restored as well
        memory.push(*batch(1, 7))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


# ---- bank ----


def test_bank_collects_batches_until_there_are_enough() -> None:
    bank, batches = Bank(WIDTH, 3), [batch(number, n) for number, n in enumerate([4, 0, 6])]
    for number, part in enumerate(batches):
        assert not bank.is_full
        bank.push(*part)
        assert int(bank.num_batches) == number + 1
    assert bank.is_full
    assert torch.equal(bank.indices, torch.cat([indices for _, _, indices in batches]))
    features, labels = bank.take()
    assert torch.equal(features, torch.cat([features for features, _, _ in batches]))
    assert torch.equal(labels, torch.cat([labels for _, labels, _ in batches]))
    assert not bank.is_full
    assert (bank.features.shape, bank.labels.shape, bank.indices.shape) == ((0, WIDTH), (0,), (0,))
    bank.push(*batches[2])
    assert torch.equal(bank.features, batches[2][0])  # it starts anew
    assert int(bank.num_batches) == 1


def test_bank_keeps_float32() -> None:
    bank, (features, labels, indices) = Bank(WIDTH, 3), batch(0, 4)
    bank.push(features.half(), labels, indices)
    assert bank.features.dtype == torch.float32
    assert bank.labels.dtype == bank.indices.dtype == torch.int64


@pytest.mark.parametrize("own", [0, 2, 30])
def test_bank_resumes_from_a_state_of_another_length(own: int) -> None:
    bank, other = Bank(WIDTH, 3), Bank(WIDTH, 3)
    for number in range(2):
        bank.push(*batch(number, 5))
    if own:
        other.push(*batch(7, own))
    other.load_state_dict(bank.state_dict())
    for memory in (bank, other):
        memory.push(*batch(2, 3))
    assert other.is_full
    for name, value in bank.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    other.features.zero_()  # what was loaded is a copy
    assert bank.features.any()


def test_bank_of_another_width_is_refused() -> None:
    wrong = Bank(WIDTH + 1, 3).state_dict()
    text = r"features: got width \(4,\), expected \(3,\); load it into a head of that width"
    with pytest.raises(InputError, match=text):
        Bank(WIDTH, 3).load_state_dict(wrong)


def test_bank_without_a_tensor_is_refused() -> None:
    state: dict[str, Any] = Bank(WIDTH, 3).state_dict()
    del state["labels"]
    with pytest.raises(RuntimeError, match="labels"):
        Bank(WIDTH, 3).load_state_dict(state)


def test_an_emptied_bank_takes_no_room() -> None:
    """A slice of no rows would hold on to all of them, in memory and in a checkpoint."""
    bank = Bank(WIDTH, 1)
    bank.push(*batch(0, 2000))
    bank.take()
    kept = (bank.features, bank.labels, bank.indices)
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 0
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    assert len(file.getvalue()) < 10_000


def step(head: NearestCentroidHead, number: int) -> None:
    """A loss and an update with a batch of 20."""
    features, labels, indices = batch(number, 20)
    head.loss(features, labels, indices)
    head.update()


def test_a_bank_clusters_once_when_it_is_full() -> None:
    torch.manual_seed(0)
    head = NearestCentroidHead(CLASSES - 1, WIDTH, 2, memory="bank", memory_size=3)
    step(head, 0)
    seeds = head.centroids.clone()
    for number in (1, 2):
        assert torch.equal(head.centroids, seeds)
        assert not head.updates.any()
        assert not head.usage.any()
        step(head, number)
    assert head.updates.eq(1).all()
    assert head.usage.sum() == 60
    assert len(head.memory.features) == 0
    after = head.centroids.clone()
    for number in (3, 4):
        step(head, number)
        assert torch.equal(head.centroids, after)
    step(head, 5)
    assert head.updates.max() == 2
    assert not torch.equal(head.centroids, after)


@pytest.mark.parametrize("memory", [Queue(CLASSES, WIDTH, SIZE), Bank(WIDTH, 3)])
def test_memory_has_nothing_to_train(memory: Queue | Bank) -> None:
    assert list(memory.parameters()) == []
    memory.push(*batch(0, 4))
    assert not memory.features.requires_grad
