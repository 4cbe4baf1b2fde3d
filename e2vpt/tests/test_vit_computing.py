"""What a prompted ViT computes and by which kernels, and which backbones it refuses."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.layers import Attention, Mlp
from timm.models import create_model
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.geometry import LayerGeometry
from e2vpt.model import PromptedModel, PromptSpec, with_token_form
from e2vpt.vit import check_supported
from shared_utils.errors import InputError

from .vit_families import HEADS, SPECS, WIDTH, build, images_for, largest_gap, prompted

# --- what is computed ----------------------------------------------------------------------------


def lengths_in_blocks(vit: Any, run: Callable[[], Any]) -> list[int]:
    """Tokens that each block's MLP sees."""
    seen: list[int] = []
    hooks = [
        b.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for b in vit.blocks
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("family", "spec", "token_form", "expected"),
    [
        (
            "class_token",
            "both",
            False,
            [17, 17, 1],
        ),  # prompts add no token; the last block does CLS only
        ("class_token", "kv", True, [17, 17, 17]),
        ("class_token", "both", True, [20, 20, 20]),
        ("class_token", "both_shallow", False, [20, 20, 1]),
        ("registers", "both", False, [21, 21, 1]),
        ("avg_with_class_token", "both", False, [17, 17, 17]),
        ("avg_with_class_token", "both", True, [20, 20, 20]),
    ],
)
@torch.no_grad()
def test_only_the_rows_that_matter_are_computed(
    family: str, spec: str, token_form: bool, expected: list[int]
) -> None:
    vit = build(family)
    model = with_token_form(prompted(vit, **SPECS[spec]), token_form)
    assert lengths_in_blocks(vit, lambda: model.features(images_for())) == expected


@torch.no_grad()
def test_pool_prompts_makes_tokens_in_the_last_block_only() -> None:
    vit = build("avg_with_class_token")
    model = prompted(vit, num_visual_prompts=3, pool_prompts=True)
    assert lengths_in_blocks(vit, lambda: model.features(images_for())) == [17, 17, 20]


# --- fused and explicit attention, autocast, compile ---------------------------------------------


def set_fused(vit: Any, fused: bool) -> None:
    for block in vit.blocks:
        block.attn.fused_attn = fused


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "family", ["class_token", "avg_without_class_token", "qk_norm", "wide_heads"]
)
@torch.no_grad()
def test_fused_attention_equals_the_explicit_softmax(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype, limit: float
) -> None:
    vit, x = build(family), images_for(family).to(dtype)
    calls: list[int] = []
    fused_kernel = F.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return fused_kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    for spec in SPECS.values():
        model = prompted(vit, **spec).to(dtype)
        for token_form in (False, True):
            with_token_form(model, token_form)
            set_fused(vit, True)
            fused = model.features(x)
            assert len(calls) == 3
            set_fused(vit, False)
            explicit = model.features(x)
            assert len(calls) == 3
            calls.clear()
            assert fused.dtype == dtype
            assert largest_gap(fused, explicit) < limit * max(1, explicit.abs().max().item())
        model.double()


@pytest.mark.parametrize("fused", [True, False])
def test_attention_dropout_acts_where_the_backbone_trains(fused: bool) -> None:
    x = images_for()
    for mode in ("none", "full"):
        vit = build("class_token", attn_drop_rate=0.5)
        set_fused(vit, fused)
        model = prompted(vit, backbone_trains=mode, prompt_dropout=0.0).train()
        torch.manual_seed(0)
        assert torch.equal(model.features(x), model.features(x)) == (mode == "none")
        model.eval()
        assert torch.equal(model.features(x), model.features(x))


@pytest.mark.parametrize("token_form", [False, True])
@pytest.mark.parametrize(
    "family", ["class_token", "micro_vit", "qk_norm", "map_without_class_token"]
)
def test_autocast_bf16_stays_near_float32(family: str, token_form: bool) -> None:
    vit, x = build(family).float(), images_for(family).float()
    with torch.no_grad():  # logits of a trained network's size, so that rounding stays small
        for parameter in vit.parameters():
            parameter.mul_(0.4 if parameter.ndim == 2 else 1)
    model = prompted(vit, num_visual_prompts=3, num_kv_prompts=2, share_kv=False)
    with_token_form(model.float(), token_form)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    probe = torch.randn(2, 5)

    def run() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        features, logits = model.features(x), model(x)
        gradients = torch.autograd.grad((logits.float() * probe).sum(), trained.values())
        assert all(g.dtype == torch.float32 for g in gradients)
        outputs = torch.cat(
            [features.detach().float().flatten(), logits.detach().float().flatten()]
        )
        return logits, outputs, dict(zip(trained, gradients, strict=True))

    _, expected, expected_gradients = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, got, gradients = run()
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(got).all()
    assert ((got - expected).norm() / expected.norm()).item() < 2e-2
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error.item() < 0.05, name  # also false for nan


