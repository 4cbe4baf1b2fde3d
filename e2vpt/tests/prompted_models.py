"""Two tiny backbones, prompts on them, and a few steps of training."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.micro_vit import build_micro_vit
from e2vpt.model import (
    PromptedModel,
    PromptSpec,
)


def micro(**options: Any) -> VisionTransformer:
    """The shipped architecture, tiny; its patch embedding has batch norms, so buffers too."""
    return build_micro_vit(
        **{"num_classes": 7, "embed_dim": 16, "depth": 2, "num_heads": 2, **options}
    )


def plain(**options: Any) -> VisionTransformer:
    """A tiny class-token ViT."""
    sizes = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 7,
    }
    return VisionTransformer(**{**sizes, **options})


def model_of(backbone: nn.Module, **spec: Any) -> PromptedModel:
    counts = {"num_classes": 3, "num_visual_prompts": 4, "num_kv_prompts": 2}
    return PromptedModel(backbone, PromptSpec(**{**counts, **spec}))


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters and buffers that are not bit-equal any more."""
    after = module.state_dict()
    assert after.keys() == before.keys()
    return {n for n in after if not torch.equal(after[n], before[n])}


def train_steps(
    model: PromptedModel, steps: int, optimizer: str = "adamw", lr: float = 0.1
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optim: torch.optim.Optimizer
    optim = (
        torch.optim.AdamW(parameters, lr=lr)
        if optimizer == "adamw"
        else torch.optim.SGD(parameters, lr=lr)
    )
    x, targets = images(), torch.tensor([0, 1, 2, 0])
    for _ in range(steps):
        optim.zero_grad()
        F.cross_entropy(model(x), targets).backward()
        optim.step()
