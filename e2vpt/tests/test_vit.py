"""The cheap form, the token form and a naive reference written from the paper's equations agree."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.layers import Attention, Mlp, SwiGLU
from timm.models import create_model
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.geometry import LayerGeometry
from e2vpt.micro_vit import build_micro_vit
from e2vpt.model import PromptedModel, PromptSpec, with_token_form
from e2vpt.prompts import KeyValuePrompts
from e2vpt.vit import attention, check_supported, prompted_features
from shared_utils.errors import InputError

WIDTH, HEADS = 24, 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost tiny tensors six times the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Family name -> keywords of timm's VisionTransformer, plus three of our own: `img` (input side),
# `attn` (keywords of the Attention put into each block) and `micro`.
FAMILIES: dict[str, dict[str, Any]] = {
    "class_token": {},
    "class_token_fc_norm": {"fc_norm": True},
    "avg_without_class_token": {"class_token": False, "global_pool": "avg"},
    "avg_with_class_token": {"global_pool": "avg"},
    "avg_final_norm_first": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "avg_over_prefix_too": {"global_pool": "avg", "pool_include_prefix": True},
    "max": {"global_pool": "max"},
    "avgmax": {"global_pool": "avgmax"},
    "map_without_class_token": {"class_token": False, "global_pool": "map"},
    "map_with_class_token": {"global_pool": "map"},
    "registers": {"reg_tokens": 4},
    "registers_avg": {"reg_tokens": 4, "global_pool": "avg", "class_token": False},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "no_position": {"pos_embed": "none"},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"init_values": 0.1},
    "pre_norm": {"pre_norm": True},
    "no_final_norm": {"final_norm": False},
    "scale_attn_norm": {"scale_attn_norm": True},
    "scale_mlp_norm": {"scale_mlp_norm": True, "mlp_layer": SwiGLU},
    "no_qkv_bias": {"qkv_bias": False},
    "no_proj_bias": {"proj_bias": False},
    "gated": {"attn": {"gated": True, "qkv_bias": True}},
    "wide_heads": {
        "attn": {"gated": True, "attn_head_dim": 12, "qk_norm": True, "norm_layer": nn.LayerNorm},
    },
    "dynamic_img_size": {"dynamic_img_size": True, "img": 48},
    "micro_vit": {"micro": True},
}  # fmt: skip

SPECS: dict[str, dict[str, Any]] = {
    "visual": {"num_visual_prompts": 3, "num_kv_prompts": 0},
    "visual_shallow": {"num_visual_prompts": 3, "num_kv_prompts": 0, "deep": False},
    "kv": {"num_visual_prompts": 0, "num_kv_prompts": 2},
    "kv_unshared": {"num_visual_prompts": 0, "num_kv_prompts": 2, "share_kv": False},
    "both": {"num_visual_prompts": 3, "num_kv_prompts": 2},
    "both_unshared": {"num_visual_prompts": 3, "num_kv_prompts": 2, "share_kv": False},
    "both_shallow": {"num_visual_prompts": 3, "num_kv_prompts": 2, "deep": False},
    "both_kv_first_layer": {"num_visual_prompts": 3, "num_kv_prompts": 2, "kv_deep": False},
    "both_all_first_layer": {
        "num_visual_prompts": 3, "num_kv_prompts": 2, "kv_deep": False, "deep": False,
        "share_kv": False,
    },
}  # fmt: skip


def build(family: str = "class_token", depth: int = 3, **overrides: Any) -> VisionTransformer:
    """A tiny backbone in float64 and eval mode in which every weight and statistic matters."""
    options = {**FAMILIES[family], **overrides}
    options.pop("img", None)
    attn = options.pop("attn", None)
    torch.manual_seed(0)
    if options.pop("micro", False):
        vit = build_micro_vit(num_classes=5, embed_dim=WIDTH, depth=depth, num_heads=HEADS)
    else:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "num_heads": HEADS}
        vit = VisionTransformer(**sizes, depth=depth, mlp_ratio=2, num_classes=5, **options)
    if attn is not None:
        for block in vit.blocks:
            block.attn = Attention(WIDTH, HEADS, **attn)
    vit = vit.double().eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
        for name, buffer in vit.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return vit


def images_for(family: str = "class_token", batch: int = 2) -> Tensor:
    side = FAMILIES[family].get("img", 32)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, side, side, dtype=torch.float64, generator=generator)


def prompted(vit: nn.Module, **spec: Any) -> PromptedModel:
    """A model in eval mode whose prompts are large enough to matter."""
    model = PromptedModel(vit, PromptSpec(num_classes=5, **spec)).double().eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for module in (model.visual, model.kv):
            for parameter in module.parameters() if module is not None else ():
                parameter.normal_()
    return model


# --- the naive reference -------------------------------------------------------------------------


def naive_attention(
    attn: Any, y: Tensor, key_rows: Tensor | None, value_rows: Tensor | None
) -> Tensor:
    """softmax(Q_h [P_K; K_h]ᵀ / sqrt(d_h)) [P_V; V_h], one sample and head at a time."""
    w_q, w_k, w_v = attn.qkv.weight.chunk(3)
    b_q, b_k, b_v = (0, 0, 0) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    outputs = []
    for tokens in y:
        heads = []
        for h in range(attn.num_heads):
            cols = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
            q = attn.q_norm((tokens @ w_q.T + b_q)[:, cols])
            k = attn.k_norm((tokens @ w_k.T + b_k)[:, cols])
            v = (tokens @ w_v.T + b_v)[:, cols]
            if key_rows is not None:
                k, v = torch.cat([key_rows[h], k]), torch.cat([value_rows[h], v])
            weights = torch.exp(q @ k.T / attn.head_dim**0.5)
            heads.append(weights / weights.sum(dim=1, keepdim=True) @ v)
        mixed = attn.norm(torch.cat(heads, dim=1))
        if attn.gate is not None:
            mixed = mixed / (1 + torch.exp(-attn.gate(tokens)))
        outputs.append(attn.proj(mixed))
    return torch.stack(outputs)


def naive_features(
    vit: Any, images: Tensor, model: PromptedModel, pool_prompts: bool = False
) -> Tensor:
    """Z^i = L_i(P^i, Z^{i-1}): prompts are tokens behind the prefix, run through every block."""
    spec = model.spec
    count = spec.num_visual_prompts
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    prefix = vit.num_prefix_tokens
    for i, block in enumerate(vit.blocks):
        if count and (i == 0 or spec.deep):
            tokens = torch.stack([model.visual.weight[i]] * len(x))
            patches = x[:, prefix:] if i == 0 else x[:, prefix + count :]
            x = torch.cat([x[:, :prefix], tokens, patches], dim=1)
        key_rows = value_rows = None
        if spec.num_kv_prompts and (i == 0 or spec.kv_deep):
            key_rows = model.kv.key[i]
            value_rows = key_rows if spec.share_kv else model.kv.value[i]
        x = x + block.ls1(naive_attention(block.attn, block.norm1(x), key_rows, value_rows))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = vit.norm(x)
    patches = x[:, prefix:] if pool_prompts else x[:, prefix + count :]
    if vit.global_pool == "token":
        return vit.fc_norm(x[:, 0])
    if vit.pool_include_prefix:
        patches = torch.cat([x[:, :prefix], patches], dim=1)
    if vit.global_pool == "map":
        return vit.fc_norm(vit.attn_pool(patches))
    mean, largest = patches.sum(dim=1) / patches.shape[1], patches.max(dim=1).values
    pooled = {"avg": mean, "max": largest, "avgmax": (mean + largest) / 2}[vit.global_pool]
    return vit.fc_norm(pooled)


def largest_gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# --- both forms against the reference ------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_both_forms_equal_the_naive_reference(family: str, spec: str) -> None:
    vit, x = build(family), images_for(family)
    plain = vit.forward_head(vit.forward_features(x), pre_logits=True)
    model = prompted(vit, **SPECS[spec])
    expected = naive_features(vit, x, model)
    assert largest_gap(model.features(x), expected) < 1e-12
    assert largest_gap(with_token_form(model, True).features(x), expected) < 1e-12
    assert largest_gap(plain, expected) > 1e-3  # the prompts do something


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("family", ["class_token", "avg_with_class_token"])
@torch.no_grad()
def test_shallow_backbones_equal_the_naive_reference(family: str, deep: bool, depth: int) -> None:
    vit, x = build(family, depth=depth), images_for(family)
    model = prompted(vit, num_visual_prompts=2, num_kv_prompts=2, deep=deep)
    expected = naive_features(vit, x, model)
    assert largest_gap(model.features(x), expected) < 1e-12
    assert largest_gap(with_token_form(model, True).features(x), expected) < 1e-12


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(
    "family", ["avg_without_class_token", "registers_avg", "map_with_class_token", "max"]
)
@torch.no_grad()
def test_pool_prompts_pools_the_last_layers_prompts_too(family: str, deep: bool) -> None:
    vit, x = build(family), images_for(family)
    model = prompted(vit, num_visual_prompts=3, num_kv_prompts=2, deep=deep, pool_prompts=True)
    expected = naive_features(vit, x, model, pool_prompts=True)
    assert largest_gap(model.features(x), expected) < 1e-12
    assert largest_gap(with_token_form(model, True).features(x), expected) < 1e-12
    assert largest_gap(expected, naive_features(vit, x, model)) > 1e-4


@torch.no_grad()
def test_pool_prompts_mean_counts_patches_and_prompts_alike() -> None:
    vit, x = build("avg_final_norm_first"), images_for()
    model = prompted(vit, num_visual_prompts=3, num_kv_prompts=0, pool_prompts=True)
    tokens = prompted_features(vit, x, model.visual, None, pool_prompts=True)
    assert tokens.shape == (2, 3 + 16, WIDTH)
    assert largest_gap(model.features(x), tokens.mean(dim=1)) < 1e-14
    # Patches keep their places behind the prompts.
    patches = prompted_features(vit, x, model.visual, None)
    assert largest_gap(tokens[:, 3:], patches) < 1e-12


@pytest.mark.parametrize(
    "family", ["class_token", "avg_with_class_token", "qk_norm", "map_without_class_token"]
)
def test_gradients_of_both_forms_equal_the_naive_reference(family: str) -> None:
    vit, x = build(family), images_for(family)
    model = prompted(vit, num_visual_prompts=3, num_kv_prompts=2, share_kv=False)
    parameters = [*model.visual.weight, *model.kv.key, *model.kv.value]
    probe = torch.randn(2, WIDTH, dtype=torch.float64)
    expected = torch.autograd.grad((naive_features(vit, x, model) * probe).sum(), parameters)
    for token_form in (False, True):
        features = with_token_form(model, token_form).features(x)
        got = torch.autograd.grad((features * probe).sum(), parameters)
        for mine, naive in zip(got, expected, strict=True):
            assert largest_gap(mine, naive) < 1e-11
            assert mine.abs().max() > 1e-6


@pytest.mark.parametrize("token_form", [False, True])
@torch.no_grad()
def test_features_do_not_depend_on_the_rest_of_the_batch(token_form: bool) -> None:
    vit, x = build("registers"), images_for(batch=3)
    for spec in SPECS.values():
        model = with_token_form(prompted(vit, **spec), token_form)
        together = model.features(x)
        for i in range(3):
            assert largest_gap(model.features(x[i : i + 1]), together[i : i + 1]) < 1e-12


# --- no prompts: the backbone itself -------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_prompts_features_are_the_backbones_own(family: str) -> None:
    vit, x = (
        build(family).requires_grad_(False),
        images_for(family),
    )  # torch: frozen changes last bits
    expected = vit.forward_head(vit.forward_features(x), pre_logits=True)
    for token_form in (False, True):
        model = prompted(vit, num_visual_prompts=0, num_kv_prompts=0, token_form=token_form)
        assert torch.equal(model.features(x), expected)
    forced = vit.forward_head(prompted_features(vit, x, None, None), pre_logits=True)
    assert largest_gap(forced, expected) < 1e-12
    vit, x = vit.float(), x.float()
    expected = vit.forward_head(vit.forward_features(x), pre_logits=True)
    forced = vit.forward_head(prompted_features(vit, x, None, None), pre_logits=True)
    torch.testing.assert_close(forced, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_prompts_the_backbones_own_forward_is_called() -> None:
    for count, expected in ((0, 1), (1, 0)):
        vit, calls = build(), []
        vit.blocks.register_forward_hook(lambda *_, log=calls: log.append(1))
        prompted(vit, num_visual_prompts=0, num_kv_prompts=count).features(images_for())
        assert len(calls) == expected


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


# --- folding, permutation, zero rows -------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["class_token", "avg_without_class_token", "registers", "qk_norm", "wide_heads", "no_qkv_bias"],
)
@torch.no_grad()
def test_deep_visual_prompts_fold_into_unshared_kv_rows(family: str) -> None:
    """K_p = W_k LN1(p) + b_k and V_p = W_v LN1(p) + b_v say all that a deep prompt says."""
    vit, x = build(family), images_for(family)
    model = prompted(vit, num_visual_prompts=3, num_kv_prompts=2)
    folded = KeyValuePrompts(model.geometry, [5] * 3, share=False).double()
    for i, block in enumerate(vit.blocks):
        attn = block.attn
        _, w_k, w_v = attn.qkv.weight.chunk(3)
        _, b_k, b_v = (0, 0, 0) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        rows = block.norm1(model.visual.weight[i])
        for h in range(attn.num_heads):
            cols = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
            folded.key[i][h] = torch.cat(
                [attn.k_norm((rows @ w_k.T + b_k)[:, cols]), model.kv.key[i][h]]
            )
            folded.value[i][h] = torch.cat([(rows @ w_v.T + b_v)[:, cols], model.kv.key[i][h]])
    tokens = prompted_features(vit, x, None, folded)
    assert largest_gap(vit.forward_head(tokens, pre_logits=True), model.features(x)) < 1e-12


@pytest.mark.parametrize("spec", ["both", "both_unshared", "both_shallow"])
@pytest.mark.parametrize("token_form", [False, True])
@torch.no_grad()
def test_order_of_prompts_does_not_matter(token_form: bool, spec: str) -> None:
    vit, x = build("avg_with_class_token"), images_for()
    model = with_token_form(prompted(vit, **SPECS[spec]), token_form)
    before = model.features(x)
    for rows in model.visual.weight:
        rows.copy_(rows.flip(0))
    for rows in [*model.kv.key, *(model.kv.value or [])]:
        rows.copy_(rows.flip(1))
    assert largest_gap(model.features(x), before) < 1e-12
    # Other prompts, in contrast, do matter; so do keys and values that no longer belong together.
    first, last = model.kv.key[0].clone(), model.kv.key[-1].clone()
    model.kv.key[0].copy_(last)
    model.kv.key[-1].copy_(first)
    assert largest_gap(model.features(x), before) > 1e-4


@pytest.mark.parametrize("num_out", [1, 17])
@pytest.mark.parametrize("count", [1, 4])
@torch.no_grad()
def test_zero_kv_rows_take_softmax_mass(count: int, num_out: int) -> None:
    """Zero keys have logit 0, so with zero values the output shrinks by Z / (Z + n) exactly."""
    attn = build("class_token").blocks[0].attn
    attn.proj = nn.Identity()
    y = torch.randn(2, 17, WIDTH, dtype=torch.float64)
    zeros = torch.zeros(HEADS, count, WIDTH // HEADS, dtype=torch.float64)
    without = attention(attn, y, None, None, num_out)
    with_zeros = attention(attn, y, None, (zeros, zeros, None), num_out)
    q, k, _ = attn.qkv(y).reshape(2, 17, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    z = (q @ k.mT * (WIDTH // HEADS) ** -0.5).exp().sum(-1)[:, :, :num_out]  # (B, H, num_out)
    scale = (z / (z + count)).transpose(1, 2).repeat_interleave(WIDTH // HEADS, dim=2)
    assert largest_gap(with_zeros, without * scale) < 1e-14
    assert scale.min() < 0.99


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
