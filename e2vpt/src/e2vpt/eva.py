"""How prompts enter timm's `Eva` transformers: EVA, EVA-02, DINOv3, perception encoders, RoPE ViTs.

As in `vit.py`, with what these have besides: rotary position embedding, projections of queries,
keys and values apart, fewer heads of keys and values than of queries. Only the backbone's own
patch tokens are rotated. A prompt has no place in the image: neither visual prompts, as rows or as
tokens, nor key-value prompts are rotated.

Shapes: B batch, N tokens (prefix and patches), P visual prompts, n key-value prompts, H heads of
the queries, G heads of keys and values (H where they are not fewer), D width, d_h width of a head.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
    apply_rot_embed_cat,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor
from torch.nn import functional as F

from e2vpt.attend import attend_to
from e2vpt.geometry import Geometry, LayerGeometry, class_name
from e2vpt.prompts import KeyValueRows, VisualRows
from e2vpt.vit import Rows, project, project_out, run_blocks
from shared_utils.errors import InputError

CLASS = Eva
CLASSIFIER = "head"
ROTARY = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, RotaryEmbeddingMRope)


def check_supported(backbone: Any) -> Geometry:
    """The geometry of a timm `Eva`; its heads are those of keys and values.

    Raises: InputError naming the class of block, attention or rotary embedding that is not known.
    """
    if backbone.global_pool == "":
        raise InputError(
            "backbone",
            "global_pool ''",
            "token, avg, avgmax, max or map",
            "build it with one of these",
        )
    if backbone.rope is not None and type(backbone.rope) not in ROTARY:
        raise _unknown("rotary embedding", backbone.rope, "", ROTARY)
    for i, block in enumerate(backbone.blocks):
        if type(block) not in (EvaBlock, EvaBlockPostNorm):
            raise _unknown("block", block, f" in layer {i}", (EvaBlock, EvaBlockPostNorm))
        if type(block.attn) not in (EvaAttention, AttentionRope):
            raise _unknown("attention", block.attn, f" in layer {i}", (EvaAttention, AttentionRope))
    return Geometry(
        layers=tuple(
            LayerGeometry(backbone.embed_dim, _num_kv_heads(block.attn), block.attn.head_dim)
            for block in backbone.blocks
        ),
        patch_size=backbone.patch_embed.patch_size[0],
        num_prefix_tokens=backbone.num_prefix_tokens,
    )


def prompted_features(
    backbone: Any,
    images: Tensor,
    visual: VisualRows | None,
    kv: KeyValueRows | None,
    *,
    token_form: bool = False,
    pool_prompts: bool = False,
) -> Tensor:
    """Run a backbone with prompts, up to its final norm; see `vit.prompted_features`.

    Args:
        backbone: a timm `Eva` that `check_supported` took.
        images: (B, 3, H, W) float, normalised for the backbone.
        visual: prompts of every layer, or of the first one only (shallow), or None.
        kv: key-value rows of the first `kv.num_layers` layers, or None.
        token_form: run deep prompts, and all tokens of the last block, through whole blocks.
        pool_prompts: keep the last layer's prompts in the output, after the prefix tokens.

    Returns: (B, N, D); (B, 1, D), the class token, where pooling takes nothing else; or
        (B, N + P, D) with `pool_prompts`.
    """
    x, rope = backbone._pos_embed(backbone.patch_embed(images))
    x = backbone.norm_pre(x)
    run = partial(_run, backbone, rope)
    return run_blocks(
        backbone, x, visual, kv, run, token_form=token_form, pool_prompts=pool_prompts
    )


def _run(
    backbone: Any,
    rope: Tensor | None,
    i: int,
    x: Tensor,
    rows: Tensor | None,
    kv: Rows | None,
    num_out: int,
    carried: int,
) -> Tensor:
    """The `BlockRunner` of `Eva`."""
    if rope is not None and backbone.rope_mixed:  # learned, one for each layer
        rope = rope[i]
    return run_block(backbone.blocks[i], x, rows, kv, num_out, rope, carried)


def folded_rows(backbone: Any, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's attention makes of visual prompts: key and value rows.

    Args:
        backbone: a timm `Eva` that `check_supported` took.
        layer: its number.
        rows: (P, D).

    Returns: keys, after the key norm and not rotated, and values, each (G, P, d_h).
    """
    block = backbone.blocks[layer]
    rows = rows[None] if type(block) is EvaBlockPostNorm else block.norm1(rows[None])
    keys, values = _key_value_rows(block.attn, rows)
    return keys[0].transpose(0, 1), values[0].transpose(0, 1)


def run_block(
    block: Any,
    x: Tensor,
    rows: Tensor | None,
    kv: Rows | None,
    num_out: int,
    rope: Tensor | None,
    carried: int,
) -> Tensor:
    """One block whose attention also sees prompts.

    Args:
        block: timm `EvaBlock`, or `EvaBlockPostNorm`, whose norms come behind attention and MLP.
        x: (B, N, D).
        rows: (1 or B, P, D) visual prompts of this layer, used for keys and values only.
        kv: key-value prompts, each (G, n, d_h) or (B, G, n, d_h), and bool (B, n), False for those
            that an image does not have, or None.
        num_out: compute the first `num_out` tokens only; the others serve as keys and values.
        rope: sines and cosines of the patches, (patches, 2 d_h) or with H, or B and H, before.
        carried: prompts in `x`, behind the prefix tokens.

    Returns: (B, num_out, D).
    """
    if type(block) is EvaBlockPostNorm:
        mixed = block.norm1(attention(block.attn, x, rows, kv, num_out, rope, carried))
        x = x[:, :num_out] + block.drop_path1(mixed)
        post: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
        return post
    rows = None if rows is None else block.norm1(rows)
    mixed = attention(block.attn, block.norm1(x), rows, kv, num_out, rope, carried)
    if block.gamma_1 is not None:
        mixed = block.gamma_1 * mixed
    x = x[:, :num_out] + block.drop_path1(mixed)
    mixed = block.mlp(block.norm2(x))
    if block.gamma_2 is not None:
        mixed = block.gamma_2 * mixed
    out: Tensor = x + block.drop_path2(mixed)
    return out


