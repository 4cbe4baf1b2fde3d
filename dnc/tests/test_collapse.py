"""How alike, how evenly used, how pure and how far moved sub-centroids are: numbers by hand."""

import math

import pytest
import torch
from torch import Tensor

from dnc import NearestCentroidHead
from dnc.collapse import collapse_metrics, purity

X, Y, Z = torch.eye(3).unbind()


def at(degrees: float) -> Tensor:
    """A unit vector at that angle from X, towards Y."""
    angle = math.radians(degrees)
    return math.cos(angle) * X + math.sin(angle) * Y


def head_of(
    points: list[list[Tensor]],
    usage: list[list[int]] | None = None,
    active: list[list[int]] | None = None,
) -> NearestCentroidHead:
    """A head whose sub-centroids lie at these points, C rows of K."""
    shape = len(points), len(points[0])
    head = NearestCentroidHead(shape[0], 3, shape[1])
    head.centroids.copy_(torch.stack([torch.stack(row) for row in points]))
    head.usage.copy_(torch.tensor(usage) if usage else torch.zeros(shape))
    head.active.copy_(torch.tensor(active) if active else torch.ones(shape))
    return head


def found(head: NearestCentroidHead, before: Tensor | None = None) -> dict[str, float]:
    return collapse_metrics(head, head.centroids.clone() if before is None else before)


# ---- how alike -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "cosine"),
    [
        ([[X, X], [Y, Y]], 1.0),
        ([[X, Y], [Y, Z]], 0.0),
        ([[X, -X], [Y, -Y]], -1.0),
        ([[X, X], [X, Z]], 0.5),
        ([[X, at(60), at(90)]] * 2, (0.5 + 0.0 + math.sqrt(0.75)) / 3),
    ],
    ids=["identical", "orthogonal", "opposite", "one of two classes", "three"],
)
def test_cosine_is_of_the_pairs_within_a_class(rows: list[list[Tensor]], cosine: float) -> None:
    assert found(head_of(rows))["centroid_cosine"] == pytest.approx(cosine, abs=1e-6)


def test_cosine_leaves_out_places_that_are_not_in_use() -> None:
    # One pair of cosine 0.5; the copies of X in the places not in use would make more of it.
    head = head_of([[X, at(60), X], [X, X, X]], active=[[1, 1, 0], [1, 0, 0]])
    assert found(head)["centroid_cosine"] == pytest.approx(0.5, abs=1e-6)
    # Every pair counts alike: one of 0.5 in the first class, three of 0 in the second.
    head = head_of([[X, at(60), X], [X, Y, Z]], active=[[1, 1, 0], [1, 1, 1]])
    assert found(head)["centroid_cosine"] == pytest.approx(0.5 / 4, abs=1e-6)


def test_a_single_sub_centroid_has_no_cosine_and_no_entropy() -> None:
    head = head_of([[X], [Y]], usage=[[3], [2]])
    assert found(head) == {"centroid_unused": 0.0, "centroid_movement": 0.0}


# ---- how evenly used -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "entropy"),
    [
        ([[5, 5], [1, 1]], 1.0),
        ([[7, 0], [0, 2]], 0.0),
        ([[3, 1], [3, 1]], 0.811278),  # bits of one in four
        ([[4, 4], [9, 0]], 0.5),  # classes count alike, however many samples they have
        ([[6, 2], [0, 0]], 0.811278),  # a class that had no sample has no use
        ([[1, 1, 0], [3, 3, 3]], (math.log(2) / math.log(3) + 1) / 2),
    ],
    ids=["even", "single", "three to one", "mean over classes", "no sample", "two of three"],
)
def test_entropy_of_use(usage: list[list[int]], entropy: float) -> None:
    head = head_of([[X, Y, Z][: len(usage[0])]] * 2, usage)
    assert found(head)["centroid_usage"] == pytest.approx(entropy, abs=1e-6)


def test_entropy_is_over_that_of_the_places_in_use() -> None:
    head = head_of([[X, Y, Z]] * 2, [[4, 4, 0], [9, 0, 0]], [[1, 1, 0], [1, 0, 0]])
    assert found(head)["centroid_usage"] == pytest.approx(1.0, abs=1e-6)
    head = head_of([[X, Y, Z]] * 2, [[3, 1, 0], [2, 2, 2]], [[1, 1, 0], [1, 1, 1]])
    assert found(head)["centroid_usage"] == pytest.approx((0.811278 + 1) / 2, abs=1e-6)
    head = head_of([[X, Y, Z]] * 2, [[4, 0, 0], [9, 0, 0]], [[1, 0, 0], [1, 0, 0]])
    assert "centroid_usage" not in found(head)


def test_share_without_a_sample() -> None:
    usage = [[4, 0], [2, 2], [0, 0]]  # nothing is known of the last class
    assert found(head_of([[X, Y]] * 3, usage))["centroid_unused"] == 0.25
    head = head_of([[X, Y, Z]] * 2, [[4, 0, 0], [1, 0, 0]], [[1, 1, 0], [1, 0, 0]])
    assert found(head)["centroid_unused"] == pytest.approx(1 / 3)


def test_without_an_assignment_nothing_is_said_of_use() -> None:
    assert found(head_of([[X, Y]] * 2)).keys() == {"centroid_cosine", "centroid_movement"}


# ---- how far moved ---------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.0, 0.01, 1.0, 30.0, 90.0, 179.0, 180.0])
def test_movement_is_the_angle(degrees: float) -> None:
    before = torch.stack([X, X])[:, None].repeat(1, 2, 1)
    head = head_of([[at(degrees), at(-degrees)]] * 2)
    moved = found(head, before)["centroid_movement"]
    assert moved == pytest.approx(degrees, rel=1e-3, abs=1e-4)


def test_movement_is_a_mean_over_the_places_in_use() -> None:
    before = torch.stack([X, X, X, X]).view(2, 2, 3)
    head = head_of([[at(30), X], [X, X]])
    assert found(head, before)["centroid_movement"] == pytest.approx(7.5, abs=1e-4)
    head = head_of([[at(30), at(80)], [at(60), X]], active=[[1, 0], [1, 1]])
    assert found(head, before)["centroid_movement"] == pytest.approx(30, abs=1e-4)


def test_what_is_measured_stays_as_it_is() -> None:
    head = head_of([[X, at(60)], [Y, Z]], [[1, 2], [3, 0]])
    before = head.centroids.clone().roll(1, 0)
    kept = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    given = before.clone()
    assert found(head, before)["centroid_movement"] > 0
    assert torch.equal(before, given)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in head.state_dict().items())


# ---- how pure --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nearest", "labels", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.25),
        # Sub-centroid 5: two of three, 9: all, 2: its one image; each counts alike.
        ([5, 5, 5, 9, 9, 2], [0, 0, 1, 1, 1, 3], (2 / 3 + 1 + 1) / 3),
        ([3, 3, 3, 3, 3, 8], [1, 1, 1, 0, 0, 0], (3 / 5 + 1) / 2),
    ],
    ids=["pure", "mixed", "three", "two"],
)
def test_purity(nearest: list[int], labels: list[int], expected: float) -> None:
    assert purity(torch.tensor(nearest), torch.tensor(labels)) == pytest.approx(expected)


def test_purity_of_finer_classes() -> None:
    """Two groups, told apart; of their classes 0, 1 and 2, 3 only the second group's are not."""
    nearest = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    fine = torch.tensor([0, 0, 1, 1, 2, 3, 2, 3])
    assert purity(nearest, groups) == 1.0
    assert purity(nearest, fine) == 0.75
