"""The transport plan against a loop over classes and numbers by hand, and the choice from it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dnc.assignment import assign, sinkhorn

STEPS = [[1.0, 0.0], [0.9, 0.0], [0.8, 0.0], [0.7, 0.0]]


def one_class(similarity: Tensor, **options: float) -> Tensor:
    """The plan where all samples are of one class."""
    labels = torch.zeros(len(similarity), dtype=torch.int64)
    return sinkhorn(similarity, labels, 1, **options)  # type: ignore[arg-type]


def naive(
    similarity: Tensor, labels: Tensor, num_classes: int, epsilon: float = 0.05, num_iters: int = 3
) -> Tensor:
    """Sinkhorn-Knopp as textbooks write it: class by class, without logarithms, in float64."""
    plan = torch.zeros_like(similarity, dtype=torch.float64)
    for c in range(num_classes):
        rows = (labels == c).nonzero()[:, 0]
        part = (similarity[rows].double() / epsilon).exp()
        for _ in range(num_iters):
            part = part * (len(rows) / similarity.shape[1] / part.sum(0, keepdim=True))
            part = part / part.sum(1, keepdim=True)
        plan[rows] = part
    return plan


def random_similarity(
    n: int, k: int, dtype: torch.dtype = torch.float32, width: int = 64
) -> Tensor:
    """Cosines of random directions; the wider, the more alike they are."""
    generator = torch.Generator().manual_seed(n + k)
    z = F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1)
    points = F.normalize(torch.randn(k, width, generator=generator, dtype=torch.float64), dim=1)
    return (z @ points.T).to(dtype)


def separable(n: int, k: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """Cosines of as many samples around each of k orthogonal directions, and which it is."""
    generator = torch.Generator().manual_seed(n)
    truth = torch.arange(n) % k
    points = torch.eye(width)[:k]
    z = F.normalize(points[truth] + 0.05 * torch.randn(n, width, generator=generator), dim=1)
    return z @ points.T, truth


@pytest.mark.parametrize("num_iters", [1, 2, 3, 20])
@pytest.mark.parametrize(("n", "k"), [(1, 4), (7, 3), (256, 4)])
def test_each_sample_has_mass_one(n: int, k: int, num_iters: int) -> None:
    plan = one_class(random_similarity(n, k), num_iters=num_iters)
    assert plan.shape == (n, k)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.ones(n), rtol=0, atol=1e-6)
    assert plan.double().sum().item() == pytest.approx(n, abs=1e-6 * n)


def test_each_sub_centroid_has_its_mass_once_converged() -> None:
    plan = one_class(random_similarity(256, 4, torch.float64), num_iters=1000)
    assert plan.dtype == torch.float64
    expected = torch.full((4,), 64.0, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(64, 4), (256, 4), (10000, 10)])
def test_three_rounds_come_within_a_hundredth_of_that(n: int, k: int) -> None:
    mass = one_class(random_similarity(n, k, width=512)).sum(0)
    error = (mass * k / n - 1).abs().max().item()
    assert 1e-8 < error < 1e-2


@pytest.mark.parametrize("num_iters", [1, 3, 100])
def test_two_by_two_identity(num_iters: int) -> None:
    own = math.e / (math.e + 1)
    expected = torch.tensor([[own, 1 - own], [1 - own, own]])
    plan = one_class(torch.eye(2), epsilon=1.0, num_iters=num_iters)
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-6)
    assert plan[0, 0].item() == pytest.approx(0.731059, abs=1e-6)


def test_equal_similarities_give_a_uniform_plan() -> None:
    plan = one_class(torch.zeros(6, 3))
    torch.testing.assert_close(plan, torch.full((6, 3), 1 / 3), rtol=0, atol=1e-6)


def test_equal_shares_overrule_the_nearest() -> None:
    # All four are nearest to the first sub-centroid, which has room for two.
    similarity = torch.tensor(STEPS)
    plan = one_class(similarity, num_iters=1000)
    first = torch.tensor([0.952574, 0.731059, 0.268941, 0.047426])
    torch.testing.assert_close(plan, torch.stack([first, 1 - first], 1), rtol=0, atol=2e-6)
    torch.testing.assert_close(plan.sum(0), torch.tensor([2.0, 2.0]), rtol=0, atol=1e-5)
    plan = one_class(similarity)
    first = torch.tensor([0.928091, 0.635926, 0.191194, 0.031000])
    torch.testing.assert_close(plan, torch.stack([first, 1 - first], 1), rtol=0, atol=2e-6)
    torch.testing.assert_close(plan.sum(0), torch.tensor([1.786211, 2.213789]), rtol=0, atol=5e-6)
    labels = torch.zeros(4, dtype=torch.int64)
    assert assign(similarity, labels, 1).tolist() == [0, 0, 1, 1]
    assert similarity.argmax(1).tolist() == [0, 0, 0, 0]


def test_constants_change_nothing_once_converged() -> None:
    similarity = random_similarity(40, 4, torch.float64)
    plan = one_class(similarity, num_iters=1000)
    for shift in (0.3, torch.tensor([0.0, 0.4, 0.0, 0.0])):
        other = one_class(similarity + shift, num_iters=1000)
        torch.testing.assert_close(other, plan, rtol=0, atol=1e-6)


def test_permuting_samples_or_sub_centroids_permutes_the_plan() -> None:
    similarity = random_similarity(30, 5)
    labels = torch.arange(30) % 3
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(30, generator=generator), torch.randperm(5, generator=generator)
    plan = sinkhorn(similarity, labels, 3)
    permuted = sinkhorn(similarity[rows][:, columns], labels[rows], 3)
    torch.testing.assert_close(permuted, plan[rows][:, columns], rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [40, 400, 4000])
def test_separable_data_are_separated(n: int) -> None:
    similarity, truth = separable(n, 4)
    labels = torch.zeros(n, dtype=torch.int64)
    assert torch.equal(assign(similarity, labels, 1), truth)
    # The release takes similarity for cost: everything goes where it does not belong.
    assert (assign(-similarity, labels, 1) != truth).all()


@pytest.mark.parametrize(("epsilon", "num_iters"), [(0.05, 3), (0.05, 1), (0.5, 7)])
def test_all_classes_at_once_equal_a_loop_over_them(epsilon: float, num_iters: int) -> None:
    counts = [0, 1, 2, 3, 40, 17]  # K = 4: none, one, fewer than K, more
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    similarity = random_similarity(len(labels), 4)
    expected = naive(similarity, labels, len(counts), epsilon, num_iters)
    plan = sinkhorn(similarity, labels, len(counts), epsilon, num_iters)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan.double(), expected, rtol=0, atol=1e-6)
    exact = sinkhorn(similarity.double(), labels, len(counts), epsilon, num_iters)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-12)


def test_no_samples_at_all() -> None:
    labels = torch.zeros(0, dtype=torch.int64)
    assert sinkhorn(torch.zeros(0, 4), labels, 3).shape == (0, 4)
    assert assign(torch.zeros(0, 4), labels, 3).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32(dtype: torch.dtype) -> None:
    similarity = random_similarity(32, 4).to(dtype)
    similarity[0, 0] = 1
    assert torch.isinf((torch.ones(1, dtype=torch.float16) / 0.05).exp()).all()  # the naive way
    plan = one_class(similarity)
    assert plan.dtype == torch.float32
    assert torch.equal(plan, one_class(similarity.float()))
    assert plan.isfinite().all()


def test_a_sharp_plan_stays_finite_in_float32() -> None:
    similarity, truth = separable(40, 4)
    assert (similarity / 0.001).exp().isinf().any()
    plan = one_class(similarity, epsilon=0.001)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan, F.one_hot(truth).float(), rtol=0, atol=1e-6)


def test_input_is_left_as_it_was_and_no_gradient_flows() -> None:
    similarity = random_similarity(12, 4).requires_grad_()
    labels = torch.arange(12) % 2
    before = similarity.detach().clone()
    assert not sinkhorn(similarity, labels, 2).requires_grad
    assign(similarity, labels, 2, is_partial=torch.tensor([True, False]))
    assert torch.equal(similarity, before)


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 1.0])
def test_a_single_sub_centroid_takes_everything(epsilon: float) -> None:
    similarity = random_similarity(9, 1)
    labels = torch.arange(9) % 2
    assert torch.equal(sinkhorn(similarity, labels, 2, epsilon), torch.ones(9, 1))
    assert (assign(similarity, labels, 2, epsilon=epsilon) == 0).all()


def test_a_choice_is_the_largest_entry_of_the_row() -> None:
    labels = torch.arange(60) % 3
    similarity = random_similarity(60, 4)
    chosen = assign(similarity, labels, 3, epsilon=0.1, num_iters=5)
    assert torch.equal(chosen, naive(similarity, labels, 3, 0.1, 5).argmax(1))
    assert not torch.equal(chosen, similarity.argmax(1))


def test_too_few_samples_go_to_the_nearest() -> None:
    similarity = torch.tensor([[0.1, 0.2, 0.9], [0.1, 0.2, 0.9], [0.1, 0.8, 0.9]])
    labels = torch.tensor([0, 1, 1])
    # A lone sample's row is uniform; two are spread though both are nearest to the last.
    torch.testing.assert_close(sinkhorn(similarity, labels, 2)[0], torch.full((3,), 1 / 3))
    assert assign(similarity, labels, 2).tolist() == [2, 2, 2]
    # Three samples for three places are balanced again.
    assert assign(similarity, torch.zeros(3, dtype=torch.int64), 1).tolist() != [2, 2, 2]


def test_classes_with_places_out_of_use_go_to_the_nearest() -> None:
    similarity = torch.tensor(STEPS).repeat(2, 1)
    labels = torch.arange(2).repeat_interleave(4)
    chosen = assign(similarity, labels, 2, is_partial=torch.tensor([False, True]))
    assert chosen.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("k", [4, 10])
def test_the_ancestors_draw_takes_what_is_certain_only_sometimes(k: int) -> None:
    torch.manual_seed(0)
    n = 20000
    truth = torch.arange(n) % k
    similarity = 2.0 * F.one_hot(truth, k) - 1
    labels = torch.zeros(n, dtype=torch.int64)
    assert torch.equal(assign(similarity, labels, 1), truth)
    drawn = assign(similarity, labels, 1, how="gumbel")
    share = (drawn == truth).double().mean().item()
    expected = math.e / (math.e + k - 1)  # 0.475 and 0.232
    assert share == pytest.approx(expected, abs=0.012)
    others = torch.bincount((drawn - truth) % k, minlength=k)[1:].double() / n
    torch.testing.assert_close(
        others, torch.full_like(others, (1 - expected) / (k - 1)), rtol=0, atol=0.012
    )


def test_the_ancestors_draw_leaves_out_what_is_not_in_use() -> None:
    torch.manual_seed(0)
    similarity = random_similarity(400, 4)
    similarity[:200, 2:] = -2
    labels = torch.arange(2).repeat_interleave(200)
    is_partial = torch.tensor([True, False])
    drawn = assign(similarity, labels, 2, how="gumbel", is_partial=is_partial)
    assert torch.bincount(drawn[:200], minlength=4).gt(0).tolist() == [True, True, False, False]
    assert torch.bincount(drawn[200:], minlength=4).gt(0).all()
