"""Attention inside Swin's windows, with prompts beside the patches.

Done with timm's own submodules; nothing of timm is changed. Both versions of Swin add to the logits
a bias by relative position and, in shifted windows, a mask that keeps apart what only the shift
brought together. Prompts have no position and belong to every part of the picture, so the mask is
zero in their rows and columns and the bias is neutral there, see `neutral_bias`.

Shapes: B batch, W windows of one image, A patches in a window, T tokens in a window (its patches
and the prompts that run as tokens), P visual prompts, n key-value prompts, M key rows, H heads,
D width, d_h width of a head.
"""

import math
from typing import Any

import torch
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.vit import Rows, project

V1 = swin_transformer.WindowAttention
V2 = swin_transformer_v2.WindowAttention

MAX_LOG_SCALE = math.log(100)  # timm's bound on the learned scale of cosine attention


def head_dim(attn: Any) -> int:
    """d_h, which timm's window attention does not keep."""
    # Not from `qkv`, in whose place an adapter may stand.
    return int(attn.proj.in_features) // int(attn.num_heads)


def per_window(rows: Tensor, batch: int, num_windows: int) -> Tensor:
    """Give each window the rows of its own sample: (1 or B, ...) -> (B·W, ...).

    timm orders windows by sample first. The paper's code expands prompts by window first, so that a
    sample's windows get prompts of other samples.
    """
    return rows[:, None].expand(batch, num_windows, *rows.shape[1:]).flatten(0, 1)


def window_attention(
    attn: Any,
    tokens: Tensor,
    num_windows: int,
    mask: Tensor | None,
    rows: Tensor | None,
    kv: Rows | None,
) -> Tensor:
    """Multi-head attention in each window over its tokens and the prompts.  Paper: Sec. 3.3.

    The paper has no V2. Its attention compares directions alone, all its keys having unit length;
    so ours normalises the keys of key-value prompts too.

    Args:
        attn: timm `WindowAttention` of either version.
        tokens: (B·W, T, D), ordered by sample first; in a window the patches come first.
        num_windows: W.
        mask: (W, A, A), added to the logits of shifted windows; None elsewhere.
        rows: (1 or B, P, D) visual prompts, used for keys and values only.
        kv: key-value prompts, each (H, n, d_h) or (B, H, n, d_h), the same in all windows, and bool
            (B, n), False for those that an image does not have, or None.

    Returns: (B·W, T, D) after the output projection.
    """
    count, num_tokens, _ = tokens.shape
    q, k, v = _heads(attn, tokens, 3)  # each (B·W, T, H, d_h)
    keys, values = [k], [v]
    if rows is not None:
        for parts, new in zip((keys, values), _heads(attn, rows, 2), strict=True):
            parts.append(per_window(new, count // num_windows, num_windows))
    if kv is not None:
        for parts, shared_or_own in ((keys, kv[0]), (values, kv[1])):
            new = shared_or_own if shared_or_own.ndim == 4 else shared_or_own[None]
            new = new.transpose(1, 2).to(k.dtype)
            parts.append(per_window(new, count // num_windows, num_windows))
    q = q.transpose(1, 2)  # (B·W, H, T, d_h)
    k = torch.cat(keys, dim=1).transpose(1, 2)  # (B·W, H, M, d_h)
    v = torch.cat(values, dim=1).transpose(1, 2)
    bias = position_bias(attn)  # (1, H, A, A)
    area = bias.shape[-1]
    if mask is not None:
        bias = bias + mask[:, None]  # (W, H, A, A)
    outside = (0, k.shape[2] - area, 0, num_tokens - area)
    bias = F.pad(bias, outside, value=neutral_bias(attn))  # (1 or W, H, T, M)
    if kv is not None and kv[2] is not None:
        lacks = bias.new_zeros(len(kv[2]), k.shape[2])
        lacks[:, -kv[2].shape[1] :].masked_fill_(~kv[2], float("-inf"))
        bias = (bias.expand(num_windows, -1, -1, -1) + lacks[:, None, None, None]).flatten(0, 1)
    if type(attn) is V1 and attn.fused_attn:
        if bias.shape[0] not in (1, count):
            bias = bias.expand(count // num_windows, *bias.shape).flatten(0, 1)
        dropout = attn.attn_drop.p if attn.attn_drop.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        logits = _logits(attn, q, k).unflatten(0, (-1, bias.shape[0])) + bias
        out = attn.attn_drop(attn.softmax(logits.flatten(0, 1))) @ v
    out = out.transpose(1, 2).flatten(2)
    mixed: Tensor = attn.proj_drop(attn.proj(out))
    return mixed


def key_value_rows(attn: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What attention makes of visual prompts.

    Args:
        attn: timm `WindowAttention` of either version.
        rows: (P, D), after the block's first norm where the version has it there (V1).

    Returns: keys (normalised to unit length in V2) and values, each (H, P, d_h).
    """
    k, v = (part[0].transpose(0, 1) for part in _heads(attn, rows[None], 2))
    return (F.normalize(k, dim=-1) if type(attn) is V2 else k), v


def position_bias(attn: Any) -> Tensor:
    """The bias of each pair of patches in a window, (1, H, A, A)."""
    if type(attn) is V1:
        bias: Tensor = attn._get_rel_pos_bias()
        return bias
    # V2 has it from a small network; timm computes it in the middle of its forward pass.
    table: Tensor = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    area = attn.window_size[0] * attn.window_size[1]
    pairs = table[attn.relative_position_index.view(-1)].view(area, area, -1)
    return 16 * pairs.permute(2, 0, 1).contiguous().sigmoid()[None]


def neutral_bias(attn: Any) -> float:
    """The bias of what has no position.

    0 in V1, as in the paper's code. V2, which the paper has not, squashes what its small network
    gives to 0 to 16 for patches: what is neutral there is a 0 before that, 8 after it. Beside that
    range a bias of 0 would leave prompts e^-8 of the attention.
    """
    return 0.0 if type(attn) is V1 else 8.0


def _logits(attn: Any, q: Tensor, k: Tensor) -> Tensor:
    """(B·W, H, T, d_h) and (B·W, H, M, d_h) -> (B·W, H, T, M), without bias."""
    if type(attn) is V1:
        products: Tensor = (q * attn.scale) @ k.transpose(-2, -1)
        return products
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scaled: Tensor = cosines * attn.logit_scale.clamp(max=MAX_LOG_SCALE).exp()
    return scaled


def _heads(attn: Any, x: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """The last `num_parts` of query, key and value rows: (B, T, D) -> each (B, T, H, d_h)."""
    size = head_dim(attn)
    end = 3 * attn.num_heads * size
    start = end - num_parts * attn.num_heads * size
    if type(attn) is V1 or attn.q_bias is None:
        out = project(attn.qkv, x, start, end)
    else:
        # V2 keeps the biases apart from its linear layer; that of keys is always 0.
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))[start:end]
        if type(attn.qkv) is nn.Linear and not attn.qkv_bias_separate:
            out = F.linear(x, attn.qkv.weight[start:end], bias)
        else:
            out = project(attn.qkv, x, start, end) + bias
    parts: tuple[Tensor, ...] = out.unflatten(-1, (num_parts, attn.num_heads, size)).unbind(2)
    return parts
