"""Attention to prompts: by hand, by a loop, over families and forms; nothing is changed by it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import e2vpt
from e2vpt.attention_maps import _layouts, _Watch
from e2vpt.model import PromptedModel, PromptSpec, with_token_form
from e2vpt.vit import run_block
from shared_utils.checkpoint import rng_state
from shared_utils.errors import InputError

PROMPTS, ROWS, IMAGES, TOKENS = 3, 2, 5, 5  # of the ViT: class token and four patches
Batch = tuple[Tensor, Tensor]

VIT: dict[str, Any] = {
    "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2,
    "num_classes": 0,
}  # fmt: skip
EVA: dict[str, Any] = {**VIT, "use_rot_pos_emb": True, "global_pool": "token"}
SWIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
    "num_heads": (2, 4), "mlp_ratio": 2, "num_classes": 0,
}  # fmt: skip
BACKBONES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "vit": (VisionTransformer, VIT),
    "vit_average": (VisionTransformer, {**VIT, "global_pool": "avg", "class_token": False}),
    "vit_registers": (VisionTransformer, {**VIT, "reg_tokens": 2, "global_pool": "avg"}),
    "eva": (Eva, EVA),
    "eva_grouped": (
        Eva,
        {**EVA, "attn_type": "rope", "qkv_fused": False, "num_heads": 4, "num_kv_heads": 2},
    ),
    "swin": (SwinTransformer, SWIN),
    "swin_filled": (SwinTransformer, {**SWIN, "img_size": (18, 26)}),
    "swin_dynamic": (SwinTransformer, {**SWIN, "dynamic_img_size": True}),
    "swin_v2": (SwinTransformerV2, {**SWIN, "img_size": (18, 26)}),
}
SPECS: dict[str, dict[str, Any]] = {
    "both": {},
    "visual": {"num_kv_prompts": 0},
    "kv": {"num_visual_prompts": 0},
    "kv_first_layer": {"kv_deep": False},
    "shallow": {"deep": False},
    "token_form": {"token_form": True},
    "projected": {"prompt_dim": 4},
}


def build(name: str = "vit", fused: bool = True, **spec: Any) -> PromptedModel:
    """A tiny model in float64 and eval mode in which every weight matters."""
    cls, options = BACKBONES[name]
    torch.manual_seed(0)
    backbone: Any = cls(**options)
    counts = {"num_visual_prompts": PROMPTS, "num_kv_prompts": ROWS}
    model = PromptedModel(backbone, PromptSpec(num_classes=5, **{**counts, **spec}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in key and key.endswith("weight"):
                parameter.add_(1)
            if key.startswith(("visual", "kv")):
                parameter.normal_()
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model.double().eval()


def batches(name: str = "vit", size: int = 2, images: int = IMAGES) -> list[Batch]:
    """The same images, so many at a time."""
    side = BACKBONES[name][1]["img_size"]
    height, width = side if isinstance(side, tuple) else (side, side)
    if name == "swin_dynamic":
        height, width = 20, 36
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, height, width, generator=generator, dtype=torch.float64)
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in pixels.split(size)]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-12)


def by_a_loop(model: PromptedModel) -> dict[str, list[float]]:
    """Means over images, heads and queries of a plain ViT, one exponential at a time.

    Prompts are tokens here where `token_form` or shallow prompts make them so, and then no queries.
    """
    spec, blocks = model.spec, model.backbone.blocks
    last = len(blocks) - 1
    found: dict[str, list[float]] = {"visual": [], "kv": [], "tokens": []}
    images = torch.cat([part for part, _ in batches()])
    x = model.backbone._pos_embed(model.backbone.patch_embed(images))
    for i, block in enumerate(blocks):
        attn = block.attn
        kinds = ["tokens"] * x.shape[1]
        rows = None
        if model.visual is not None and (spec.deep or i == 0):
            rows = model.visual.rows(i)[None].expand(len(images), -1, -1)
        if not spec.deep:
            if rows is not None:
                x, rows = torch.cat([x[:, :1], rows, x[:, 1:]], dim=1), None
            kinds = ["tokens"] + ["visual"] * PROMPTS + ["tokens"] * (TOKENS - 1)
        own = block.norm1(x if rows is None else torch.cat([x, rows], dim=1))
        kinds += ["visual"] * (0 if rows is None else PROMPTS)
        q, k, _ = attn.qkv(own).view(len(images), -1, 3, attn.num_heads, attn.head_dim).unbind(2)
        kv = model.kv(i)[0] if model.kv is not None and i < model.kv.num_layers else None
        kinds_of_all = kinds + ["kv"] * (0 if kv is None else ROWS)
        queries = [j for j, kind in enumerate(kinds) if kind == "tokens"]
        if i == last and not spec.token_form:
            queries = [0]
        totals = dict.fromkeys(found, 0.0)
        for b in range(len(images)):
            for h in range(attn.num_heads):
                keys = k[b, :, h] if kv is None else torch.cat([k[b, :, h], kv[h]])
                for j in queries:
                    weights = [math.exp(v) for v in (keys @ q[b, j, h] / attn.head_dim**0.5)]
                    for kind, weight in zip(kinds_of_all, weights, strict=True):
                        totals[kind] += weight / sum(weights)
        count = len(images) * attn.num_heads * len(queries)
        for kind, total in totals.items():
            found[kind].append(total / count)
        pair = None if model.kv is None or kv is None else (*model.kv(i), None)
        x = run_block(block, x, None if rows is None else rows[:1], pair, x.shape[1])
    return found


@pytest.mark.parametrize("spec", list(SPECS))
@torch.no_grad()
def test_shares_of_a_vit_equal_a_loop(spec: str) -> None:
    model = build(**SPECS[spec])
    got = e2vpt.attention_to_prompts(model, batches())
    for kind, expected in by_a_loop(model).items():
        assert got[kind].dtype == torch.float64
        assert got[kind].tolist() == pytest.approx(expected, abs=1e-12)
    assert got["tokens"].min() > 0.05  # nothing that is compared is trivially one


@torch.no_grad()
def test_shares_worked_by_hand() -> None:
    """Every query is 1, every key of a token or visual prompt ln 2, every key-value row ln 5."""
    model = build()
    scale = model.backbone.blocks[0].attn.scale
    for layer, block in enumerate(model.backbone.blocks):
        block.attn.qkv.weight.zero_()
        block.attn.qkv.bias.zero_()
        bias = block.attn.qkv.bias.view(3, 2, 8)
        bias[0, :, 0] = 1 / scale
        bias[1, :, 0] = math.log(2)
        model.kv.key[layer].zero_()[..., 0] = math.log(5)
    got = e2vpt.attention_to_prompts(model, batches())
    whole = 2 * (TOKENS + PROMPTS) + 5 * ROWS
    for name, value in (
        ("visual", 2 * PROMPTS / whole),
        ("kv", 5 * ROWS / whole),
        ("tokens", 2 * TOKENS / whole),
        ("uniform_visual", PROMPTS / (TOKENS + PROMPTS + ROWS)),
        ("uniform_kv", ROWS / (TOKENS + PROMPTS + ROWS)),
    ):
        assert got[name].tolist() == pytest.approx([value] * 3, abs=1e-12)


@pytest.mark.parametrize("spec", [*SPECS, "pooled"])
@pytest.mark.parametrize("name", list(BACKBONES))
def test_shares_sum_to_one(name: str, spec: str) -> None:
    options = SPECS.get(spec, {"pool_prompts": True})
    if spec == "pooled" and BACKBONES[name][1].get("global_pool", "token") == "token":
        options = {"deep": False} if not name.startswith("swin") else options
    if spec == "projected" and name.startswith("swin"):
        options = {"deep": False, "prompt_dim": 4}
    model = build(name, **options)
    got = e2vpt.attention_to_prompts(model, batches(name))
    for shares in got.values():
        assert shares.shape == (model.geometry.num_layers,)
        assert ((shares >= 0) & (shares <= 1)).all()
    torch.testing.assert_close(
        got["visual"] + got["kv"] + got["tokens"], torch.ones_like(got["kv"]), rtol=0, atol=1e-12
    )
    for kind in ("visual", "kv"):
        assert torch.equal(got[kind] > 0, got[f"uniform_{kind}"] > 0)
    plain = build(name, fused=False, **options)  # its softmax is not computed again but seen
    assert_close(e2vpt.attention_to_prompts(plain, batches(name)), got)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_both_forms_have_one_answer(name: str) -> None:
    model = build(name)
    got = e2vpt.attention_to_prompts(model, batches(name))
    if model.backbone.global_pool == "token":  # the token form has all the last layer's queries
        got = {key: shares[:-1] for key, shares in got.items()}
    other = e2vpt.attention_to_prompts(with_token_form(model, True), batches(name))
    assert_close({key: shares[: len(got[key])] for key, shares in other.items()}, got)


# ---- the even share -------------------------------------------------------------------------


def without_logits(name: str, **spec: Any) -> PromptedModel:
    """Queries of zero and no bias by position."""
    model = build(name, **spec)
    with torch.no_grad():
        for key, parameter in model.backbone.named_parameters():
            if any(part in key for part in ("qkv", "q_proj", "q_bias", "relative_position")):
                parameter.zero_()
    return model


@pytest.mark.parametrize("spec", ["both", "shallow", "kv_first_layer", "token_form"])
@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "swin_v2"])
def test_without_logits_the_share_is_the_even_one(name: str, spec: str) -> None:
    model = without_logits(name, **SPECS[spec])
    got = e2vpt.attention_to_prompts(model, batches(name))
    for kind in ("visual", "kv"):
        torch.testing.assert_close(got[kind], got[f"uniform_{kind}"], rtol=0, atol=1e-12)


def visible_patches(height: int, width: int, side: int, shift: int) -> list[int]:
    """How many patches each patch of a map sees in its shifted window, what fills it up included.

    A window holds its square of the map rolled by the shift; two patches of it see each other
    where no edge of the rolled map lies between them.
    """

    def part(at: int, size: int) -> int:
        end = -(-size // side) * side
        return 2 if shift and at >= end - shift else int(at >= end - side)

    places = [
        ((a // side, b // side), (part(a, height), part(b, width)), a < height and b < width)
        for a in range(-(-height // side) * side)
        for b in range(-(-width // side) * side)
    ]
    return [
        sum(other[:2] == (window, own) for other in places)
        for window, own, is_patch in places
        if is_patch
    ]


@pytest.mark.parametrize("name", ["swin", "swin_filled", "swin_dynamic", "swin_v2"])
def test_the_even_share_in_windows(name: str) -> None:
    """Averaged over patches, not over what fills windows up; hidden keys do not count."""
    height, width = (side // 2 for side in batches(name)[0][0].shape[-2:])
    got = e2vpt.attention_to_prompts(build(name), batches(name))
    for layer, even in enumerate(got["uniform_visual"]):
        if layer == 2:
            height, width = -(-height // 2), -(-width // 2)
        counts = visible_patches(height, width, 4, 2 * (layer % 2))
        assert len(counts) == height * width
        expected = sum(PROMPTS / (count + PROMPTS + ROWS) for count in counts) / len(counts)
        assert even.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(got["uniform_kv"] * PROMPTS, got["uniform_visual"] * ROWS)


@torch.no_grad()
def test_cosine_attention_without_logits() -> None:
    """V2's bias by position is then 8 between patches, and always 8 for prompts."""
    model = without_logits("swin_v2", deep=True)
    for block in (block for stage in model.backbone.layers for block in stage.blocks):
        for parameter in block.attn.cpb_mlp.parameters():
            parameter.zero_()
    got = e2vpt.attention_to_prompts(model, batches("swin_v2"))
    height, width = 9, 13
    counts = visible_patches(height, width, 4, 0)
    expected = sum(PROMPTS / (count + PROMPTS + ROWS) for count in counts) / len(counts)
    assert got["visual"][0].item() == pytest.approx(expected, rel=1e-10)


