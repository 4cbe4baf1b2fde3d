"""How prompts enter timm's Swin transformers, versions 1 and 2, without touching their modules.

Each block's prompts are copied into every window, attend there, and are averaged over the windows
of the image afterwards. In deep mode the next block replaces them, so that a prompt needs only its
key and value rows (the cheap form); the token form runs prompts through whole blocks, and is kept
as the reference and for what needs it: shallow prompts, and pooling that averages prompts too.

Paper: Han et al., E²VPT, ICCV 2023, Sec. 3 (arXiv 2307.13770). Differs from the paper's code:
windows get the prompts of their own sample, prompt dropout is drawn per sample in every block, and
pooling leaves prompts out unless asked.

Shapes: B batch, N patches (h·w of a stage's map), W windows of one image, A patches in a window,
P visual prompts, n key-value prompts, H heads, D width, d_h width of a head.
"""

from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.geometry import Geometry, LayerGeometry, class_name
from e2vpt.prompts import KeyValueRows, VisualRows
from e2vpt.swin_attention import head_dim, key_value_rows, per_window, window_attention
from e2vpt.vit import Rows
from shared_utils.errors import InputError

# The classes of a backbone's stages, mergings, blocks and attention.
_PARTS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    v1.SwinTransformer: (
        v1.SwinTransformerStage,
        v1.PatchMerging,
        v1.SwinTransformerBlock,
        v1.WindowAttention,
    ),
    v2.SwinTransformerV2: (
        v2.SwinTransformerV2Stage,
        v2.PatchMerging,
        v2.SwinTransformerV2Block,
        v2.WindowAttention,
    ),
}
CLASSES = tuple(_PARTS)
CLASSIFIER = "head.fc"  # the pooling in front of it stays

Size = tuple[int, int]  # height and width of a stage's map, in patches


