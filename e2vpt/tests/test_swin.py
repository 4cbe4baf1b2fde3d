"""Prompts in Swin's windows: both forms against a reference that goes window by window."""

import math
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from e2vpt.model import PromptedModel, PromptSpec, with_token_form
from e2vpt.swin import folded_rows, prompted_features

SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
    "num_heads": (2, 4), "mlp_ratio": 2, "num_classes": 5,
}  # fmt: skip

# Keywords of timm's class, and of our own: `v2`, `img` (input size), `separate` (V2's other way to
# add its biases). Maps of 16 and 8 patches have shifted windows of 4 in every second block.
BACKBONES: dict[str, dict[str, Any]] = {
    "v1": {},
    "v1_no_shift": {"img_size": 16, "window_size": 8},
    "v1_padded": {"img_size": (20, 28)},
    "v1_padded_odd": {"img_size": (18, 26)},
    "v1_dynamic": {"dynamic_img_size": True, "img": (20, 36)},
    "v1_always_partition": {"img_size": 16, "window_size": 6, "always_partition": True},
    "v1_windows_by_stage": {"window_size": ((4, 2), (3, 5))},
    "v1_wide_heads": {"head_dim": 12},
    "v1_no_qkv_bias": {"qkv_bias": False},
    "v1_catavgmax": {"global_pool": "catavgmax"},
    "v2": {"v2": True},
    "v2_padded_odd": {"v2": True, "img_size": (18, 26)},
    "v2_dynamic": {"v2": True, "dynamic_img_size": True, "img": (20, 36)},
    "v2_no_qkv_bias": {"v2": True, "qkv_bias": False},
    "v2_separate_bias": {"v2": True, "separate": True},
    "v2_max": {"v2": True, "global_pool": "max"},
}

SPECS: dict[str, dict[str, Any]] = {
    "visual": {"num_visual_prompts": 3, "num_kv_prompts": 0},
    "kv": {"num_visual_prompts": 0, "num_kv_prompts": 2},
    "both_unshared": {"num_visual_prompts": 3, "num_kv_prompts": 2, "share_kv": False},
    "shallow": {"num_visual_prompts": 3, "num_kv_prompts": 2, "deep": False},
    "kv_first_layer": {"num_visual_prompts": 3, "num_kv_prompts": 2, "kv_deep": False},
    "shallow_pooled": {"num_visual_prompts": 3, "deep": False, "pool_prompts": True},
    "deep_pooled": {"num_visual_prompts": 3, "num_kv_prompts": 2, "pool_prompts": True},
}


def build(name: str = "v1", **overrides: Any) -> Any:
    """A tiny backbone in float64 and eval mode in which every weight matters."""
    options = {**SIZES, **BACKBONES[name], **overrides}
    options.pop("img", None)
    separate = options.pop("separate", False)
    torch.manual_seed(0)
    swin: Any = (SwinTransformerV2 if options.pop("v2", False) else SwinTransformer)(**options)
    swin = swin.double().eval()
    with torch.no_grad():
        for key, parameter in swin.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in key and key.endswith("weight"):
                parameter.add_(1)
            if key.endswith("logit_scale"):
                parameter[0] = 5.0  # over the bound, ln 100
    for block in blocks_of(swin):
        block.attn.qkv_bias_separate = separate
    return swin


def blocks_of(swin: Any) -> list[Any]:
    return [block for stage in swin.layers for block in stage.blocks]


def images_for(name: str = "v1", batch: int = 2) -> Tensor:
    options = {**SIZES, **BACKBONES[name]}
    size = options.get("img", options["img_size"])
    height, width = size if isinstance(size, tuple) else (size, size)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=generator)


def prompted(swin: nn.Module, **spec: Any) -> PromptedModel:
    """A model in eval mode whose prompts are large enough to matter."""
    model = PromptedModel(swin, PromptSpec(num_classes=5, **spec)).double().eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for module in (model.visual, model.kv):
            for parameter in module.parameters() if module is not None else ():
                parameter.normal_()
    return model


