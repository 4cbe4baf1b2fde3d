"""LoRA, AdaptFormer and partial-k: formulas, counts, learning."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt import adapters
from e2vpt.model import PromptedModel, PromptSpec, parameter_report, tuned_state

from .adapter_models import (
    IMAGES,
    KINDS,
    NOTHING,
    model_of,
    randomize,
    state_of,
    train_two_steps,
    vit,
)

# --- what is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_linear_probe(kind: str) -> None:
    linear, adapted = model_of(vit()).eval(), model_of(vit(), kind).eval()
    adapted.head.load_state_dict(linear.head.state_dict())
    with torch.no_grad():
        assert torch.equal(adapted(IMAGES), linear(IMAGES))


def test_lora_is_the_backbone_with_merged_weights() -> None:
    """W_q + alpha / r B A for queries, the same for values; keys as they were."""
    model = model_of(vit(), "lora", adapter_dim=4, adapter_scale=0.7).double().eval()
    randomize(model)
    merged = vit().double()
    with torch.no_grad():
        for block, plain in zip(model.backbone.blocks, merged.blocks, strict=True):
            updates = block.attn.qkv.updates
            assert updates.keys() == {"0", "2"}
            for start, update in ((0, updates["0"]), (64, updates["2"])):
                down, up = update.down, update.up
                assert down.weight.shape == (4, 32)
                assert up.weight.shape == (32, 4)
                plain.attn.qkv.weight[start : start + 32] += 0.7 * up.weight @ down.weight
        merged.head = model.head
        torch.testing.assert_close(
            model(IMAGES.double()), merged(IMAGES.double()), rtol=0, atol=1e-12
        )
        assert (model(IMAGES.double()) - vit().double()(IMAGES.double())[:, :3]).abs().max() > 0.1


def test_adaptformer_is_a_bottleneck_beside_the_mlp() -> None:
    """A block written out: x + ls1(attn(norm1(x))), then beside MLP, norm and layer scale."""
    model = model_of(vit(), "adaptformer", adapter_dim=4, adapter_scale=0.3).double().eval()
    randomize(model)
    plain, images = vit().double(), IMAGES.double()
    with torch.no_grad():
        x = plain.norm_pre(plain._pos_embed(plain.patch_embed(images)))
        for block, changed in zip(plain.blocks, model.backbone.blocks, strict=True):
            x = x + block.ls1(block.attn(block.norm1(x)))
            down, up = changed.mlp.down, changed.mlp.up
            beside = F.relu(x @ down.weight.T + down.bias) @ up.weight.T + up.bias
            x = x + block.ls2(block.mlp(block.norm2(x))) + 0.3 * beside
        expected = model.head(plain.norm(x)[:, 0])
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)


def other_backbones() -> dict[str, Any]:
    """Tiny ones of each kind of block and attention."""
    swin = {
        "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 1),
        "num_heads": (1, 2), "num_classes": 3,
    }  # fmt: skip
    eva = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return {
        "swin": lambda: SwinTransformer(**swin),
        "swin v2": lambda: SwinTransformerV2(**swin),
        "post-norm vit": lambda: vit(block_fn=ResPostBlock),
        "eva, projections apart": lambda: Eva(**eva, qkv_fused=False, swiglu_mlp=True),
        "eva, bias apart": lambda: Eva(**eva, init_values=0.5),  # past the projection's forward
        "eva, rotary": lambda: Eva(**eva, attn_type="rope", use_rot_pos_emb=True, init_values=0.5),
        "eva, post-norm": lambda: Eva(**eva, use_post_norm=True),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", other_backbones())
def test_other_blocks_take_them(name: str, kind: Any) -> None:
    """Bit-equal at the start, moved by every layer's adapter, and bit-equal once more after."""

    def build() -> Any:
        torch.manual_seed(3)
        backbone = other_backbones()[name]()
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return backbone.eval()

    backbone, plain = build(), build()
    modules = list(backbone.named_modules())
    adapters.check_adaptable(backbone, kind)
    adapters.attach(backbone, kind, 4, 0.5)
    blocks = adapters.transformer_blocks(backbone)
    assert len(blocks) == 3
    with torch.no_grad():
        expected = plain(IMAGES)
        assert torch.equal(backbone(IMAGES), expected)
        for block in blocks:
            layers = [m for m in block.modules() if isinstance(m, adapters.LowRankLinear)]
            ups = [u.up for m in layers for u in m.updates.values()]
            ups = ups or [block.mlp.up]
            assert len(ups) == (2 if kind == "lora" else 1)
            for up in ups:
                before = backbone(IMAGES)
                up.weight.normal_()
                assert not torch.allclose(backbone(IMAGES), before)
        adapters.detach(backbone)
        assert torch.equal(backbone(IMAGES), expected)
    assert [(n, id(m)) for n, m in backbone.named_modules()] == [(n, id(m)) for n, m in modules]
    assert list(backbone.state_dict()) == list(plain.state_dict())


def test_the_merged_weight_is_what_forward_computes() -> None:
    layer = adapters.LowRankLinear(nn.Linear(8, 12), 2, 0.7, num_parts=3, updated=(0, 2)).double()
    randomize(layer)
    x = torch.randn(5, 8, dtype=torch.float64)
    merged = F.linear(x, layer.weight, layer.linear.bias)
    torch.testing.assert_close(layer(x), merged, rtol=0, atol=1e-12)
    assert torch.equal(layer.weight[4:8], layer.linear.weight[4:8])
    plain = layer.linear(x)
    is_moved = ((layer(x) - plain).abs().amax(0) > 1e-3).tolist()
    assert is_moved == [True] * 4 + [False] * 4 + [True] * 4


