"""Flips, crops and mixes move pixels and invent none."""

import pytest
import torch

from e2vpt.augmentation import CROP_PADDING, MEAN, STD, augment, cutmix, normalize


def numbered(batch: int = 6, side: int = 12) -> torch.Tensor:
    """Images in which no pixel is like another, and none is 0: channels are image, row, column."""
    images = torch.empty(batch, 3, side, side, dtype=torch.uint8)
    images[:, 0] = torch.arange(1, batch + 1).view(-1, 1, 1)
    images[:, 1] = torch.arange(1, side + 1).view(1, -1, 1)
    images[:, 2] = torch.arange(1, side + 1).view(1, 1, -1)
    return images


def test_augment_only_moves_pixels() -> None:
    torch.manual_seed(0)
    images = numbered(200)
    kept = images.clone()
    out = augment(images)
    assert torch.equal(images, kept)
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)
    shifts, flips = set(), 0
    for i in range(len(images)):
        padded = torch.nn.functional.pad(images[i], (CROP_PADDING,) * 4)
        windows = {
            (top, left, flip): padded[:, top : top + 12, left : left + 12]
            for top in range(2 * CROP_PADDING + 1)
            for left in range(2 * CROP_PADDING + 1)
            for flip in (False, True)
        }
        found = [
            place
            for place, window in windows.items()
            if torch.equal(out[i], window.flip(-1) if place[2] else window)
        ]
        assert len(found) == 1, f"image {i} is no window of its own padded image"
        shifts.add(found[0][:2])
        flips += found[0][2]
    assert 60 < flips < 140
    assert {top for top, _ in shifts} == set(range(9))
    assert {left for _, left in shifts} == set(range(9))


def test_augment_follows_the_seed() -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(augment(numbered()))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_share_is_the_unchanged_area(seed: int) -> None:
    torch.manual_seed(seed)
    images, labels = numbered().float(), torch.arange(6) * 10
    kept = images.clone()
    mixed, other, share = cutmix(images, labels)
    assert torch.equal(images, kept)
    order = other // 10
    assert sorted(order.tolist()) == list(range(6))
    for i in range(6):
        source = mixed[i, 0] - 1  # which image each pixel is from
        assert torch.equal(mixed[i, 1:], images[i, 1:])  # rows and columns stay in place
        assert set(source.unique().tolist()) <= {i, int(order[i])}
        if order[i] != i:
            changed = source == order[i]
            assert 1 - float(changed.float().mean()) == pytest.approx(share)
            if changed.any():  # one box
                rows, columns = changed.any(1), changed.any(0)
                assert int(changed.sum()) == int(rows.sum()) * int(columns.sum())


def test_cutmix_boxes_reach_everywhere() -> None:
    torch.manual_seed(0)
    images, labels = numbered(2).float(), torch.arange(2)
    shares, touched = [], torch.zeros(12, 12)
    for _ in range(300):
        mixed, _, share = cutmix(images, labels)
        shares.append(share)
        touched += (mixed[0, 0] != images[0, 0]).float()
    assert (touched > 5).all()
    assert min(shares) < 0.05
    assert max(shares) > 0.95
    assert 0.4 < sum(shares) / 300 < 0.6  # the area is uniform


def test_normalize_by_hand() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [
        (value / 255 - mean) / std
        for value, mean, std in zip((0, 128, 255), MEAN, STD, strict=True)
    ]
    assert normalize(images).flatten().tolist() == pytest.approx(expected, rel=1e-6)
