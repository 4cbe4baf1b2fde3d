"""Attention: the written-out backward pass and the padding against float64."""

import pytest
import torch
from torch.nn import functional as F

from e2vpt.attend import ROW_MULTIPLE, attend, num_padding_rows


def case(dtype: torch.dtype, rows: int, padding: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, rows, rows))
    # What stands in padding rows must not matter, however large.
    k[:, :, rows - padding :] = 50
    v[:, :, rows - padding :] = 1e3
    return [t.to(dtype).requires_grad_() for t in (q, k, v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 3])
def test_attend_equals_the_definition_and_its_gradients(dtype: torch.dtype, padding: int) -> None:
    tensors = case(dtype, 16, padding)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out = attend(*tensors, scale=0.3, padding=padding)
    kept = 16 - padding
    weights = (exact[0] @ exact[1][:, :, :kept].transpose(-2, -1) * 0.3).softmax(-1)
    expected = weights @ exact[2][:, :, :kept]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (out.double() - expected).norm() < tolerance * expected.norm()
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * seed).sum().backward()
    (expected * seed).sum().backward()
    for got, want in zip(tensors, exact, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert (got.grad.double() - want.grad).norm() < tolerance * want.grad.norm()
    assert tensors[1].grad is not None
    assert not tensors[1].grad[:, :, kept:].any()


def test_queries_that_need_no_gradient_get_none() -> None:
    q, k, v = case(torch.bfloat16, 16, 0)
    q = q.detach()
    attend(q, k, v, scale=1.0).sum().backward()
    assert q.grad is None
    assert k.grad is not None


def test_rows_are_padded_only_in_low_precision_on_a_cpu() -> None:
    assert num_padding_rows(302, torch.empty(1, dtype=torch.bfloat16)) == 2
    assert (302 + 2) % ROW_MULTIPLE == 0
    assert num_padding_rows(304, torch.empty(1, dtype=torch.bfloat16)) == 0
    assert num_padding_rows(302, torch.empty(1)) == 0
    assert num_padding_rows(302, torch.empty(1, dtype=torch.bfloat16, device="meta")) == 0


def test_inference_and_training_paths_agree() -> None:
    q, k, v = case(torch.bfloat16, 32, 5)
    training = attend(q, k, v, scale=0.3, padding=5)
    with torch.no_grad():
        inference = attend(q, k, v, scale=0.3, padding=5)
        fused = F.scaled_dot_product_attention(q, k[:, :, :27], v[:, :, :27], scale=0.3)
    assert (training.float() - fused.float()).norm() < 2e-2 * fused.float().norm()
    assert (inference.float() - fused.float()).norm() < 2e-2 * fused.float().norm()
