"""The cheap form, the token form and a naive reference written from the paper's equations agree."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2vpt.model import PromptedModel, with_token_form
from e2vpt.prompts import KeyValuePrompts
from e2vpt.vit import attention, prompted_features

from .vit_families import FAMILIES, HEADS, SPECS, WIDTH, build, images_for, largest_gap, prompted

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
