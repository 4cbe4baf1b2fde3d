"""Learning-rate schedules against numbers worked by hand, and what the optimisers get."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from e2vpt.micro_vit import build_micro_vit
from e2vpt.model import PromptedModel, PromptSpec
from e2vpt.optim import COOLDOWN_SHARE, Schedule, build_optimizer, lr_at, set_lr
from shared_utils.errors import InputError


def rates(schedule: Schedule, *, peak: float = 1.0, steps_per_epoch: int = 7, epochs: int = 20,
          warmup_epochs: float = 4) -> list[float]:  # fmt: skip
    """The rate of every step of a run."""
    return [
        lr_at(step, schedule=schedule, peak=peak, steps_per_epoch=steps_per_epoch, epochs=epochs,
              warmup_epochs=warmup_epochs)
        for step in range(epochs * steps_per_epoch)
    ]  # fmt: skip


# --- per-epoch: parity with the paper's code -----------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.0),
        (1, 0.25),
        (9, 2.25),
        (10, 2.5),
        (55, 1.25),
        (99, 2.5 * 0.5 * (1 + math.cos(math.pi * 89 / 90))),
    ],
)
def test_per_epoch_schedule_is_the_papers(epoch: int, expected: float) -> None:
    """Base rate 10 at batch 64: peak 10 * 64 / 256 = 2.5; 100 epochs, 10 of them warm-up."""
    for step in (epoch * 13, epoch * 13 + 6, epoch * 13 + 12):  # constant within an epoch
        got = lr_at(
            step, schedule="per-epoch", peak=10 * 64 / 256, steps_per_epoch=13, epochs=100,
            warmup_epochs=10,
        )  # fmt: skip
        assert got == pytest.approx(expected, abs=1e-12)


def test_per_epoch_schedule_ends_at_the_papers_rate() -> None:
    run = rates("per-epoch", peak=2.5, steps_per_epoch=13, epochs=100, warmup_epochs=10)
    assert run[-1] == pytest.approx(7.61e-4, abs=1e-6)
    assert max(run) == 2.5
    by_epoch = [set(run[e * 13 : (e + 1) * 13]) for e in range(100)]
    assert all(len(rates_of_epoch) == 1 for rates_of_epoch in by_epoch)
    assert all(a != b for a, b in pairwise(by_epoch))


def test_per_epoch_schedule_without_warm_up_starts_at_the_peak() -> None:
    run = rates("per-epoch", warmup_epochs=0)
    assert run[:7] == [1.0] * 7
    assert run[7] < 1


# --- per step ------------------------------------------------------------------------------------


def test_cosine_rises_to_the_peak_and_falls_to_nearly_zero() -> None:
    run = rates("cosine", peak=2.0)
    warmup = 4 * 7
    assert run[0] == pytest.approx(2.0 / (warmup + 1))  # the first step trains something
    steps_up = [b - a for a, b in pairwise(run[: warmup + 1])]
    assert steps_up == pytest.approx([2.0 / (warmup + 1)] * warmup)  # a straight line to the peak
    assert run[warmup] == 2.0
    falling = run[warmup:]
    assert all(a > b for a, b in pairwise(falling))
    assert run[warmup + (140 - warmup) // 2] == pytest.approx(1.0)  # half way down
    assert 0 < run[-1] < 2.0 * 1e-3


def test_cosine_with_a_part_of_an_epoch_as_warm_up() -> None:
    run = rates("cosine", epochs=2, warmup_epochs=0.5)  # 3.5 steps
    assert run[:4] == pytest.approx([1 / 4.5, 2 / 4.5, 3 / 4.5, 4 / 4.5])
    assert run[4] < 1
    assert max(run) <= 1


def test_cosine_without_warm_up_starts_at_the_peak() -> None:
    assert rates("cosine", warmup_epochs=0)[0] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "per-epoch"])
def test_a_run_of_warm_up_only_never_passes_the_peak(schedule: Schedule) -> None:
    run = rates(schedule, epochs=3, warmup_epochs=3)
    assert all(0 <= a <= b < 1 for a, b in pairwise(run))


def test_trapezoid_is_flat_then_falls_in_a_straight_line() -> None:
    run = rates("trapezoid", peak=2.0)
    warmup, descent = 4 * 7, round(140 * (1 - COOLDOWN_SHARE))
    assert run[0] == pytest.approx(2.0 / (warmup + 1))
    assert run[warmup : descent + 1] == [2.0] * (descent + 1 - warmup)
    steps_down = [a - b for a, b in pairwise(run[descent:])]
    assert steps_down == pytest.approx([2.0 / (140 * 0.35)] * len(steps_down))
    assert run[-1] == pytest.approx(2.0 / (140 * 0.35))  # one step before 0


def test_a_longer_trapezoid_goes_on_where_a_shorter_one_had_not_descended() -> None:
    short, long = rates("trapezoid", epochs=20), rates("trapezoid", epochs=31)
    descent = round(20 * 7 * (1 - COOLDOWN_SHARE))
    assert long[: descent + 1] == short[: descent + 1]
    assert long[descent + 1] > short[descent + 1]


# --- optimisers ----------------------------------------------------------------------------------


def small_model(**spec: Any) -> PromptedModel:
    vit = build_micro_vit(num_classes=3, embed_dim=16, depth=2, num_heads=2)
    return PromptedModel(
        vit, PromptSpec(num_classes=3, num_visual_prompts=2, num_kv_prompts=2, **spec)
    )


def decay_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """Weight decay by parameter name; fails on a parameter that is in two groups."""
    names = {id(p): n for n, p in model.named_parameters()}
    found = [(names[id(p)], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_is_for_prompts_and_weights_not_for_biases(name: Any) -> None:
    model = small_model(share_kv=False, prompt_dim=4)
    optimizer = build_optimizer(name, model.named_parameters(), lr=0.5, weight_decay=0.01)
    assert decay_of(optimizer, model) == {
        "visual.weight.0": 0.01, "visual.weight.1": 0.01, "visual.project.weight": 0.01,
        "kv.key.0": 0.01, "kv.key.1": 0.01, "kv.value.0": 0.01, "kv.value.1": 0.01,
        "head.weight": 0.01, "visual.project.bias": 0.0, "head.bias": 0.0,
    }  # fmt: skip
    assert all(g["lr"] == 0.5 for g in optimizer.param_groups)


def test_norms_and_biases_of_a_backbone_that_trains_are_not_decayed() -> None:
    model = small_model(backbone_trains="full")
    decays = decay_of(
        build_optimizer("adamw", model.named_parameters(), lr=0.1, weight_decay=0.3), model
    )
    assert decays.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        is_plain = name.endswith("bias") or "norm" in name or parameter.ndim < 2
        assert decays[name] == (0.0 if is_plain else 0.3), name
    assert decays["backbone.blocks.0.norm1.weight"] == 0.0
    assert decays["backbone.blocks.0.attn.qkv.weight"] == 0.3


def test_biases_alone_make_one_group_without_decay() -> None:
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer("adamw", [("bias", layer.bias)], lr=0.1, weight_decay=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0]


def test_classes_and_momentum() -> None:
    parameters = list(nn.Linear(3, 2).named_parameters())
    sgd = build_optimizer("sgd", parameters, lr=0.1, weight_decay=0.0)
    assert type(sgd) is torch.optim.SGD
    assert [g["momentum"] for g in sgd.param_groups] == [0.9, 0.9]
    sgd = build_optimizer("sgd", parameters, lr=0.1, weight_decay=0.0, momentum=0.5)
    assert [g["momentum"] for g in sgd.param_groups] == [0.5, 0.5]
    assert type(build_optimizer("adamw", parameters, lr=0.1, weight_decay=0.0)) is torch.optim.AdamW


def test_sgd_step_is_the_formula() -> None:
    """w - lr (g + wd w) for the weight, b - lr g for the bias."""
    layer = nn.Linear(2, 1).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = build_optimizer("sgd", layer.named_parameters(), lr=0.5, weight_decay=0.1)
    layer(torch.tensor([[1.0, -2.0]], dtype=torch.float64)).sum().backward()
    optimizer.step()
    gradient = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(layer.weight.detach(), weight - 0.5 * (gradient + 0.1 * weight))
    torch.testing.assert_close(layer.bias.detach(), bias - 0.5)


def test_nothing_to_train_is_an_error() -> None:
    layer = nn.Linear(2, 1).requires_grad_(False)
    expected = r"^parameters: got none that train, expected at least one; choose another method$"
    with pytest.raises(InputError, match=expected):
        build_optimizer("sgd", layer.named_parameters(), lr=0.1, weight_decay=0.0)


def test_set_lr_reaches_every_group() -> None:
    model = small_model()
    optimizer = build_optimizer("sgd", model.named_parameters(), lr=0.5, weight_decay=0.01)
    assert len(optimizer.param_groups) == 2
    set_lr(optimizer, 0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()  # epoch 0 of the parity schedule trains nothing
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    set_lr(optimizer, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]