def largest_gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# --- the naive reference -------------------------------------------------------------------------


def is_v2(block: Any) -> bool:
    return hasattr(block.attn, "logit_scale")


def windows_of(block: Any, h: int, w: int) -> list[list[tuple[int | None, tuple[int, int]]]]:
    """Per window, its patches: the index in the map (None: padding), and the part it belongs to."""
    (wh, ww), (sh, sw) = block.window_size, block.shift_size
    height, width = math.ceil(h / wh) * wh, math.ceil(w / ww) * ww

    def part(at: int, end: int, size: int, shift: int) -> int:
        return 2 if at >= end - shift or not shift else int(at >= end - size)

    return [
        [
            (
                (a + sh) % h * w + (b + sw) % w if a < h and b < w else None,
                (part(a, height, wh, sh), part(b, width, ww, sw)),
            )
            for a in range(top, top + wh)
            for b in range(left, left + ww)
        ]
        for top in range(0, height, wh)
        for left in range(0, width, ww)
    ]


def naive_bias(attn: Any) -> Tensor:
    """(H, A, A) of every pair of patches, one pair at a time."""
    wh, ww = attn.window_size
    places = [(i, j) for i in range(wh) for j in range(ww)]
    rows = []
    for qi, qj in places:
        for ki, kj in places:
            di, dj = qi - ki, qj - kj
            if hasattr(attn, "relative_position_bias_table"):
                at = (di + wh - 1) * (2 * ww - 1) + dj + ww - 1
                rows.append(attn.relative_position_bias_table[at])
            else:
                far = [8 * di / max(wh - 1, 1), 8 * dj / max(ww - 1, 1)]
                near = [math.copysign(math.log2(abs(v) + 1) / math.log2(8), v) for v in far]
                rows.append(16 / (1 + torch.exp(-attn.cpb_mlp(torch.tensor(near).double()))))
    return torch.stack(rows).view(len(places), len(places), -1).permute(2, 0, 1)


def neutral(attn: Any) -> float:
    """What stands for a relative position that is none: V2 has 16 sigmoid(x), at x = 0."""
    return 8.0 if hasattr(attn, "logit_scale") else 0.0


def naive_attention(
    attn: Any, tokens: Tensor, extra: Tensor, kv: tuple[Tensor, Tensor] | None
) -> Tensor:
    """One window: tokens (T, D), what is added to the logits (H, T, T), rows in front."""
    w_q, w_k, w_v = attn.qkv.weight.chunk(3)
    b_q = b_k = b_v = torch.zeros(len(w_q)).double()
    if hasattr(attn, "q_bias"):
        b_q, b_v = (b_q, b_v) if attn.q_bias is None else (attn.q_bias, attn.v_bias)
    elif attn.qkv.bias is not None:
        b_q, b_k, b_v = attn.qkv.bias.chunk(3)
    size = len(w_q) // attn.num_heads
    heads = []
    for h in range(attn.num_heads):
        cols = slice(h * size, (h + 1) * size)
        q, k = (tokens @ w_q.T + b_q)[:, cols], (tokens @ w_k.T + b_k)[:, cols]
        v = (tokens @ w_v.T + b_v)[:, cols]
        added = extra[h]
        if kv is not None:
            k, v = torch.cat([kv[0][h], k]), torch.cat([kv[1][h], v])
            beside = torch.full((len(tokens), kv[0].shape[1]), neutral(attn)).double()
            added = torch.cat([beside, added], dim=1)
        if hasattr(attn, "logit_scale"):
            # The key of a padding patch is 0 and stays 0.
            q, k = (m / m.norm(dim=1, keepdim=True).clamp_min(1e-12) for m in (q, k))
            factor = min(math.exp(attn.logit_scale[h].item()), 100.0)
        else:
            factor = size**-0.5
        logits = factor * q @ k.T + added
        weights = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
        heads.append(weights / weights.sum(dim=1, keepdim=True) @ v)
    return attn.proj(torch.cat(heads, dim=1))