def check_compiled(backend: str, token_form: bool) -> None:
    vit, x = build("class_token"), images_for()
    model = prompted(vit, num_visual_prompts=3, num_kv_prompts=2, token_form=token_form)
    eager = model(x)
    expected = torch.autograd.grad(eager.sum(), [*model.visual.weight, *model.kv.key])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)(x)
    got = torch.autograd.grad(compiled.sum(), [*model.visual.weight, *model.kv.key])
    assert largest_gap(compiled, eager) < 1e-12
    assert max(largest_gap(a, b) for a, b in zip(got, expected, strict=True)) < 1e-11


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("token_form", [False, True])
def test_compiles_as_one_graph(token_form: bool) -> None:
    check_compiled("eager", token_form)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_to_native_code() -> None:
    check_compiled("inductor", token_form=False)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_under_autocast() -> None:
    """Low precision takes an attention of our own (`attend`), which must compile too."""
    vit, x = build().float(), images_for().float()
    model = prompted(vit, num_visual_prompts=3, num_kv_prompts=2).float()
    trained = [*model.visual.weight, *model.kv.key]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = model(x), compiled(x)
    torch.testing.assert_close(got, expected)
    gradients = torch.autograd.grad(got.float().sum(), trained)
    for mine, eager in zip(
        gradients, torch.autograd.grad(expected.float().sum(), trained), strict=True
    ):
        torch.testing.assert_close(mine, eager)


# --- geometry and refusals -----------------------------------------------------------------------


def test_geometry_is_read_from_the_backbone() -> None:
    geometry = check_supported(build("wide_heads", reg_tokens=2, depth=2))
    assert geometry.num_layers == 2
    assert geometry.embed_dim == WIDTH
    assert geometry.layers == (LayerGeometry(WIDTH, HEADS, 12),) * 2  # 12 is not WIDTH / HEADS
    assert geometry.patch_size == 8
    assert geometry.num_prefix_tokens == 3


class OwnMlp(Mlp):
    """Any MLP will do: prompts do not touch it."""


class OwnAttention(Attention):
    """A subclass may compute anything, so it is refused."""


def with_own_attention_in_layer_1() -> nn.Module:
    vit = build()
    vit.blocks[1].attn = OwnAttention(WIDTH, HEADS)
    return vit


def tiny(**options: Any) -> VisionTransformer:
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2, num_classes=5, **options
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: tiny(attn_layer="diff"), r"attention class timm\.\S+\.DiffAttention in layer 0"),
        (with_own_attention_in_layer_1, r"attention class \S*\.OwnAttention in layer 1"),
        (
            lambda: tiny(block_fn=ParallelScalingBlock),
            r"block class timm\.\S+\.ParallelScalingBlock in layer 0",
        ),
        (
            lambda: create_model("deit_tiny_distilled_patch16_224", embed_dim=24, depth=1),
            r"class timm\.\S+\.VisionTransformerDistilled",
        ),
        (
            lambda: create_model("beit_base_patch16_224", embed_dim=24, depth=1, num_heads=2),
            r"class timm\.\S+\.Beit\b",
        ),
        (lambda: create_model("resnet10t"), r"class timm\.\S+\.ResNet\b"),
        (lambda: nn.Linear(2, 2), r"class torch\.\S+\.Linear\b"),
        (lambda: tiny(global_pool=""), r"global_pool ''"),
        (lambda: tiny(global_pool="prr"), r"global_pool 'prr'"),
    ],
)  # fmt: skip
def test_unknown_classes_are_refused_by_name(make: Callable[[], nn.Module], named: str) -> None:
    backbone = make()
    flags = [p.requires_grad for p in backbone.parameters()]
    with pytest.raises(InputError, match=rf"^backbone: got {named}.*, expected .*; "):
        PromptedModel(backbone, PromptSpec(num_classes=2))
    assert [p.requires_grad for p in backbone.parameters()] == flags  # refused untouched


def test_an_own_mlp_is_no_reason_to_refuse() -> None:
    check_supported(tiny(mlp_layer=OwnMlp))
