"""The methods that compare: what each puts on a backbone, and what it trains."""

from typing import Any

from e2vpt.config import ModelConfig
from e2vpt.model import PromptSpec


def build_spec(cfg: ModelConfig, num_classes: int) -> PromptSpec:
    """What a method puts on the backbone. Baselines as in the paper: VPT has no key-value rows."""
    prompts = {
        "e2vpt": (cfg.num_visual_prompts, cfg.num_kv_prompts),
        "vpt-deep": (cfg.num_visual_prompts, 0),
        "vpt-shallow": (cfg.num_visual_prompts, 0),
    }.get(cfg.method, (0, 0))
    adapter: dict[str, Any] = {
        "lora": {
            "adapter": "lora",
            "adapter_dim": cfg.lora_rank,
            "adapter_scale": cfg.lora_alpha / cfg.lora_rank,
        },
        "adaptformer": {
            "adapter": "adaptformer",
            "adapter_dim": cfg.adapter_dim,
            "adapter_scale": cfg.adapter_scale,
        },
    }.get(cfg.method, {})
    return PromptSpec(
        num_classes=num_classes,
        num_visual_prompts=prompts[0],
        num_kv_prompts=prompts[1],
        deep=cfg.method != "vpt-shallow",
        share_kv=cfg.share_kv,
        kv_deep=cfg.kv_deep,
        kv_init=cfg.kv_init,
        prompt_dropout=cfg.prompt_dropout,
        prompt_dim=cfg.prompt_dim,
        pool_prompts=cfg.pool_prompts,
        token_form=cfg.token_form,
        parity_head=cfg.parity_head,
        backbone_trains=cfg.method if cfg.method in ("bias", "partial", "full") else "none",
        partial_blocks=cfg.partial_blocks,
        **adapter,
    )
