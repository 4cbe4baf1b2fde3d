"""What the network is fed: preprocessing, cache, order, augmentation, workers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from e2vpt import data
from e2vpt.config import DataConfig
from e2vpt.data import DataSplits, ImageSet, build_loader, load_data
from e2vpt.images import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

from .data_sets import CHECKPOINT, load, write_classes

# Preprocessing of a data set --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalize", "mean", "std"),
    [
        ("imagenet", IMAGENET_MEAN, IMAGENET_STD),
        ("checkpoint", (0.5,) * 3, (0.5,) * 3),
        ("none", (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_statistics_and_size_from_the_config(
    normalize: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    found = load("digits", normalize=normalize, limit=3)
    assert found.preprocessing == Preprocessing((8, 8), mean, std)
    resized = load("digits", limit=3, img_size=20, resize="crop")
    assert resized.preprocessing.img_size == (20, 20)
    assert resized.train[0][0].shape == (3, 20, 20)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_cache_changes_no_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: str
) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i, size in enumerate([(8, 8), (20, 9), (7, 31), (40, 40), (5, 6)]):
            values = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / name / f"{i}.png")
    augment = "crop-flip" if resize == "crop" else "flip"
    cached = load(tmp_path, resize=resize, augment=augment)
    assert cached.train._cache is not None
    # The second bound fits the network's input but not the larger images that are cropped.
    for bound in (0, 6 * 3 * 8 * 8) if resize == "crop" else (0,):
        monkeypatch.setattr(data, "CACHE_BYTES", bound)
        plain = load(tmp_path, resize=resize, augment=augment)
        assert plain.train._cache is None
        assert plain.val is not None
        assert cached.val is not None
        for first, second in ((cached.train, plain.train), (cached.val, plain.val)):
            for i in range(len(first)):
                assert torch.equal(first[i][0], second[i][0])
    monkeypatch.undo()
    shutil.rmtree(tmp_path)
    assert cached.train[0][0].shape == (3, 8, 8)  # from memory


def test_validation_is_not_augmented(tmp_path: Path) -> None:
    write_classes(tmp_path, 10)
    found = load(tmp_path, augment="flip")
    assert (found.train.augment, found.val.augment, found.test.augment) == ("flip", "none", "none")


# Loaders ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    cfg = DataConfig(resize="crop", augment="crop-flip", limit=50)
    return load_data(cfg, img_size=(16, 16), seed=3, **CHECKPOINT)


def batches(images: ImageSet, num_workers: int, epochs: int = 2) -> list[list[torch.Tensor]]:
    """Per epoch: all images, all labels, from one loader."""
    cfg = DataConfig(batch_size=16, num_workers=num_workers)
    loader = build_loader(images, cfg, train=True)
    out = []
    for epoch in range(epochs):
        images.set_epoch(epoch)
        found = list(loader)
        assert [len(labels) for _, labels in found] == [16, 16, 16, 2]
        out.append([torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])])
    return out


def test_workers_change_neither_order_nor_augmentation(digits: DataSplits) -> None:
    alone, shared = batches(digits.train, 0), batches(digits.train, 2)
    for one, two in zip(alone, shared, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert not torch.equal(alone[0][1], alone[1][1])  # another order in the next epoch
    assert (alone[0][0].dtype, alone[0][1].dtype) == (torch.float32, torch.int64)


def test_augmentation_is_drawn_from_seed_epoch_and_index(digits: DataSplits) -> None:
    images = digits.train

    def draw(epoch: int, seed: int = 3) -> torch.Tensor:
        again = ImageSet(images.pool, images.preprocessing, augment="crop-flip", seed=seed)
        again.set_epoch(epoch)
        return torch.stack([again[i][0] for i in range(len(again))])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), draw(1, seed=4))
    plain = images.with_augment("none")
    center = torch.stack([plain[i][0] for i in range(len(plain))])
    changed = (draw(0) != center).flatten(1).any(dim=1)
    assert 35 <= int(changed.sum()) <= 50  # 1 of 9 crops times 2 leaves few unchanged


def test_order_from_a_generator_does_not_depend_on_workers(digits: DataSplits) -> None:
    def orders(num_workers: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(7)
        cfg = DataConfig(batch_size=50, num_workers=num_workers)
        loader = build_loader(digits.train, cfg, train=True, generator=generator)
        return [next(iter(loader))[1].tolist() for _ in range(3)]

    alone = orders(0)
    assert alone == orders(2)
    generator = torch.Generator().manual_seed(7)
    for labels in alone:  # nothing else draws from it, so its state alone resumes a run
        order = torch.randperm(50, generator=generator).tolist()
        assert labels == [digits.train.labels[i] for i in order]


def test_loading_leaves_the_global_random_state(digits: DataSplits) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(build_loader(digits.train, DataConfig(), train=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_keeps_the_order(digits: DataSplits) -> None:
    loader = build_loader(digits.train, DataConfig(batch_size=50), train=False)
    assert next(iter(loader))[1].tolist() == digits.train.labels


def test_loader_through_fabric_with_two_ranks(digits: DataSplits) -> None:
    """What Fabric makes of the loader on several processes: shards of the one order."""
    from lightning.fabric import Fabric
    from lightning.fabric.utilities.data import _update_dataloader

    loader = build_loader(digits.train, DataConfig(batch_size=50), train=True)
    whole = next(iter(loader))[1].tolist()
    parts = []
    for rank in range(2):
        sampler = Fabric._get_distributed_sampler(loader, num_replicas=2, rank=rank)
        sharded = _update_dataloader(loader, sampler)
        assert type(sharded) is type(loader)
        parts.append(next(iter(sharded))[1].tolist())
    assert [label for pair in zip(*parts, strict=True) for label in pair] == whole
