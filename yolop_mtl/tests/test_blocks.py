"""Blocks alone: what they compute, and that folding changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from yolop_mtl.blocks import (
    CSP,
    ELAN,
    ELANW,
    SPPCSPC,
    ChannelAttention,
    Conv,
    Deconv,
    Down,
    Implicit,
    RepConv,
)
from yolop_mtl.model import fuse

from .networks import num_parameters, randomize


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 8, 6, 10, generator=torch.Generator().manual_seed(0))


def test_every_norm_has_the_specified_constants() -> None:
    norm = Conv(3, 8).norm
    assert (norm.eps, norm.momentum) == (1e-3, 0.03)


@pytest.mark.parametrize(
    "block",
    [
        Conv(8, 6, 3),
        Conv(8, 6, 3, stride=2),
        Conv(8, 6, act=False),
        Deconv(8, 6),
        Deconv(8, 6, bias=False),
        RepConv(8, 6),
        RepConv(8, 8),
        ELAN(8, 8, 12),
        ELANW(8, 8),
        Down(8, 4),
        SPPCSPC(8, 4),
        CSP(8, 6),
    ],
    ids=lambda block: type(block).__name__,
)
@pytest.mark.parametrize("completely", [False, True])
def test_a_folded_block_computes_the_same(
    block: nn.Module, completely: bool, x: torch.Tensor
) -> None:
    block = randomize(copy.deepcopy(block))
    with torch.no_grad():
        before = block(x)
        fuse(block, completely=completely)
        assert torch.allclose(block(x), before, atol=1e-5)
    left = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(left) == (isinstance(block, CSP) and not completely)
    with torch.no_grad():  # a second call changes nothing
        assert torch.allclose(fuse(block, completely=completely)(x), before, atol=1e-5)


def test_a_folded_repconv_is_one_convolution() -> None:
    block = fuse(RepConv(8, 6).eval())
    assert [type(module) for module in block.modules()] == [RepConv, nn.Conv2d]
    assert num_parameters(block) == 6 * 8 * 9 + 6


def test_folding_keeps_frozen_weights_frozen() -> None:
    for block in (Conv(4, 4), RepConv(4, 4)):
        fuse(block.requires_grad_(False).eval())
        assert [p.requires_grad for p in block.parameters()] == [False, False]


def test_elan_joins_newest_first(x: torch.Tensor) -> None:
    block = randomize(ELAN(8, 4, 6))
    a, b = block.a(x), block.b(x)
    c = block.c[1](block.c[0](b))
    d = block.d[1](block.d[0](c))
    assert torch.equal(block(x), block.out(torch.cat([d, c, b, a], 1)))


def test_elan_w_joins_every_convolution_newest_first(x: torch.Tensor) -> None:
    block = randomize(ELANW(8, 4))
    a, b = block.a(x), block.b(x)
    t1 = block.chain[0](b)
    t2 = block.chain[1](t1)
    t3 = block.chain[2](t2)
    t4 = block.chain[3](t3)
    assert [t.shape[1] for t in (t1, t2, t3, t4)] == [2] * 4
    assert torch.equal(block(x), block.out(torch.cat([t4, t3, t2, t1, b, a], 1)))


def test_down_joins_strided_then_pooled_then_the_others(x: torch.Tensor) -> None:
    block = randomize(Down(8, 4))
    other = torch.randn(2, 3, 3, 5)
    out = block(x, other)
    assert out.shape == (2, 11, 3, 5)
    assert torch.equal(out[:, 4:8], block.pooled(F.max_pool2d(x, 2, 2)))
    assert torch.equal(out[:, 8:], other)


def test_csp_ends_in_leaky_relu_of_a_tenth(x: torch.Tensor) -> None:
    block = randomize(CSP(8, 6))
    joined = block.norm(torch.cat([block.main(x), block.side(x)], 1))
    assert torch.allclose(block(x), block.out(torch.where(joined > 0, joined, joined / 10)))


def test_attention_is_one_plus_a_weight_per_channel(x: torch.Tensor) -> None:
    block = ChannelAttention(8, 16)
    ratio = (block(x) / x)[:, :, 0, 0]
    assert torch.allclose(block(x), x * ratio[:, :, None, None], atol=1e-5)
    assert (ratio > 1).all()
    assert (ratio < 2).all()
    assert num_parameters(block) == 2 * 8 * 16


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_implicit_vectors_start_near_their_mean(mean: float) -> None:
    torch.manual_seed(0)
    vector = Implicit(4000, mean=mean)()
    assert vector.shape == (1, 4000, 1, 1)
    assert vector.mean().item() == pytest.approx(mean, abs=2e-3)
    assert vector.std().item() == pytest.approx(0.02, abs=2e-3)
