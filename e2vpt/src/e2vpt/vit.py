"""How prompts enter a plain timm vision transformer, without touching its modules.

The output at a deep prompt's position is thrown away by the next layer. So a prompt needs only its
key and value rows in each layer's attention (the cheap form); no query, no projection, no MLP. And
where the class token alone is pooled, the last block computes that token alone. The token form runs
everything through whole blocks, as the paper writes it. It gives the same output and is kept as the
reference and for what needs it: shallow prompts, and pooling that averages the prompts too.

Shapes: B batch, N tokens (prefix and patches), P visual prompts, n key-value prompts, M key rows,
H heads, D width, d_h = D / H.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.attend import attend_to
from e2vpt.geometry import Geometry, LayerGeometry, class_name
from e2vpt.prompts import KeyValueRows, VisualRows
from shared_utils.errors import InputError

CLASS = VisionTransformer
CLASSIFIER = "head"
Rows = tuple[Tensor, Tensor, Tensor | None]  # keys, values, and which of them an image has
BlockRunner = Callable[[int, Tensor, Tensor | None, Rows | None, int, int], Tensor]


def check_supported(backbone: Any) -> Geometry:
    """The geometry of a plain timm ViT.

    Raises: InputError naming the class of block or attention that is not known.
    """
    if backbone.global_pool in ("", "prr"):
        raise InputError(
            "backbone",
            f"global_pool '{backbone.global_pool}'",
            "token, avg, avgmax, max or map",
            "build it with one of these",
        )
    blocks: Any = backbone.blocks
    for i, block in enumerate(blocks):
        if type(block) not in (Block, ResPostBlock):
            raise InputError(
                "backbone",
                f"block class {class_name(block)} in layer {i}",
                "timm's Block or ResPostBlock",
                "choose another model",
            )
        if type(block.attn) is not Attention:
            raise InputError(
                "backbone",
                f"attention class {class_name(block.attn)} in layer {i}",
                "timm's Attention",
                "choose another model",
            )
    return Geometry(
        layers=tuple(
            LayerGeometry(backbone.embed_dim, block.attn.num_heads, block.attn.head_dim)
            for block in blocks
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
    """Run a backbone with prompts, up to its final norm.  Paper: Sec. 3.2, 3.3.

    Args:
        backbone: a timm `VisionTransformer` that `check_supported` took.
        images: (B, 3, H, W) float, normalised for the backbone.
        visual: prompts of every layer, or of the first one only (shallow), or None.
        kv: key-value rows of the first `kv.num_layers` layers, or None.
        token_form: run deep prompts, and all tokens of the last block, through whole blocks.
        pool_prompts: keep the last layer's prompts in the output, after the prefix tokens.

    Returns: (B, N, D); (B, 1, D), the class token, where pooling takes nothing else; or
        (B, N + P, D) with `pool_prompts`.
    """
    x = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(images))))
    run = partial(_run, backbone)
    return run_blocks(
        backbone, x, visual, kv, run, token_form=token_form, pool_prompts=pool_prompts
    )


def _run(
    backbone: Any, i: int, x: Tensor, rows: Tensor | None, kv: Rows | None, num_out: int, _: int
) -> Tensor:
    """The `BlockRunner` of a plain ViT."""
    return run_block(backbone.blocks[i], x, rows, kv, num_out)


def run_blocks(
    backbone: Any,
    x: Tensor,
    visual: VisualRows | None,
    kv: KeyValueRows | None,
    run: BlockRunner,
    *,
    token_form: bool,
    pool_prompts: bool,
) -> Tensor:
    """Run embedded tokens through all blocks and the final norm, as `prompted_features` says.

    Args:
        backbone: any whose blocks are in `blocks` and whose final norm is `norm`.
        x: (B, N, D).
        visual: as above.
        kv: as above.
        run: one block, from its number, tokens, visual prompts that give only key and value rows,
            key-value prompts, the number of tokens to compute, and how many prompts are tokens
            now, right behind the prefix.
        token_form: as above.
        pool_prompts: as above.

    Returns: as above.
    """
    # x.shape[0] and not len(x), which would fix the batch size when the model is exported.
    prefix, last = backbone.num_prefix_tokens, len(backbone.blocks) - 1
    shallow = visual is not None and visual.num_layers == 1 and last > 0
    only_class_token = backbone.global_pool == "token" and not (token_form or pool_prompts)
    carried = 0  # prompts now in the sequence
    for i in range(last + 1):
        rows = visual(i, x.shape[0]) if visual is not None and (i == 0 or not shallow) else None
        as_tokens = token_form or shallow or (pool_prompts and i == last)
        if rows is not None and as_tokens:
            tokens = rows.to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :prefix], tokens, x[:, prefix + carried :]], dim=1)
            carried, rows = tokens.shape[1], None
        num_out = 1 if i == last and only_class_token else x.shape[1]
        extra = (*kv(i), kv.mask) if kv is not None and i < kv.num_layers else None
        x = run(i, x, rows, extra, num_out, carried)
    if carried and not pool_prompts and x.shape[1] > prefix + carried:
        x = torch.cat([x[:, :prefix], x[:, prefix + carried :]], dim=1)
    out: Tensor = backbone.norm(x)
    return out


def folded_rows(backbone: Any, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's attention makes of visual prompts: key and value rows.

    Args:
        backbone: a timm `VisionTransformer` that `check_supported` took.
        layer: its number.
        rows: (P, D).

    Returns: keys, after the key norm, and values, each (H, P, d_h).
    """
    block = backbone.blocks[layer]
    rows = block.norm1(rows[None]) if type(block) is Block else rows[None]
    keys, values = _key_value_rows(block.attn, rows)
    return keys[0].transpose(0, 1), values[0].transpose(0, 1)