def check_supported(backbone: Any) -> Geometry:
    """The geometry of a timm Swin transformer.

    Raises: InputError naming the class of stage, merging, block, attention or head that is not
        known.
    """
    _expect("head", backbone.head, "at the end", ClassifierHead)
    if backbone.head.global_pool.is_identity():
        raise InputError(
            "backbone",
            "global_pool ''",
            "avg, max, avgmax or catavgmax",
            "build it with one of these",
        )
    stage_class, merging, block_class, attention = _PARTS[type(backbone)]
    layers: list[LayerGeometry] = []
    for i, stage in enumerate(backbone.layers):
        _expect("stage", stage, f"in place {i}", stage_class)
        _expect("merging", stage.downsample, f"in stage {i}", merging, nn.Identity)
        for block in stage.blocks:
            where = f"in layer {len(layers)}"
            _expect("block", block, where, block_class)
            _expect("attention", block.attn, where, attention)
            layers.append(LayerGeometry(block.dim, block.attn.num_heads, head_dim(block.attn)))
    return Geometry(
        layers=tuple(layers),
        patch_size=backbone.patch_embed.patch_size[0],
        num_prefix_tokens=0,
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
        backbone: a timm Swin transformer that `check_supported` took.
        images: (B, 3, height, width) float, normalised for the backbone.
        visual: prompts of every layer, or of the first one only (shallow), or None.
        kv: key-value rows of the first `kv.num_layers` layers, or None.
        token_form: run deep prompts through whole blocks.
        pool_prompts: keep the last layer's prompts in the output, behind the patches.

    Returns: (B, h, w, D); with `pool_prompts` (B, 1, N + P, D), over which pooling in both
        directions is pooling over all tokens.
    """
    x = backbone.patch_embed(images)  # (B, h, w, D)
    size: Size = (x.shape[1], x.shape[2])
    x = x.flatten(1, 2)  # (B, N, D); prompts that run as tokens come behind
    last = sum(len(stage.blocks) for stage in backbone.layers) - 1
    shallow = visual is not None and visual.num_layers == 1 and last > 0
    layer = 0
    for stage in backbone.layers:
        if not shallow:
            x = x[:, : size[0] * size[1]]  # the next block has prompts of its own
        x, size = merge_patches(stage.downsample, x, size)
        for block in stage.blocks:
            has_rows = visual is not None and (layer == 0 or not shallow)
            rows = visual(layer, x.shape[0]) if visual is not None and has_rows else None
            if rows is not None and (token_form or shallow or (pool_prompts and layer == last)):
                tokens = rows.to(x.dtype).expand(x.shape[0], -1, -1)
                x, rows = torch.cat([x[:, : size[0] * size[1]], tokens], dim=1), None
            extra = (*kv(layer), kv.mask) if kv is not None and layer < kv.num_layers else None
            x = run_block(block, x, size, rows, extra)
            layer += 1
    if pool_prompts:
        out: Tensor = backbone.norm(x)[:, None]
    else:
        out = backbone.norm(x[:, : size[0] * size[1]]).unflatten(1, size)
    return out


def folded_rows(backbone: Any, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's attention makes of visual prompts: key and value rows, for every window.

    Args:
        backbone: a timm Swin transformer that `check_supported` took.
        layer: its number, counted over all stages.
        rows: (P, D).

    Returns: keys (of unit length in V2) and values, each (H, P, d_h).
    """
    block = [block for stage in backbone.layers for block in stage.blocks][layer]
    return key_value_rows(block.attn, rows if _is_post_norm(block) else block.norm1(rows))


def merge_patches(downsample: Any, x: Tensor, size: Size) -> tuple[Tensor, Size]:
    """Merge 2 x 2 patches into one of twice the width; a prompt merges with itself.

    Args:
        downsample: timm `PatchMerging` of a stage, or `Identity` where it has none.
        x: (B, N + P, D), P prompts behind the patches (0 in deep mode).
        size: height and width of the map.

    Returns: (B, N' + P, D') and the new height and width.
    """
    if type(downsample) is nn.Identity:
        return x, size
    num_patches = size[0] * size[1]
    prompts = x[:, num_patches:]
    x = downsample(x[:, :num_patches].unflatten(1, size))
    size = (x.shape[1], x.shape[2])
    x = x.flatten(1, 2)
    if prompts.shape[1]:
        # A square of 2 x 2 copies: repeated 4 times on channels, then norm and reduction.
        squares = prompts[:, None, :, None].expand(-1, 2, -1, 2, -1).flatten(2, 3)
        x = torch.cat([x, downsample(squares)[:, 0]], dim=1)
    return x, size


def run_block(block: Any, x: Tensor, size: Size, rows: Tensor | None, kv: Rows | None) -> Tensor:
    """One block whose windows also see prompts.

    V1 norms what enters attention and the MLP, V2 what leaves them, so that there prompts enter
    attention as they are.

    Args:
        block: timm `SwinTransformerBlock` or `SwinTransformerV2Block`.
        x: (B, N + P', D), P' prompts that run as tokens behind the patches.
        size: height and width of the map.
        rows: (1 or B, P, D) visual prompts of this layer, used for keys and values only.
        kv: key-value prompts, each (H, n, d_h) or (B, H, n, d_h), and bool (B, n), False for those
            that an image does not have, or None.

    Returns: (B, N + P', D).
    """
    if _is_post_norm(block):
        x = x + block.drop_path1(block.norm1(_mix(block, x, size, rows, kv)))
        out: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
        return out
    mixed = _mix(block, block.norm1(x), size, None if rows is None else block.norm1(rows), kv)
    x = x + block.drop_path1(mixed)
    out = x + block.drop_path2(block.mlp(block.norm2(x)))
    return out


def _mix(block: Any, y: Tensor, size: Size, rows: Tensor | None, kv: Rows | None) -> Tensor:
    """Attention in the block's windows: (B, N + P', D) -> the same shape."""
    batch, num_patches = y.shape[0], size[0] * size[1]
    (height, width), (shift_h, shift_w) = block.window_size, block.shift_size
    patches = y[:, :num_patches].unflatten(1, size)  # (B, h, w, D)
    if shift_h or shift_w:
        patches = patches.roll((-shift_h, -shift_w), dims=(1, 2))
    # Zeros fill windows that reach over the edge; as in timm, they are patches like others.
    patches = F.pad(patches, (0, 0, 0, -size[1] % width, 0, -size[0] % height))
    padded = (patches.shape[1], patches.shape[2])
    num_windows = (padded[0] // height) * (padded[1] // width)
    mask = block.get_attn_mask(patches) if block.dynamic_mask else block.attn_mask
    windows = window_partition(patches, block.window_size).flatten(1, 2)  # (B·W, A, D)
    prompts = y[:, num_patches:]
    if prompts.shape[1]:
        windows = torch.cat([windows, per_window(prompts, batch, num_windows)], dim=1)
    windows = window_attention(block.attn, windows, num_windows, mask, rows, kv)
    area = height * width
    patches = windows[:, :area].unflatten(1, (height, width))
    patches = window_reverse(patches.contiguous(), block.window_size, *padded)
    patches = patches[:, : size[0], : size[1]]
    if shift_h or shift_w:
        patches = patches.roll((shift_h, shift_w), dims=(1, 2))
    out: Tensor = patches.flatten(1, 2)
    if prompts.shape[1]:
        averaged = windows[:, area:].unflatten(0, (-1, num_windows)).mean(dim=1)
        out = torch.cat([out, averaged], dim=1)
    return out


def _is_post_norm(block: Any) -> bool:
    return type(block) is v2.SwinTransformerV2Block


def _expect(part: str, module: Any, where: str, *known: type[nn.Module]) -> None:
    if type(module) not in known:
        raise InputError(
            "backbone",
            f"{part} class {class_name(module)} {where}",
            f"timm's {known[0].__name__}",
            "choose another model",
        )