# ---- models of all kinds --------------------------------------------------------------------


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("per_layer", [False, True])
def test_pruned_prompts(per_layer: bool, compat: bool) -> None:
    model = build()
    scores = e2vpt.importance(model, batches(), 4, per_layer=per_layer)
    small = e2vpt.prune(model, scores, 1, 2, compat=compat)
    got = e2vpt.attention_to_prompts(small, batches())
    left = PROMPTS if compat else PROMPTS - 1  # what is zeroed still attends
    expected = left / (TOKENS + left + ROWS)
    assert got["uniform_visual"].tolist() == pytest.approx([expected] * 3, abs=1e-12)
    torch.testing.assert_close(got["visual"] + got["kv"] + got["tokens"], torch.ones(3).double())
    whole = PromptedModel(small.backbone, replace(model.spec, num_visual_prompts=left)).eval()
    whole.kv = small.kv
    with torch.no_grad():
        for layer, weight in enumerate(whole.visual.weight):
            weight.copy_(small.visual.rows(layer))
    assert_close(e2vpt.attention_to_prompts(whole, batches()), got)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_folded_prompts_still_count_as_visual(name: str) -> None:
    model = build(name, kv_deep=False)
    got = e2vpt.attention_to_prompts(model, batches(name))
    assert_close(e2vpt.attention_to_prompts(e2vpt.fold(model), batches(name)), got)