def run_block(block: Any, x: Tensor, rows: Tensor | None, kv: Rows | None, num_out: int) -> Tensor:
    """One block whose attention also sees prompts.

    Args:
        block: timm `Block`, or `ResPostBlock`, whose norms come behind attention and MLP.
        x: (B, N, D).
        rows: (1 or B, P, D) visual prompts of this layer, used for keys and values only.
        kv: key-value prompts, each (H, n, d_h) or (B, H, n, d_h), and bool (B, n), False for those
            that an image does not have, or None.
        num_out: compute the first `num_out` tokens only; the others serve as keys and values.

    Returns: (B, num_out, D).
    """
    if type(block) is ResPostBlock:
        mixed = block.norm1(attention(block.attn, x, rows, kv, num_out))
        x = x[:, :num_out] + block.drop_path1(mixed)
        post: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
        return post
    y = block.norm1(x)
    mixed = attention(block.attn, y, None if rows is None else block.norm1(rows), kv, num_out)
    x = x[:, :num_out] + block.drop_path1(block.ls1(mixed))
    out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return out


def attention(attn: Any, y: Tensor, rows: Tensor | None, kv: Rows | None, num_out: int) -> Tensor:
    """Multi-head attention of the first `num_out` tokens over all tokens and prompts.

    softmax(Q [K; K_visual; K_kv]ᵀ / sqrt(d_h)) [V; V_visual; V_kv], the order of rows being
    irrelevant.  Paper: Sec. 3.3.

    Args:
        attn: timm `Attention`.
        y: (B, N, D) after the norm.
        rows: (1 or B, P, D) visual prompts after the norm.
        kv: key-value prompts, each (H, n, d_h) or (B, H, n, d_h), and bool (B, n), False for those
            that an image does not have, or None.
        num_out: number of query tokens.

    Returns: (B, num_out, D) after the output projection.
    """
    b, n, _ = y.shape
    heads, head_dim, width = attn.num_heads, attn.head_dim, attn.attn_dim
    if num_out == n:
        q, k, v = attn.qkv(y).view(b, n, 3, heads, head_dim).unbind(2)  # each (B, N, H, d_h)
    else:
        q = project(attn.qkv, y[:, :num_out], 0, width).view(b, num_out, heads, head_dim)
        k, v = project(attn.qkv, y, width, 3 * width).view(b, n, 2, heads, head_dim).unbind(2)
    keys, values = [attn.k_norm(k)], [v]
    if rows is not None:
        k, v = _key_value_rows(attn, rows)
        keys.append(k)
        values.append(v)
    if kv is not None:
        for parts, shared_or_own in ((keys, kv[0]), (values, kv[1])):
            new = shared_or_own if shared_or_own.ndim == 4 else shared_or_own[None]
            parts.append(new.transpose(1, 2).to(k.dtype))
    mask = None if kv is None else kv[2]
    return project_out(attn, attend_to(attn, attn.q_norm(q), keys, values, mask), y)


def project_out(attn: Any, mixed: Tensor, y: Tensor) -> Tensor:
    """Norm, gate and projection behind the attention, where a timm module has them.

    Args:
        attn: timm `Attention`, `AttentionRope` or `EvaAttention`.
        mixed: (B, N_out, H d_h).
        y: (B, N, D), what the attention was given; its first rows make the gate.

    Returns: (B, N_out, D).
    """
    mixed = attn.norm(mixed)
    if attn.gate is not None:
        mixed = mixed * attn.gate(y[:, : mixed.shape[1]]).sigmoid()
    out: Tensor = attn.proj_drop(attn.proj(mixed))
    return out


def _key_value_rows(attn: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(1 or B, P, D) after the norm -> normed keys, and values, both (1 or B, P, H, d_h)."""
    width = attn.attn_dim
    pairs = project(attn.qkv, rows, width, 3 * width)
    k, v = pairs.view(*rows.shape[:2], 2, attn.num_heads, attn.head_dim).unbind(2)
    return attn.k_norm(k), v


def project(linear: Any, x: Tensor, start: int, end: int) -> Tensor:
    """Output columns [start, end) of a linear layer, computed alone where it is a plain one."""
    is_plain = type(linear) is nn.Linear  # and nothing that wraps or replaces one
    if not is_plain:
        out: Tensor = linear(x)[..., start:end]
        return out
    bias = None if linear.bias is None else linear.bias[start:end]
    return F.linear(x, linear.weight[start:end], bias)
