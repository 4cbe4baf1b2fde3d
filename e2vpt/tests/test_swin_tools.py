"""What works on any prompted model works on Swin: folding, the bank, pruning, adapters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional as F

import e2vpt
from e2vpt.model import PromptedModel, PromptSpec, remove

KINDS: dict[str, Callable[..., Any]] = {"v1": SwinTransformer, "v2": SwinTransformerV2}
both_kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str) -> Any:
    """Maps of 9 x 13 and 5 x 7 patches: padded windows of 4, shifted in every second block."""
    torch.manual_seed(0)
    backbone = KINDS[kind](
        img_size=(18, 26), patch_size=2, window_size=4, embed_dim=16, depths=(2, 2),
        num_heads=(2, 4), num_classes=5,
    )  # fmt: skip
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in key and key.endswith("weight"):
                parameter.add_(1)
    return backbone.double().eval()


def prompted(backbone: nn.Module, seed: int = 2, **spec: Any) -> PromptedModel:
    counts = {"num_classes": 4, "num_visual_prompts": 3, "num_kv_prompts": 2}
    model = PromptedModel(backbone, PromptSpec(**{**counts, **spec})).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in (model.visual, model.kv, model.head):
            for parameter in module.parameters() if module is not None else ():
                parameter.normal_()
    return model


def images(batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 18, 26, dtype=torch.float64, generator=generator)


@both_kinds
@pytest.mark.parametrize("kv", [0, 2])
@torch.no_grad()
def test_fold(kind: str, kv: int) -> None:
    model, x = prompted(build(kind), num_kv_prompts=kv), images()
    fast = e2vpt.fold(model)
    assert fast.visual is None
    assert [key.shape[1] for key in fast.kv.key] == [3 + kv] * 4
    assert (fast(x) - model(x)).abs().max() < 1e-12


@both_kinds
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_bank_is_each_task_alone(kind: str, fused: bool) -> None:
    """Tasks of different numbers of rows: those that a task lacks are masked in every window."""
    backbone, x = build(kind), images()
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    few = prompted(backbone, seed=3, num_visual_prompts=0, num_kv_prompts=1, num_classes=2)
    many, none = prompted(backbone), prompted(backbone, num_visual_prompts=0, num_kv_prompts=0)
    bank = e2vpt.PromptBank(backbone).double()
    for name, model in (("few", few), ("many", many), ("none", none)):
        bank.add(name, model)
    logits = bank(x, tasks=["many", "few", "none", "many"])
    for i, model in enumerate((many, few, none, many)):
        assert (logits[i] - model(x[i : i + 1])[0]).abs().max() < 1e-12


@both_kinds
def test_importance_is_the_gradient_of_a_mask(kind: str) -> None:
    """Per sample, the absolute derivative by a factor on prompt k of all layers."""
    model, x, labels = prompted(build(kind)), images(), torch.tensor([0, 1, 2, 3])
    scores = e2vpt.importance(model, [(x, labels)], num_segments=8)
    weights = [weight.detach().clone() for weight in model.visual.weight]
    expected = torch.zeros(3, dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        for k in range(3):
            losses = []
            for factor in (1 + step, 1 - step):
                for own, weight in zip(model.visual.weight, weights, strict=True):
                    own.copy_(weight)
                    own[k] *= factor
                losses.append(F.cross_entropy(model(x), labels, reduction="none"))
            expected[k] = ((losses[0] - losses[1]) / (2 * step)).abs().mean()
    torch.testing.assert_close(scores["tokens"], expected, rtol=1e-6, atol=1e-8)


@both_kinds
@torch.no_grad()
def test_prune_removes_rows_and_segments_of_every_width(kind: str) -> None:
    model, x = prompted(build(kind)), images()
    with torch.enable_grad():
        scores = e2vpt.importance(model, [(x, torch.zeros(4).long())], num_segments=8)
    small = e2vpt.prune(model, scores, num_tokens=1, num_segments=2)
    assert [tuple(weight.shape) for weight in small.visual.weight] == [(2, 6, 2)] * 2 + [
        (2, 6, 4)
    ] * 2
    kept = scores["tokens"].argsort(descending=True)[:2].sort().values
    for i, weight in enumerate(model.visual.weight):
        rows = small.visual.rows(i)
        whole = weight[kept]
        assert torch.equal(rows[rows != 0], whole[rows != 0])
    assert (e2vpt.fold(small)(x) - small(x)).abs().max() < 1e-12


@both_kinds
@pytest.mark.parametrize("adapter", ["lora", "adaptformer"])
@torch.no_grad()
def test_adapters_go_on_and_off(kind: str, adapter: str) -> None:
    backbone, x = build(kind), images()
    logits, state = backbone(x), {n: t.clone() for n, t in backbone.state_dict().items()}
    plain = {"num_visual_prompts": 0, "num_kv_prompts": 0}
    probe = prompted(build(kind), **plain)
    model = prompted(backbone, adapter=adapter, **plain)
    assert (model(x) - probe(x)).abs().max() < 1e-12
    for name, parameter in model.backbone.named_parameters():
        if parameter.requires_grad:
            parameter.normal_()
            assert ".up." in name or ".down." in name
    assert (model(x) - probe(x)).abs().max() > 1e-3
    assert remove(model) is backbone
    assert all(torch.equal(t, state[n]) for n, t in backbone.state_dict().items())
    assert torch.equal(backbone(x), logits)
