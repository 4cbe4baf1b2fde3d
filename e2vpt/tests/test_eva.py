"""What timm's `Eva` has besides: rotation, grouped heads, projections apart; errors; ONNX."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.layers import DiffAttention
from timm.models.eva import Eva
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import e2vpt
from e2vpt import model_io
from e2vpt.eva import attention, check_supported
from e2vpt.export import export_onnx
from e2vpt.model import PromptedModel, PromptSpec, with_token_form
from shared_utils.errors import InputError

SLOW = pytest.mark.slow
WIDTH, HEADS, SIDE = 32, 4, 48

# Keywords of timm's Eva.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"use_rot_pos_emb": True, "use_abs_pos_emb": False},
    "half": {"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True},
    "mixed": {"use_rot_pos_emb": True, "rope_type": "mixed"},
    "mrope": {
        "use_rot_pos_emb": True, "rope_type": "mrope", "rope_mrope_section": (1, 2, 1),
    },
    "apart": {"qkv_fused": False, "use_rot_pos_emb": True},
    "no_bias": {"qkv_bias": False},
    "rope_attention": {"attn_type": "rope", "use_rot_pos_emb": True, "qk_norm": True},
    "grouped": {
        "attn_type": "rope", "use_rot_pos_emb": True, "qkv_fused": False, "num_kv_heads": 2,
    },
    "norms": {"qk_norm": True, "scale_attn_inner": True, "scale_mlp": True, "swiglu_mlp": True},
    "scaled": {"init_values": 0.1, "attn_only_layer_scale": True},
    "behind": {"use_post_norm": True, "use_rot_pos_emb": True},
    "registers": {"num_reg_tokens": 3, "no_embed_class": True, "use_rot_pos_emb": True},
}  # fmt: skip


def build(kind: str, **overrides: Any) -> Eva:
    """Three by three patches, float64, eval mode, every weight matters."""
    torch.manual_seed(0)
    options = {"global_pool": "token", "num_classes": 5, **OPTIONS[kind], **overrides}
    vit = Eva(
        img_size=SIDE, patch_size=16, embed_dim=WIDTH, depth=3, num_heads=HEADS, **options
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return vit


def images(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)


def prompted(vit: nn.Module, **spec: Any) -> PromptedModel:
    counts = {"num_visual_prompts": 3, "num_kv_prompts": 2, "share_kv": False}
    model = PromptedModel(vit, PromptSpec(num_classes=5, **{**counts, **spec})).double().eval()
    with torch.no_grad():
        for module in (model.visual, model.kv):
            for parameter in module.parameters() if module is not None else ():
                parameter.normal_()
    return model


def rotated(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """One row (d_h): each pair of numbers turned by its angle."""
    sin, cos = rope.chunk(2)
    out, size = torch.empty_like(x), len(x)
    for j in range(size // 2):
        a, b = (j, j + size // 2) if half else (2 * j, 2 * j + 1)
        out[a], out[b] = x[a] * cos[a] - x[b] * sin[a], x[b] * cos[b] + x[a] * sin[b]
    return out


def naive_attention(
    attn: Any, y: Tensor, rows: Tensor, kv: tuple[Tensor, Tensor], rope: Tensor | None
) -> Tensor:
    """One sample, head and row at a time; the patches alone are rotated."""
    width = HEADS * attn.head_dim

    def heads(x: Tensor, part: int) -> Tensor:
        if attn.qkv is None:
            made = (attn.q_proj, attn.k_proj, attn.v_proj)[part](x)
        else:
            made = x @ attn.qkv.weight[part * width : (part + 1) * width].T
            bias = getattr(attn, "q_bias", None)
            if attn.qkv.bias is not None:
                made = made + attn.qkv.bias[part * width : (part + 1) * width]
            elif bias is not None:
                made = made + (attn.q_bias, 0, attn.v_bias)[part]
        return made.reshape(len(x), -1, attn.head_dim)

    prefix, outputs = attn.num_prefix_tokens, []
    for tokens in y:
        q, k = attn.q_norm(heads(tokens, 0)), attn.k_norm(heads(tokens, 1))
        v = heads(tokens, 2)
        groups = q.shape[1] // k.shape[1]
        key_rows, value_rows = attn.k_norm(heads(rows, 1)), heads(rows, 2)
        mixed = []
        for h in range(HEADS):
            g = h // groups
            angles = rope if rope is None or rope.ndim == 2 else rope[h]
            queries, keys = q[:, h].clone(), k[:, g].clone()
            for i in range(len(tokens) - prefix if angles is not None else 0):
                for part in (queries, keys):
                    part[prefix + i] = rotated(part[prefix + i], angles[i], attn.rotate_half)
            keys = torch.cat([kv[0][g], key_rows[:, g], keys])
            values = torch.cat([kv[1][g], value_rows[:, g], v[:, g]])
            mixed.append((queries @ keys.T / attn.head_dim**0.5).softmax(dim=-1) @ values)
        out = attn.norm(torch.cat(mixed, dim=1))
        if attn.gate is not None:
            out = out * attn.gate(tokens).sigmoid()
        outputs.append(attn.proj(out))
    return torch.stack(outputs)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_attention_equals_the_naive_one(kind: str, separate: bool) -> None:
    vit: Any = build(kind)
    attn, prefix = vit.blocks[1].attn, vit.num_prefix_tokens
    attn.qkv_bias_separate = separate
    attn.gate = nn.Linear(WIDTH, WIDTH).double() if separate else None
    rope = vit._pos_embed(vit.patch_embed(images()))[1]
    if vit.rope_mixed:
        rope = rope[1]
    y, rows = torch.randn(2, prefix + 9, WIDTH).double(), torch.randn(3, WIDTH).double()
    groups = getattr(attn, "num_kv_heads", HEADS)
    kv = (torch.randn(groups, 2, 8).double(), torch.randn(groups, 2, 8).double())
    expected = naive_attention(attn, y, rows, kv, rope)
    for fused in (True, False):
        attn.fused_attn = fused
        for num_out in (1, prefix + 9):
            found = attention(attn, y, rows[None], (*kv, None), num_out, rope, 0)
            assert (found - expected[:, :num_out]).abs().max() < 1e-12
    if rope is not None:
        unrotated = naive_attention(attn, y, rows, kv, None)
        assert (unrotated - expected).abs().max() > 1e-3


@pytest.mark.parametrize("pool", ["token", "avg", "map", "max"])
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_forms_agree(kind: str, deep: bool, pool: str) -> None:
    vit = build(kind, global_pool=pool)
    plain = vit.forward_head(vit.forward_features(images()), pre_logits=True)
    model = prompted(vit, deep=deep)
    cheap = model.features(images())
    whole = with_token_form(model, True).features(images())
    assert (cheap - whole).abs().max() < 1e-12
    assert (cheap - plain).abs().max() > 1e-6


@torch.no_grad()
def test_a_sample_alone_equals_the_same_sample_in_a_batch() -> None:
    model = prompted(build("mixed"))
    together = model.features(images(3))
    for i in range(3):
        alone = model.features(images(3)[i : i + 1])
        assert (alone - together[i : i + 1]).abs().max() < 1e-12


@torch.no_grad()
def test_the_last_block_computes_the_class_token_alone() -> None:
    vit: Any = build("rotary")
    seen: list[int] = []
    for block in vit.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    prompted(vit).features(images())
    assert seen == [10, 10, 1]


def test_grouped_heads_get_rows_of_keys_and_values() -> None:
    model = prompted(build("grouped"))
    assert [layer.num_heads for layer in model.geometry.layers] == [2, 2, 2]
    assert model.kv.key[0].shape == (2, 2, WIDTH // HEADS)


@torch.no_grad()
def test_bf16_autocast_is_finite_and_close() -> None:
    model = prompted(build("half")).float()
    x = images().float()
    expected = model.features(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.features(x)
    assert found.isfinite().all()
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", ["half", "mixed", "grouped", "behind"])
@torch.no_grad()
def test_a_bank_equals_each_task_alone(kind: str) -> None:
    vit, x = build(kind), images(3)
    expected, models = [], {}
    bank = e2vpt.PromptBank(vit)
    for i, name in enumerate(("few", "many")):
        models[name] = prompted(vit, num_visual_prompts=2 * i, num_kv_prompts=1 + i)
        bank.add(name, models[name])
    tasks = ["many", "few", "many"]
    for i, name in enumerate(tasks):
        expected.append(models[name](x[i : i + 1])[0])
    for fused in (True, False):
        for block in vit.blocks:
            block.attn.fused_attn = fused
        for found, alone in zip(bank(x, tasks), expected, strict=True):
            assert (found - alone).abs().max() < 1e-12


@pytest.mark.parametrize("token_form", [False, True])
@torch.no_grad()
def test_compiles_as_one_graph(token_form: bool) -> None:
    torch._dynamo.reset()
    model = with_token_form(prompted(build("mixed")), token_form)
    expected = model(images())
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert (compiled(images()) - expected).abs().max() < 1e-12
    torch._dynamo.reset()


def test_unknown_parts_are_named() -> None:
    vit: Any = build("rotary")
    vit.blocks[1] = Block(WIDTH, HEADS)
    with pytest.raises(
        InputError,
        match=r"block class timm\.models\.vision_transformer\.Block in layer 1, expected EvaBlock",
    ):
        check_supported(vit)
    vit = build("rotary")
    vit.blocks[2].attn = DiffAttention(WIDTH, HEADS)
    with pytest.raises(InputError, match=r"attention class timm.*DiffAttention in layer 2"):
        check_supported(vit)
    vit = build("rotary")
    vit.rope = nn.Identity()
    with pytest.raises(
        InputError, match=r"rotary embedding class torch.*Identity, expected Rotary"
    ):
        check_supported(vit)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch16_dinov3", {}),
        pytest.param("eva02_tiny_patch14_224", {"patch_size": 16}, marks=SLOW),
        pytest.param("vit_small_patch16_rope_mixed_224", {"deep": False}, marks=SLOW),
        pytest.param("vit_base_patch16_sapiens2", {"num_kv_heads": 2}, marks=SLOW),
    ],
)
def test_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    options = dict(options)
    deep = options.pop("deep", True)
    vit = timm.create_model(
        name, img_size=SIDE, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=0, **options
    ).eval()
    model = PromptedModel(vit, PromptSpec(num_classes=3, deep=deep)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    e2vpt.save(model, tmp_path)
    monkeypatch.setattr(model_io, "load", lambda folder: model)
    assert export_onnx(tmp_path, tmp_path / "model.onnx").is_folded == deep
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for batch in (1, 5):
        x = torch.randn(batch, 3, SIDE, SIDE)
        with torch.no_grad():
            expected = model(x).numpy()
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        assert expected.std() > 0.1
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
