"""Tiny models with adapters, values for them, and two steps of training."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.model import PromptedModel, PromptSpec

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KINDS = ("lora", "adaptformer")
NOTHING = {"num_visual_prompts": 0, "num_kv_prompts": 0}


def vit(seed: int = 0, **options: Any) -> Any:
    """A class-token ViT of width 32 with layer scale, so that its place shows."""
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    backbone = timm.models.VisionTransformer(
        **{**sizes, "num_classes": 5, "init_values": 0.5, **options}
    )
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone.eval()


def model_of(backbone: nn.Module, kind: str = "none", **spec: Any) -> PromptedModel:
    return PromptedModel(backbone, PromptSpec(num_classes=3, adapter=kind, **{**NOTHING, **spec}))


def randomize(model: nn.Module) -> None:
    """Values of their own for everything that trains, zeros included."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def train_two_steps(model: PromptedModel) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.eval()
    model(IMAGES)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), torch.tensor([0, 2])).backward()
        optimizer.step()
