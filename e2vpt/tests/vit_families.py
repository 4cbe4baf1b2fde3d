"""Tiny ViTs of every kind that timm builds, and prompts for them."""

from typing import Any

import torch
from timm.layers import Attention, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from e2vpt.micro_vit import build_micro_vit
from e2vpt.model import PromptedModel, PromptSpec

WIDTH, HEADS = 24, 3

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


def largest_gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()
