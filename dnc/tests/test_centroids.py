"""Seeding against a farthest-first loop, and the momentum update against numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dnc.centroids import momentum_at, moved, pick_lowest, seed


def units(*shape: int, seed: int = 0) -> Tensor:
    """Random directions."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def farthest_first(z: Tensor, there: list[Tensor], places: int) -> list[Tensor]:
    """Samples of one class for the places left: the reference, a step at a time."""
    left, chosen = list(range(len(z))), list(there)
    while left and len(chosen) < places:
        if chosen:
            nearest = [max(float(z[i] @ p) for p in chosen) for i in left]
        else:
            nearest = [-float(z[i] @ z.mean(0)) for i in left]
        best = left[nearest.index(min(nearest))]
        left.remove(best)
        chosen.append(z[best])
    return chosen


# ---- the sample of lowest score ----


def test_lowest_of_each_class() -> None:
    z = units(7, 3)
    labels = torch.tensor([2, 0, 0, 2, 1, 2, 0])
    score = torch.tensor([0.5, 0.3, -0.2, 0.1, math.inf, 0.1, 0.9])
    found, features, picked = pick_lowest(score, z, labels, 4)
    assert found.tolist() == [True, False, True, False]  # none that counts, none at all
    assert torch.equal(features[0], z[2])
    assert torch.equal(features[2], z[3])  # the first of two equals
    assert picked.nonzero()[:, 0].tolist() == [2, 3]
    assert score[2] == pytest.approx(-0.2)


def test_lowest_of_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    found, features, picked = pick_lowest(torch.zeros(0), torch.zeros(0, 3), none, 2)
    assert found.tolist() == [False, False]
    assert features.shape == (2, 3)
    assert picked.shape == (0,)


# ---- seeding ----


class Places:
    """Three classes of four places, at random and free."""

    def __init__(self) -> None:
        self.centroids = units(3, 4, 5, seed=9)
        self.seeded = torch.zeros(3, 4, dtype=torch.bool)
        self.active = torch.ones(3, 4, dtype=torch.bool)

    def seed(self, z: Tensor, labels: Tensor) -> None:
        seed(self.centroids, self.seeded, self.active, z, labels)


@pytest.mark.parametrize("start", range(5))
def test_seeds_are_the_farthest_of_each_class(start: int) -> None:
    places, z = Places(), units(30, 5, seed=start)
    labels = torch.arange(30) % 2  # the last class has no samples
    before = places.centroids.clone()
    places.seed(z, labels)
    for c in (0, 1):
        expected = farthest_first(z[labels == c], [], 4)
        assert torch.equal(places.centroids[c], torch.stack(expected))
    assert places.seeded.tolist() == [[True] * 4, [True] * 4, [False] * 4]
    assert torch.equal(places.centroids[2], before[2])


def test_the_first_seed_is_the_sample_nearest_to_the_mean() -> None:
    places = Places()
    z = F.normalize(torch.tensor([[1.0, 0.2], [1, 1.1], [0.1, 1], [1, -0.3]]), dim=1)
    z = F.pad(z, (0, 3))
    nearest = int((z @ z.mean(0)).argmax())
    places.seed(z, torch.full((4,), 1))
    assert torch.equal(places.centroids[1, 0], z[nearest])
    assert nearest == 1
    assert torch.equal(places.centroids[1, 1], z[3])  # least similar to that one


def test_places_without_a_sample_hold_the_first_and_stay_free() -> None:
    places, z = Places(), units(2, 5)
    places.seed(z, torch.zeros(2, dtype=torch.int64))
    assert places.seeded[0].tolist() == [True, True, False, False]
    assert torch.equal(places.centroids[0, 2:], places.centroids[0, :1].expand(2, -1))
    assert not torch.equal(places.centroids[0, 0], places.centroids[0, 1])
    there = list(places.centroids[0, :2])
    later = units(6, 5, seed=3)
    places.seed(later, torch.zeros(6, dtype=torch.int64))
    assert places.seeded[0].all()
    assert torch.equal(places.centroids[0], torch.stack(farthest_first(later, there, 4)))


