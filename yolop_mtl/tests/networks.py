"""Small networks with statistics that folding must get right."""

import torch
from torch import nn


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms other statistics than those of a new network; in place, then eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: torch.Size, low: float, high: float) -> torch.Tensor:
        return torch.rand(size, generator=generator) * (high - low) + low

    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.copy_(draw(norm.running_mean.shape, -0.3, 0.3))
                norm.running_var.copy_(draw(norm.running_var.shape, 0.5, 2.0))
                norm.weight.copy_(draw(norm.weight.shape, 0.5, 1.5))
                norm.bias.copy_(draw(norm.bias.shape, -0.3, 0.3))
    return module.eval()


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
