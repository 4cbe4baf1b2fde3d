"""Cosines to the nearest sub-centroid and their gradient, against the plain einsum and maximum."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dnc.similarity import CHUNK, all_similarity, max_similarity, normalized, own_similarity


def units(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random directions."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


def plain(z: Tensor, centroids: Tensor) -> Tensor:
    """All cosines at once, as the formula reads: (N, C)."""
    return torch.einsum("nd,ckd->nck", z, centroids).amax(dim=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_vectors_are_computed_exactly_enough(dtype: torch.dtype) -> None:
    features = (units(5, 8) * 300).to(dtype)  # squared sums of these overflow float16
    z = normalized(features)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(z.norm(dim=1), z.new_ones(5), rtol=0, atol=1e-6)
    expected = features.double() / features.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 33, 100, 1000, CHUNK])
@pytest.mark.parametrize("k", [1, 3])
def test_scores_and_gradients_equal_the_plain_formula(k: int, chunk: int) -> None:
    z = units(11, 6).requires_grad_()
    centroids = units(7, k, 6, seed=1)
    weights = torch.randn(11, 7, generator=torch.Generator().manual_seed(2))
    cosines, nearest = max_similarity(z, centroids, chunk)
    expected = plain(z, centroids)
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-6)
    places = torch.einsum("nd,ckd->nck", z, centroids).argmax(2)
    assert torch.equal(nearest.long(), places)
    (grad,) = torch.autograd.grad((cosines * weights).sum(), z)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), z)
    torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-5)
    assert wanted.abs().min() > 1e-5


def test_gradient_is_a_finite_difference() -> None:
    z = units(4, 5, dtype=torch.float64).requires_grad_()
    centroids = units(3, 4, 5, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: max_similarity(x, centroids, 8)[0], (z,))


@pytest.mark.parametrize(
    ("k", "dtype"), [(1, torch.uint8), (256, torch.uint8), (257, torch.int16), (400, torch.int16)]
)
def test_numbers_of_sub_centroids_fit_their_type(k: int, dtype: torch.dtype) -> None:
    # The last one is the nearest, so that its number is the largest there is.
    centroids = units(2, k, 4, seed=1)
    z = centroids[:, -1].clone()
    cosines, nearest = max_similarity(z, centroids)
    assert nearest.dtype == dtype
    assert nearest.diagonal().tolist() == [k - 1, k - 1]
    torch.testing.assert_close(cosines.diagonal(), torch.ones(2), rtol=0, atol=1e-6)


def test_of_equally_near_ones_the_first_counts_and_gets_the_gradient() -> None:
    z = torch.tensor([[0.6, 0.8]], requires_grad=True)
    centroids = torch.tensor([[[0.0, -1.0], [1.0, 0.0], [1.0, 0.0], [0.0, -1.0]]])
    cosines, nearest = max_similarity(z, centroids)
    assert nearest.tolist() == [[1]]
    cosines.sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [[1.0, 0.0]]  # not twice that


def test_only_small_integers_are_kept_for_the_backward_pass() -> None:
    z, centroids = units(50, 6).requires_grad_(), units(20, 4, 6, seed=1)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        max_similarity(z, centroids)
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in kept}
    sizes.pop(centroids.data_ptr())
    assert sum(sizes.values()) == 50 * 20  # one byte for each sample and class


def test_sub_centroids_are_constants() -> None:
    z, centroids = units(3, 6).requires_grad_(), units(4, 2, 6, seed=1).requires_grad_()
    cosines, nearest = max_similarity(z, centroids)
    assert not nearest.requires_grad
    cosines.sum().backward()
    assert z.grad is not None
    assert centroids.grad is None


def test_changing_them_before_backward_is_noticed() -> None:
    z, centroids = units(3, 6).requires_grad_(), units(4, 2, 6, seed=1)
    cosines, _ = max_similarity(z, centroids)
    centroids.neg_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cosines.sum().backward()


def test_a_second_derivative_is_refused_instead_of_wrong() -> None:
    z, centroids = units(3, 6).requires_grad_(), units(4, 2, 6, seed=1)
    cosines, _ = max_similarity(z, centroids)
    (grad,) = torch.autograd.grad(cosines.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_does_not_lower_the_precision() -> None:
    z, centroids = units(9, 6).requires_grad_(), units(4, 3, 6, seed=1)
    expected, _ = max_similarity(z, centroids)
    (wanted,) = torch.autograd.grad(expected.square().sum(), z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosines, _ = max_similarity(z, centroids)
        (grad,) = torch.autograd.grad(cosines.square().sum(), z)
    assert cosines.dtype == torch.float32
    assert torch.equal(cosines, expected)
    assert torch.equal(grad, wanted)


@pytest.mark.parametrize("function", [max_similarity, own_similarity])
def test_no_samples(function: Any) -> None:
    z, centroids = torch.zeros(0, 6, requires_grad=True), units(4, 2, 6)
    if function is own_similarity:
        assert own_similarity(z, torch.zeros(0, dtype=torch.int64), centroids).shape == (0, 2)
        return
    cosines, nearest = max_similarity(z, centroids)
    assert cosines.shape == nearest.shape == (0, 4)
    cosines.sum().backward()
    assert z.grad is not None
    assert z.grad.shape == (0, 6)


@pytest.mark.parametrize("num_classes", [1, 5, 10])
@pytest.mark.parametrize("chunk", [1, 60, CHUNK])
def test_another_class_leaves_the_scores_of_the_old_ones(num_classes: int, chunk: int) -> None:
    z, centroids = units(13, 6), units(num_classes + 1, 4, 6, seed=1)
    old, places = max_similarity(z, centroids[:-1], chunk)
    new, more_places = max_similarity(z, centroids, chunk)
    assert new.shape == (13, num_classes + 1)
    assert torch.equal(new[:, :-1], old)
    assert torch.equal(more_places[:, :-1], places)


@pytest.mark.parametrize("chunk", [1, 20, CHUNK])
def test_own_similarity_equals_a_loop_over_samples(chunk: int) -> None:
    z, centroids = units(9, 6), units(4, 3, 6, seed=1)
    labels = torch.tensor([3, 0, 1, 1, 2, 3, 0, 0, 2])
    expected = torch.stack([centroids[c] @ x for x, c in zip(z, labels.tolist(), strict=True)])
    found = own_similarity(z, labels, centroids, chunk)
    assert found.shape == (9, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("num_classes", "k"), [(2, 1), (3, 4), (40, 5)])
def test_all_cosines_are_rounded_as_their_maxima(num_classes: int, k: int) -> None:
    z, centroids = units(13, 6), units(num_classes, k, 6, seed=1)
    cosines, nearest = max_similarity(z, centroids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = all_similarity(z, centroids)
    expected = torch.einsum("nd,ckd->nck", z, centroids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(found.amax(2), cosines)
    assert torch.equal(found.argmax(2), nearest.long())


def test_own_similarity_is_of_full_precision_under_autocast() -> None:
    z, centroids, labels = units(9, 6), units(4, 3, 6, seed=1), torch.arange(9) % 4
    expected = own_similarity(z, labels, centroids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(own_similarity(z, labels, centroids), expected)