def test_no_sample_is_taken_twice() -> None:
    # Of two equal samples each may fill a place, but a lone one fills one only.
    places, z = Places(), units(1, 5).repeat(2, 1)
    places.seed(z, torch.zeros(2, dtype=torch.int64))
    assert places.seeded[0].tolist() == [True, True, False, False]
    places = Places()
    places.seed(z[:1], torch.zeros(1, dtype=torch.int64))
    assert places.seeded[0].tolist() == [True, False, False, False]


def test_seeded_places_stay_as_they_are() -> None:
    places = Places()
    places.seed(units(20, 5), torch.arange(20) % 3)
    before = places.centroids.clone()
    places.seed(units(20, 5, seed=1), torch.arange(20) % 3)
    assert torch.equal(places.centroids, before)


def test_places_out_of_use_are_never_seeded() -> None:
    places = Places()
    places.active[1, 2:] = False
    for start in range(2):
        places.seed(units(12, 5, seed=start), torch.full((12,), 1))
    assert places.seeded[1].tolist() == [True, True, False, False]
    assert torch.equal(places.centroids[1, 2:], places.centroids[1, :1].expand(2, -1))


def test_seeding_without_samples_changes_nothing() -> None:
    places = Places()
    before = places.centroids.clone()
    places.seed(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(places.centroids, before)
    assert not places.seeded.any()


# ---- momentum ----


def test_a_running_mean_until_the_momentum_is_reached() -> None:
    updates = torch.tensor([[0, 1, 2, 8, 9, 10, 5000]])
    expected = [0.0, 1 / 2, 2 / 3, 8 / 9, 0.9, 0.9, 0.9]
    assert momentum_at(updates, 0.9, True)[0].tolist() == pytest.approx(expected, abs=1e-7)
    assert momentum_at(updates, 0.9, False)[0].tolist() == pytest.approx([0.9] * 7, abs=1e-7)
    assert momentum_at(updates, 0.0, True).eq(0).all()


@pytest.mark.parametrize(("momentum", "left"), [(0.999, 0.367695), (0.99, 4.3171e-5)])
def test_what_is_left_of_the_start_after_1000_updates(momentum: float, left: float) -> None:
    shares = momentum_at(torch.arange(1000), momentum, False).double()
    # Position T of a plain running average: mu^T of the start, the rest of a constant target.
    position = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for share in shares:
        position = share * position + (1 - share) * torch.tensor([0.0, 1.0])
    assert position[0].item() == pytest.approx(left, rel=1e-4)
    assert position[1].item() == pytest.approx(1 - left, abs=1e-5)
    warm = momentum_at(torch.arange(1000), momentum, True)
    assert warm.prod() == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("start", range(3))
def test_the_first_update_of_a_warm_start_is_the_mean_itself(start: int, momentum: float) -> None:
    sums = 5 * torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(9))
    counts = torch.tensor([[1, 2, 0, 4]]).expand(3, 4)
    points = units(3, 4, 6, seed=start)
    updates = torch.zeros(3, 4, dtype=torch.int64)
    found = moved(points, sums, counts, momentum_at(updates, momentum, True))
    has = counts > 0
    expected = sums[has] / sums[has].norm(dim=1, keepdim=True)
    torch.testing.assert_close(found[has], expected, rtol=0, atol=1e-6)
    assert torch.equal(found[~has], points[~has])
    cold = moved(points, sums, counts, momentum_at(updates, momentum, False))
    assert (momentum == 0) == torch.allclose(cold[has], expected, rtol=0, atol=1e-6)


def test_length_stays_one_over_many_updates() -> None:
    points, generator = units(3, 4, 64), torch.Generator().manual_seed(0)
    for number in range(1000):
        sums = 20 * torch.randn(3, 4, 64, generator=generator)
        counts = torch.randint(0, 3, (3, 4), generator=generator)
        kept = momentum_at(torch.full((3, 4), number), 0.999, True)
        points = moved(points, sums, counts, kept)
    assert (points.norm(dim=2) - 1).abs().max() < 1e-6