def attention(
    attn: Any,
    y: Tensor,
    rows: Tensor | None,
    kv: Rows | None,
    num_out: int,
    rope: Tensor | None,
    carried: int,
) -> Tensor:
    """Multi-head attention of the first `num_out` tokens over all tokens and prompts.

    Args:
        attn: timm `EvaAttention` or `AttentionRope`.
        y: (B, N, D) after the norm.
        rows: (1 or B, P, D) visual prompts after the norm.
        kv: key-value prompts, each (G, n, d_h) or (B, G, n, d_h), and bool (B, n), False for those
            that an image does not have, or None.
        num_out: number of query tokens.
        rope: as in `run_block`.
        carried: as in `run_block`.

    Returns: (B, num_out, D) after the output projection.
    """
    if num_out == y.shape[1]:
        q, k, v = _queries_keys_values(attn, y)
    else:
        q = _heads(_part(attn, y[:, :num_out], 0), attn)
        k, v = _heads(_part(attn, y, 1), attn), _heads(_part(attn, y, 2), attn)
    q, k = attn.q_norm(q), attn.k_norm(k)
    keys, values = [k], [v]
    if rope is not None:
        fixed = attn.num_prefix_tokens + carried
        keys = [k[:, :fixed], _rotate(attn, k[:, fixed:], rope)]
        values = [v[:, :fixed], v[:, fixed:]]
        if num_out > fixed:
            q = torch.cat([q[:, :fixed], _rotate(attn, q[:, fixed:], rope)], dim=1)
    if rows is not None:
        k, v = _key_value_rows(attn, rows)
        keys.append(k)
        values.append(v)
    if kv is not None:
        for parts, shared_or_own in ((keys, kv[0]), (values, kv[1])):
            new = shared_or_own if shared_or_own.ndim == 4 else shared_or_own[None]
            parts.append(new.transpose(1, 2).to(k.dtype))
    groups = attn.num_heads // _num_kv_heads(attn)
    if groups > 1:  # each head of keys and values serves that many heads of queries
        keys = [part.repeat_interleave(groups, dim=2) for part in keys]
        values = [part.repeat_interleave(groups, dim=2) for part in values]
    mask = None if kv is None else kv[2]
    return project_out(attn, attend_to(attn, q.to(v.dtype), keys, values, mask), y)


def _key_value_rows(attn: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(1 or B, P, D) after the norm -> normed keys, and values, both (1 or B, P, G, d_h)."""
    keys = attn.k_norm(_heads(_part(attn, rows, 1), attn))
    return keys, _heads(_part(attn, rows, 2), attn)


def _queries_keys_values(attn: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, D) -> (B, N, H, d_h) and twice (B, N, G, d_h), in one product where they are fused."""
    if attn.qkv is None:
        q, k, v = (_part(attn, y, part) for part in range(3))
    else:
        q, k, v = _fused(attn, y, 0, 3).chunk(3, dim=-1)
    return _heads(q, attn), _heads(k, attn), _heads(v, attn)


def _part(attn: Any, y: Tensor, part: int) -> Tensor:
    """Queries (0), keys (1) or values (2): (B, N, D) -> (B, N, heads d_h)."""
    if attn.qkv is None:
        out: Tensor = (attn.q_proj, attn.k_proj, attn.v_proj)[part](y)
        return out
    return _fused(attn, y, part, part + 1)


def _fused(attn: Any, y: Tensor, first: int, end: int) -> Tensor:
    """The parts [first, end) of queries, keys and values from one joint layer."""
    width = attn.num_heads * attn.head_dim
    start, stop = first * width, end * width
    if getattr(attn, "q_bias", None) is None:
        return project(attn.qkv, y, start, stop)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))[start:stop]
    if attn.qkv_bias_separate:
        return project(attn.qkv, y, start, stop) + bias
    return F.linear(y, attn.qkv.weight[start:stop], bias)


def _heads(x: Tensor, attn: Any) -> Tensor:
    out: Tensor = x.unflatten(-1, (-1, attn.head_dim))
    return out


def _num_kv_heads(attn: Any) -> int:
    """G; `EvaAttention` has as many as of queries."""
    num_heads: int = getattr(attn, "num_kv_heads", attn.num_heads)
    return num_heads


def _rotate(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Rotate queries or keys of the patches, (B, patches, heads, d_h)."""
    rotated: Tensor = apply_rot_embed_cat(x.transpose(1, 2), rope, half=attn.rotate_half)
    return rotated.transpose(1, 2).to(x.dtype)


def _unknown(kind: str, module: Any, where: str, known: tuple[type, ...]) -> InputError:
    names = ", ".join(cls.__name__ for cls in known)
    return InputError(
        "backbone", f"{kind} class {class_name(module)}{where}", names, "choose another model"
    )
