"""Scaled dot-product attention, chosen for how prompts use it.

On a GPU and in full precision this is torch's `scaled_dot_product_attention`. In bf16 and fp16 on a
CPU two things cost a factor of two (torch 2.13, one AMX core, batch 8, 197 queries, 12 heads):
a number of key rows that is no multiple of 16, which prompts bring about (302 rows 14 ms, 304 rows
6.4 ms), and the fused backward pass (252 rows, forward and backward, 56 ms; as plain matrix
products 28 ms). So the rows are padded and masked, and for training the products are written out.

Shapes: B batch, H heads, N queries, M key rows, d_h width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROW_MULTIPLE = 16  # rows of an AMX tile


def num_padding_rows(num_rows: int, like: Tensor) -> int:
    """Zero rows to append to keys and values so that `attend` is fast; 0 where it makes no odds."""
    if like.device.type != "cpu" or like.dtype not in (torch.bfloat16, torch.float16):
        return 0
    return -num_rows % ROW_MULTIPLE


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    padding: int = 0,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale Q Kᵀ) V.

    Args:
        q: (B, H, N, d_h).
        k: (B, H, M, d_h).
        v: (B, H, M, d_h).
        scale: factor of the logits.
        padding: the last so many rows of k and v get no weight.
        dropout: share of the weights to drop; only a backbone that trains has any.
        bias: added to the logits, (B, 1, 1, M), -inf for the padding; None for none.

    Returns: (B, H, N, d_h).
    """
    is_low = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    is_plain = is_low and bias is None and not dropout
    if is_plain and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        out: Tensor = _Attend.apply(q, k, v, scale, padding)  # type: ignore[no-untyped-call]
        return out
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=_mask(k, padding) if bias is None else bias,
        dropout_p=dropout,
        scale=scale,
    )


def attend_to(
    attn: Any, q: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Attention as a timm module is set (scale, dropout, fused or not) over rows of any origin.

    Args:
        attn: timm attention module.
        q: (B, N, H, d_h).
        keys: parts, each (1 or B, rows, H, d_h); joined in their order, which makes no difference.
        values: the same parts of the values.
        mask: bool (B, n), False where an image does not have one of the last n rows.

    Returns: (B, N, H d_h), before norm, gate and projection.
    """
    b, n, heads, head_dim = q.shape
    num_rows = sum(part.shape[1] for part in keys)
    padding = num_padding_rows(num_rows, values[0])
    if padding:
        zeros = values[0].new_zeros(()).expand(b, padding, heads, head_dim)
        keys, values = [*keys, zeros], [*values, zeros]
    k = torch.cat([part.expand(b, -1, -1, -1) for part in keys], dim=1).transpose(1, 2)
    v = torch.cat([part.expand(b, -1, -1, -1) for part in values], dim=1).transpose(1, 2)
    q = q.transpose(1, 2)
    dropout = attn.attn_drop.p if attn.attn_drop.training else 0.0
    bias = None if mask is None else _bias(mask, num_rows, padding, v)
    if attn.fused_attn:
        out = attend(q, k, v, scale=attn.scale, padding=padding, dropout=dropout, bias=bias)
    else:
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias
        kept = num_rows
        out = F.dropout(logits[..., :kept].softmax(dim=-1), dropout) @ v[:, :, :kept]
    return out.transpose(1, 2).reshape(b, n, heads * head_dim)


def _bias(mask: Tensor, num_rows: int, padding: int, like: Tensor) -> Tensor:
    """(B, 1, 1, M), -inf for the padding and for rows that an image does not have."""
    bias = like.new_zeros(len(mask), num_rows + padding)
    bias[:, num_rows:] = float("-inf")
    bias[:, num_rows - mask.shape[1] : num_rows].masked_fill_(~mask, float("-inf"))
    return bias[:, None, None]


def _mask(k: Tensor, padding: int) -> Tensor | None:
    """(1, 1, 1, M), -inf for the padding; None without."""
    if not padding:
        return None
    rows = k.shape[2]
    mask = k.new_zeros(rows)
    mask[rows - padding :] = float("-inf")
    return mask.view(1, 1, 1, rows)


class _Attend(torch.autograd.Function):
    """Plain matrix products; in place where autograd could not be, the weights being large."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, padding: int) -> Tensor:
        q = q * scale
        weights = q @ k.transpose(-2, -1)  # (B, H, N, M)
        if padding:
            weights[..., k.shape[2] - padding :] = float("-inf")
        torch.softmax(weights, dim=-1, out=weights)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return weights @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad_v = weights.transpose(-2, -1) @ grad
        logits = grad @ v.transpose(-2, -1)
        torch.ops.aten._softmax_backward_data.out(logits, weights, -1, q.dtype, grad_input=logits)
        grad_q = (logits @ k).mul_(ctx.scale) if ctx.needs_input_grad[0] else None
        return grad_q, logits.transpose(-2, -1) @ q, grad_v, None, None