def test_a_warm_start_is_the_mean_of_the_first_directions() -> None:
    """Of directions that do not differ in length before each step the mean is exact."""
    directions = units(5, 3, seed=2)
    position = directions[0]
    for number, direction in enumerate(directions):
        point = moved(
            position[None, None],
            direction[None, None],
            torch.ones(1, 1),
            momentum_at(torch.tensor([[number]]), 0.999, True),
        )[0, 0]
        step = number / (number + 1) * position + direction / (number + 1)
        torch.testing.assert_close(point, step / step.norm(), rtol=0, atol=1e-6)
        position = point


@pytest.mark.parametrize(
    ("updates", "angle", "formula"),
    [(78, 85.531, 85.535), (500, 62.454, 62.476), (1251, 31.916, 31.944)],
)
def test_angle_left_after_many_updates(updates: int, angle: float, formula: float) -> None:
    point, target = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 7.0]]])
    kept = torch.full((1, 1), 0.999)
    for _ in range(updates):
        point = moved(point, target, torch.ones(1, 1), kept)
    assert math.degrees(math.atan2(point[0, 0, 0], point[0, 0, 1])) == pytest.approx(
        angle, abs=0.005
    )
    assert math.degrees(2 * math.atan(math.exp(-0.001 * updates))) == pytest.approx(
        formula, abs=0.001
    )


@pytest.mark.parametrize(
    ("momentum", "expected", "atol"),
    [
        (0.0, (0.923880, 0.382683), 1e-6),
        (0.9, (0.999257, 0.038533), 1e-6),
        (0.999, (0.99999993, 0.00038271), 1e-7),
    ],
)
def test_one_update_by_hand(momentum: float, expected: tuple[float, float], atol: float) -> None:
    features = F.normalize(torch.tensor([[3.0, 1], [2, 1], [1, 2], [1, 3]]), dim=1)
    sums = torch.stack([features[:2].sum(0), features[2:].sum(0)])[None]
    found = moved(torch.eye(2)[None], sums, torch.tensor([[2, 2]]), torch.full((1, 2), momentum))
    torch.testing.assert_close(found[0, 0], torch.tensor(expected), rtol=0, atol=atol)
    torch.testing.assert_close(found[0, 1], found[0, 0].flip(0), rtol=0, atol=1e-7)


def test_sums_and_means_move_alike_and_to_unit_length() -> None:
    points, sums = units(3, 4, 6), torch.randn(3, 4, 6) * 20
    counts, kept = torch.randint(1, 9, (3, 4)), torch.rand(3, 4)
    found = moved(points, sums, counts, kept)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(3, 4), rtol=0, atol=1e-6)
    means = moved(points, sums / counts[..., None], counts, kept)
    torch.testing.assert_close(found, means, rtol=0, atol=1e-6)
    for c in range(3):
        for k in range(4):
            step = kept[c, k] * points[c, k] + (1 - kept[c, k]) * sums[c, k] / sums[c, k].norm()
            torch.testing.assert_close(found[c, k], step / step.norm(), rtol=0, atol=1e-6)


def test_what_gets_nothing_keeps_every_bit() -> None:
    points = units(2, 3, 6) * 1.0000001  # a length that normalising would change
    counts = torch.tensor([[0, 2, 0], [1, 0, 0]])
    found = moved(points, torch.ones(2, 3, 6), counts, torch.full((2, 3), 0.5))
    assert torch.equal(found[counts == 0], points[counts == 0])
    assert not (found[counts > 0] == points[counts > 0]).all(1).any()


def test_opposite_features_have_no_direction() -> None:
    points = torch.tensor([[[0.6, 0.8]]])
    first = moved(points, torch.zeros(1, 1, 2), torch.tensor([[2]]), torch.zeros(1, 1))
    assert torch.equal(first, points)
    # Half way to the opposite side there is none either.
    opposite = moved(points, -3 * points, torch.tensor([[3]]), torch.full((1, 1), 0.5))
    assert opposite.isfinite().all()
    torch.testing.assert_close(opposite.norm(dim=2), torch.ones(1, 1), rtol=0, atol=1e-6)