@pytest.mark.parametrize(("name", "gamma"), [("pre", "gamma_2"), ("post", None)])
def test_adaptformer_in_an_eva_block(name: str, gamma: str | None) -> None:
    """Beside the layer scale, and beside a norm that comes after the MLP."""
    torch.manual_seed(0)
    cls = EvaBlock if name == "pre" else EvaBlockPostNorm
    block: Any = cls(dim=16, num_heads=2, init_values=0.5).double().eval()
    plain = copy.deepcopy(block)
    wrapped = nn.ModuleDict({"block": block})
    adapters.attach(wrapped, "adaptformer", 4, 0.3)
    wrapped.double()
    randomize(block.mlp.down)
    randomize(block.mlp.up)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        attended = plain.norm1(plain.attn(x)) if gamma is None else plain.attn(plain.norm1(x))
        after = x + (attended if gamma is None else plain.gamma_1 * attended)
        beside = 0.3 * block.mlp.up(F.relu(block.mlp.down(after)))
        torch.testing.assert_close(block(x), plain_second_half(plain, after) + beside)
    adapters.detach(wrapped)
    assert list(block.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(block(x), plain(x))


def plain_second_half(block: Any, x: Tensor) -> Tensor:
    if isinstance(block, EvaBlockPostNorm):
        out: Tensor = x + block.norm2(block.mlp(x))
        return out
    out = x + block.gamma_2 * block.mlp(block.norm2(x))
    return out


# --- counts --------------------------------------------------------------------------------------


def vit_b_report(**spec: Any) -> dict[str, float]:
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224")
        return parameter_report(
            PromptedModel(backbone, PromptSpec(num_classes=100, **{**NOTHING, **spec}))
        )


HEAD = 768 * 100 + 100
PLAIN = 85_798_656  # of ViT-B/16 without its classifier
BLOCK = 2 * 2 * 768 + (768 + 1) * 3 * 768 + (768 + 1) * 768 + 2 * 768 * 3072 + 768 + 3072


@pytest.mark.parametrize(
    ("spec", "part", "count"),
    [
        ({"adapter": "lora", "adapter_dim": 1}, "adapters", 36_864),
        ({"adapter": "lora", "adapter_dim": 8}, "adapters", 8 * 36_864),
        ({"adapter": "adaptformer", "adapter_dim": 8}, "adapters",
         12 * (768 * 8 + 8 + 768 * 8 + 768)),
        ({"adapter": "adaptformer", "adapter_dim": 64}, "adapters",
         12 * (768 * 64 + 64 + 768 * 64 + 768)),
        ({"backbone_trains": "partial"}, "backbone", BLOCK + 2 * 768),
        ({"backbone_trains": "partial", "partial_blocks": 3}, "backbone", 3 * BLOCK + 2 * 768),
    ],
)  # fmt: skip
def test_counts_on_vit_b(spec: dict[str, Any], part: str, count: int) -> None:
    report = vit_b_report(**spec)
    added = count if part == "adapters" else 0
    expected = {"visual": 0, "kv": 0, "adapters": 0, "backbone": 0, "head": HEAD, part: count}
    assert {key: report[key] for key in expected} == expected
    assert report["tuned"] == count + HEAD
    assert report["total"] == PLAIN + HEAD + added
    assert report["percent"] == 100 * (count + HEAD) / (PLAIN + HEAD + added)


# --- what trains ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "lora"},
        {"kind": "adaptformer"},
        {"backbone_trains": "partial"},
        {"backbone_trains": "partial", "partial_blocks": 2},
    ],
)
def test_two_steps_change_what_trains_and_nothing_else(spec: dict[str, Any]) -> None:
    # No class bias on keys: a softmax does not see what is added to all keys alike.
    model = model_of(vit(qkv_bias=False), **spec)
    before, names = state_of(model), set(tuned_state(model))
    train_two_steps(model)
    assert not any(module.training for module in model.backbone.modules())
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, before[name]) == (name not in names), name
    last = range(3 - spec.get("partial_blocks", 1), 3)
    parts = {
        "lora": [f"blocks.{i}.attn.qkv.updates.{n}." for i in range(3) for n in (0, 2)],
        "adaptformer": [f"blocks.{i}.mlp.{n}." for i in range(3) for n in ("down", "up")],
    }.get(spec.get("kind", ""), [*(f"blocks.{i}." for i in last), "norm."])
    begins = (*(f"backbone.{part}" for part in parts), "head.")
    assert names == {name for name in before if name.startswith(begins)}


def test_partial_trains_the_norm_after_pooling_where_that_is_the_last() -> None:
    model = model_of(vit(global_pool="avg", class_token=False), backbone_trains="partial")
    names = {name for name in tuned_state(model) if "blocks" not in name}
    assert names == {"backbone.fc_norm.weight", "backbone.fc_norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_independent(kind: str) -> None:
    model = model_of(vit(), kind).eval()
    randomize(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(IMAGES)
        randomize(twin)
        for parameter in twin.parameters():
            parameter.mul_(2)
        assert torch.equal(model(IMAGES), expected)
        assert not torch.allclose(twin(IMAGES), expected)
