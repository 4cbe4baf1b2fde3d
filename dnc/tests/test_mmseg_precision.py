"""What a training computes in: bfloat16 autocast on a CPU, and what the card says of it."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn

from dnc.mmseg import precision
from dnc.mmseg.precision import Bf16OptimWrapper, ChannelsLastHook, precision_of


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_autocast_lasts_as_long_as_the_forward_pass() -> None:
    model = nn.Linear(4, 3)
    wrapper = Bf16OptimWrapper(optimizer(model))
    x = torch.ones(2, 4)
    with wrapper.optim_context(model):
        loss = model(x)
    assert loss.dtype == torch.bfloat16
    assert model(x).dtype == torch.float32
    before = model.weight.detach().clone()
    wrapper.update_params(loss.sum())
    torch.testing.assert_close(model.weight, before - 0.1 * 2.0)  # two rows of ones
    assert model.weight.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU bfloat16 is always on")
@pytest.mark.parametrize(("is_fast", "kind"), [(True, torch.bfloat16), (False, torch.float32)])
def test_slow_cpus_are_spared(
    is_fast: bool, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "is_bf16_fast", lambda: is_fast)
    model = nn.Linear(4, 3)
    wrapper = Bf16OptimWrapper(optimizer(model), only_if_fast=True)
    with wrapper.optim_context(model):
        assert model(torch.ones(2, 4)).dtype == kind
    assert precision_of(wrapper) == ("bf16-mixed" if is_fast else "32-true")


def test_what_the_card_says() -> None:
    own = optimizer(nn.Linear(2, 2))
    assert precision_of(OptimWrapper(own)) == "32-true"
    assert precision_of(Bf16OptimWrapper(own)) == "bf16-mixed"
    assert precision_of(AmpOptimWrapper.__new__(AmpOptimWrapper)) == "16-mixed"  # wants a GPU


def test_weights_are_laid_out_channels_last() -> None:
    model = nn.Conv2d(8, 4, 3)
    before = model.weight.detach().clone()
    ChannelsLastHook().before_run(SimpleNamespace(model=model))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight, before)
