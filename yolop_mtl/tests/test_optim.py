"""Schedule, groups of parameters, averaged weights: the numbers they are to give."""

import math

import pytest
import torch
from torch import nn

from yolop_mtl import build_model
from yolop_mtl.blocks import Implicit
from yolop_mtl.config import OptimConfig
from yolop_mtl.ema import ModelEma, ema_decay
from yolop_mtl.loss_weights import BASE_GAINS, LossWeights
from yolop_mtl.optim import build_optimizer, cosine_lr, rates_at, set_rates, split_parameters


@pytest.mark.parametrize(
    ("final_lr", "expected"),
    [
        (0.1, (0.01, 0.00868198, 0.0055, 0.00231802, 0.00100025)),
        (0.2, (0.01, 0.00882843, 0.006, 0.00317157, 0.00200022)),
    ],
)
def test_cosine(final_lr: float, expected: tuple[float, ...]) -> None:
    cfg = OptimConfig(lr=0.01, final_lr=final_lr, epochs=300)
    found = [cosine_lr(cfg, epoch) for epoch in (0, 75, 150, 225, 299)]
    assert found == pytest.approx(expected, abs=5e-9)
    after_warmup = [rates_at(cfg, epoch * 7, 7).lr for epoch in (150, 225, 299)]
    assert after_warmup == pytest.approx(expected[2:], abs=5e-9)


def test_warmup() -> None:
    cfg = OptimConfig()
    first, middle, last = (rates_at(cfg, step, 500) for step in (0, 750, 1500))
    assert first == (0.0, 0.1, 0.8)
    lr = cosine_lr(cfg, 1.5)
    assert middle == pytest.approx((lr / 2, (0.1 + lr) / 2, (0.8 + 0.937) / 2))
    assert last == (cosine_lr(cfg, 3), cosine_lr(cfg, 3), 0.937)


def test_warmup_has_a_least_number_of_steps_but_at_most_a_third() -> None:
    assert rates_at(OptimConfig(), 999, 100).momentum < 0.937  # 3 epochs are 300 steps
    assert rates_at(OptimConfig(), 1000, 100).momentum == 0.937
    short = OptimConfig(epochs=30)
    assert rates_at(short, 99, 10).momentum < 0.937
    assert rates_at(short, 100, 10).momentum == 0.937
    assert rates_at(OptimConfig(warmup_epochs=0, warmup_steps=0), 0, 10).lr == 0.01


def test_biases_of_adamw_warm_up_as_the_others() -> None:
    rates = rates_at(OptimConfig(optimizer="adamw"), 100, 500)
    assert rates.lr == rates.bias_lr > 0


@pytest.mark.parametrize("use_repconv", [False, True])
def test_groups_are_disjoint_and_complete(use_repconv: bool) -> None:
    model = build_model("nano", num_classes=2, use_repconv=use_repconv)
    weights = LossWeights(gains=BASE_GAINS, tasks=model.tasks, is_learned=True)
    network = nn.ModuleList([model, weights])
    groups = split_parameters(network)
    ids = [{id(p) for p in group} for group in groups]
    assert [len(own) for own in ids] == [len(group) for group in groups]
    assert sum(len(own) for own in ids) == len(ids[0] | ids[1] | ids[2])
    assert ids[0] | ids[1] | ids[2] == {id(p) for p in network.parameters()}
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert id(module.weight) in ids[1]
        if isinstance(module, Implicit):
            assert id(module.vector) in ids[1]
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            assert id(module.weight) in ids[0]
        if getattr(module, "bias", None) is not None:
            assert id(module.bias) in ids[2]
    assert {id(p) for p in weights.parameters()} <= ids[1]


def test_frozen_parameters_are_in_no_group() -> None:
    model = build_model("nano")
    model.backbone.requires_grad_(False)
    count = sum(len(group) for group in split_parameters(model))
    assert count == sum(p.requires_grad for p in model.parameters()) < len([*model.parameters()])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_is_of_weights_alone_and_in_proportion_to_the_step(name: str) -> None:
    cfg = OptimConfig(optimizer=name, weight_decay=0.0005)
    optimizer = build_optimizer(cfg, build_model("nano"), images_per_step=32)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.00025, 0, 0]
    set_rates(optimizer, rates_at(cfg, 0, 500))
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0, 0.1 * (name == "sgd")]
    for group in optimizer.param_groups:
        assert (group["betas"][0] if name == "adamw" else group["momentum"]) == 0.8
        assert group.get("nesterov", True)


def test_average() -> None:
    found = [ema_decay(n) for n in (1, 100, 2000, 20000)]
    assert found == pytest.approx([0.000499825, 0.0487657, 0.632057, 0.999855], abs=5e-7)
    torch.manual_seed(0)
    model, other = (build_model("nano", tasks=["detection"]) for _ in range(2))
    average = ModelEma(model, decay=0.9)
    model(torch.rand(2, 3, 64, 64))  # moves running statistics
    want = {name: t.clone() for name, t in average.model.state_dict().items()}
    for count, network in enumerate((model, other, model), 1):
        average.update(network)
        share = 0.9 * (1 - math.exp(-count / 2000))
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                want[name] = share * want[name] + (1 - share) * tensor
    own = average.model.state_dict()
    for name, tensor in want.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(own[name], tensor)
    assert own["detection.anchors"].equal(model.detection.anchors)
    steps = "backbone.e2.a.norm.num_batches_tracked"
    assert own[steps].equal(model.state_dict()[steps])
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())


def test_a_decay_of_0_is_the_network_itself() -> None:
    model = build_model("nano", tasks=["lane"])
    average = ModelEma(build_model("nano", tasks=["lane"]), decay=0)
    average.update(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(average.model.state_dict()[name], tensor)
