import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from shared_utils.seeding import seed_all, seed_worker


@pytest.fixture(autouse=True)
def keep_environment(monkeypatch):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seed_all sets them
        monkeypatch.setenv(name, "0")


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_one_seed_gives_the_same_numbers_and_another_gives_others():
    loader = seed_all(3)
    first = (*draws(), int(torch.randint(2**31, (), generator=loader)))
    loader = seed_all(3)
    again = (*draws(), int(torch.randint(2**31, (), generator=loader)))
    seed_all(4)
    assert first == again
    assert all(a != b for a, b in zip(first, draws(), strict=False))


def test_it_is_silent(capfd):
    seed_all(0)
    assert capfd.readouterr() == ("", "")


class Drawing(Dataset):
    """Gives each index with random numbers from all three sources."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, *draws()], dtype=torch.float64)


def epochs(seed, num_workers):
    generator = seed_all(seed)
    loader = DataLoader(
        Drawing(),
        batch_size=2,
        shuffle=True,
        num_workers=num_workers,
        generator=generator,
        worker_init_fn=seed_worker,
    )
    return [torch.cat(list(loader)) for _ in range(2)]


def test_the_order_does_not_depend_on_the_number_of_workers():
    alone, helped = epochs(5, 0), epochs(5, 2)
    for a, b in zip(alone, helped, strict=True):
        assert a[:, 0].tolist() == b[:, 0].tolist()
    assert alone[0][:, 0].tolist() != alone[1][:, 0].tolist()  # each epoch its own order
    assert alone[0][:, 0].tolist() != epochs(6, 0)[0][:, 0].tolist()


def test_workers_draw_the_same_numbers_again_and_no_number_twice():
    first, again = epochs(5, 2), epochs(5, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    drawn = torch.cat(first)[:, 1:]  # 2 epochs x 12 samples, three sources
    for source in drawn.T:
        assert len(set(source.tolist())) == len(source)