def naive_block(
    block: Any, x: Tensor, prompts: Tensor, h: int, w: int, kv: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """One block on one image: patches (N, D) and prompts (P, D), which stand in front here."""
    count = len(prompts)
    before = torch.cat([prompts, x])
    y = before if is_v2(block) else block.norm1(before)
    bias = naive_bias(block.attn)
    mixed, prompt_rows = torch.zeros_like(y), []
    for window in windows_of(block, h, w):
        nothing = torch.zeros_like(y[0])
        patches = [nothing if at is None else y[count + at] for at, _ in window]
        tokens = torch.cat([y[:count], torch.stack(patches)])
        parts = [part for _, part in window]
        mask = torch.tensor([[0.0 if a == b else -100.0 for b in parts] for a in parts]).double()
        extra = torch.full((len(bias), len(tokens), len(tokens)), neutral(block.attn)).double()
        extra[:, count:, count:] = bias + mask
        out = naive_attention(block.attn, tokens, extra, kv)
        prompt_rows.append(out[:count])
        for row, (at, _) in zip(out[count:], window, strict=True):
            if at is not None:
                mixed[count + at] = row
    mixed[:count] = torch.stack(prompt_rows).sum(dim=0) / len(prompt_rows)
    if is_v2(block):
        z = before + block.norm1(mixed)
        z = z + block.norm2(block.mlp(z))
    else:
        z = before + mixed
        z = z + block.mlp(block.norm2(z))
    return z[count:], z[:count]


def naive_merge(merging: Any, fours: Tensor) -> Tensor:
    if merging.norm.normalized_shape == (fours.shape[1],):
        return merging.reduction(merging.norm(fours))
    return merging.norm(merging.reduction(fours))


def naive_features(swin: Any, images: Tensor, model: PromptedModel) -> Tensor:
    spec, pooled = model.spec, []
    for image in images:
        grid = swin.patch_embed(image[None])[0]  # (h, w, D)
        h, w, _ = grid.shape
        x, prompts, layer = grid.reshape(h * w, -1), grid.new_zeros(0, grid.shape[2]), 0
        for stage in swin.layers:
            if not isinstance(stage.downsample, nn.Identity):
                nothing = torch.zeros_like(x[0])
                fours = []
                for i in range(0, h, 2):
                    for j in range(0, w, 2):
                        at = [(i, j), (i + 1, j), (i, j + 1), (i + 1, j + 1)]
                        four = [x[a * w + b] if a < h and b < w else nothing for a, b in at]
                        fours.append(torch.cat(four))
                x, h, w = naive_merge(stage.downsample, torch.stack(fours)), -(-h // 2), -(-w // 2)
                prompts = naive_merge(stage.downsample, torch.cat([prompts] * 4, dim=1))
            for block in stage.blocks:
                if spec.num_visual_prompts and (layer == 0 or spec.deep):
                    prompts = model.visual.weight[layer]
                kv = None
                if spec.num_kv_prompts and (layer == 0 or spec.kv_deep):
                    key = model.kv.key[layer]
                    kv = (key, key if spec.share_kv else model.kv.value[layer])
                x, prompts = naive_block(block, x, prompts, h, w, kv)
                layer += 1
        tokens = swin.norm(torch.cat([x, prompts]) if spec.pool_prompts else x)
        mean, largest = tokens.sum(dim=0) / len(tokens), tokens.max(dim=0).values
        how = {"avg": [mean], "max": [largest], "catavgmax": [mean, largest]}
        pooled.append(torch.cat(how[swin.global_pool]))
    return torch.stack(pooled)


# --- both forms against the reference ------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["v1", "v1_padded_odd", "v2"])
@torch.no_grad()
def test_both_forms_equal_the_naive_reference(name: str, spec: str) -> None:
    swin, x = build(name), images_for(name)
    model = prompted(swin, **SPECS[spec])
    expected = naive_features(swin, x, model)
    plain = swin.forward_head(swin.forward_features(x), pre_logits=True)
    assert largest_gap(expected, plain) > 0.01
    assert largest_gap(model.features(x), expected) < 1e-12
    assert largest_gap(with_token_form(model, True).features(x), expected) < 1e-12


@pytest.mark.parametrize("spec", ["both_unshared", "shallow"])
@pytest.mark.parametrize("name", [n for n in BACKBONES if n not in ("v1", "v1_padded_odd", "v2")])
@torch.no_grad()
def test_kinds_of_backbones(name: str, spec: str) -> None:
    swin, x = build(name), images_for(name, batch=1)
    model = prompted(swin, **SPECS[spec])
    expected = naive_features(swin, x, model)
    assert largest_gap(model.features(x), expected) < 1e-12
    assert largest_gap(with_token_form(model, True).features(x), expected) < 1e-12


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_without_prompts_it_is_timms_own_forward(name: str) -> None:
    swin, x = build(name), images_for(name)
    assert largest_gap(prompted_features(swin, x, None, None), swin.forward_features(x)) < 1e-12


def test_the_tiny_backbones_have_the_windows_they_are_for() -> None:
    shifts = [block.shift_size for block in blocks_of(build())]
    assert shifts == [(0, 0), (2, 2), (0, 0), (2, 2)]
    assert all(block.shift_size == (0, 0) for block in blocks_of(build("v1_no_shift")))
    sizes = [block.input_resolution for block in blocks_of(build("v1_padded_odd"))]
    assert sizes == [(9, 13), (9, 13), (5, 7), (5, 7)]


@pytest.mark.parametrize("name", ["v1", "v1_padded_odd", "v2", "v2_padded_odd", "v2_separate_bias"])
@torch.no_grad()
def test_folded_prompts_are_unshared_key_value_prompts(name: str) -> None:
    swin, x = build(name), images_for(name)
    model = prompted(swin, num_visual_prompts=3, num_kv_prompts=2)
    fast = prompted(swin, num_visual_prompts=0, num_kv_prompts=5, share_kv=False)
    for i in range(len(blocks_of(swin))):
        keys, values = folded_rows(swin, i, model.visual.rows(i))
        fast.kv.key[i].copy_(torch.cat([keys, model.kv.key[i]], dim=1))
        fast.kv.value[i].copy_(torch.cat([values, model.kv.key[i]], dim=1))
        if name.startswith("v2"):
            assert largest_gap(keys.norm(dim=-1), torch.ones(keys.shape[:2]).double()) < 1e-12
    assert largest_gap(fast.features(x), model.features(x)) < 1e-12


@pytest.mark.parametrize("name", ["v1", "v2"])
@pytest.mark.parametrize("deep", [True, False])
@torch.no_grad()
def test_the_order_of_prompts_does_not_matter(name: str, deep: bool) -> None:
    model, x = prompted(build(name), num_visual_prompts=4, deep=deep), images_for(name)
    expected = model.features(x)
    for parameter in (*model.visual.parameters(), *model.kv.parameters()):
        parameter.copy_(parameter.flip(-2))
    assert largest_gap(model.features(x), expected) < 1e-12


@pytest.mark.parametrize("name", ["v1", "v2"])
@torch.no_grad()
def test_keys_of_key_value_prompts_have_unit_length_in_v2_only(name: str) -> None:
    model, x = prompted(build(name), num_visual_prompts=0, share_kv=False), images_for(name)
    expected = model.features(x)
    for parameter in model.kv.key:
        parameter.mul_(3)
    assert (largest_gap(model.features(x), expected) < 1e-12) is (name == "v2")