@pytest.mark.parametrize("name", ["vit", "eva", "swin", "swin_v2"])
@pytest.mark.parametrize("fused", [True, False])
def test_low_precision_with_padded_rows(name: str, fused: bool) -> None:
    model = build(name, fused).float()
    loader = [(images.float(), labels) for images, labels in batches(name)]
    exact = e2vpt.attention_to_prompts(model, loader)
    with torch.autocast("cpu", torch.bfloat16):
        got = e2vpt.attention_to_prompts(model, loader)
    torch.testing.assert_close(
        got["visual"] + got["kv"] + got["tokens"],
        torch.ones_like(got["kv"]).double(),
        rtol=0,
        atol=1e-5,
    )
    for kind in got:
        tolerance = 1e-7 if kind.startswith("uniform") else 0.03
        torch.testing.assert_close(got[kind], exact[kind], rtol=0, atol=tolerance)


# ---- nothing else happens -------------------------------------------------------------------


def test_batches_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vit", "swin_filled"):
        first = e2vpt.attention_to_prompts(build(name), batches(name, 5))
        assert_close(e2vpt.attention_to_prompts(build(name), batches(name, 2)[::-1]), first)
        monkeypatch.setattr("e2vpt.attention_maps.MAX_NUMBERS", 1000)  # some samples at a time
        assert_close(e2vpt.attention_to_prompts(build(name), batches(name, 5)), first)
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["vit", "eva", "swin", "swin_v2"])
def test_a_watched_model_gives_the_same_bits(name: str) -> None:
    model, images = build(name), batches(name)[0][0]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            plain = model(images)
            with _Watch(_layouts(model, images)):
                watched = model(images)
        assert torch.equal(plain, watched)
        assert watched.requires_grad == grad


def test_everything_is_left_as_it_was() -> None:
    model = build(prompt_dropout=0.5).train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def loader() -> Iterator[Batch]:
        torch.rand(5)  # as a loader's own sampler draws
        yield from batches()

    random = rng_state()
    got = e2vpt.attention_to_prompts(model, loader())
    assert torch.equal(random["torch"], rng_state()["torch"])
    assert torch.is_grad_enabled()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(shares.requires_grad for shares in got.values())
    assert_close(e2vpt.attention_to_prompts(model.eval(), batches()), got)  # dropout was off


def test_wrong_input_is_named() -> None:
    bare = build(num_visual_prompts=0, num_kv_prompts=0)
    with pytest.raises(InputError, match=r"^model: got no prompts, expected some that get atten"):
        e2vpt.attention_to_prompts(bare, batches())
    with pytest.raises(InputError, match=r"^loader: got no images, expected at least one; check"):
        e2vpt.attention_to_prompts(build(), [])


def test_attention_that_was_not_seen_is_no_silent_zero() -> None:
    model = build()
    images = batches()[0][0]
    watch = _Watch(_layouts(model, images)[:2])
    with watch, pytest.raises(RuntimeError, match=r"^attention: got more calls than 2 layers$"):
        model(images)
    with pytest.raises(RuntimeError, match=r"^attention: got 0 calls, expected 3$"):
        _Watch(_layouts(model, images)).shares()
