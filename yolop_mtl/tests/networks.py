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


def enliven(model: nn.Module, size: tuple[int, int] = (64, 96)) -> nn.Module:
    """Give norms random weights and the statistics of blocks of colour, so that what goes in shows
    in what comes out, as in a trained network; in place, then eval mode.

    Channels that hardly vary keep it so: blown up, they would blow up rounding errors too.
    """
    randomize(model).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
    with torch.no_grad():
        model(blocks(4, *size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=float(norm.running_var.mean()))
    return model.eval()


def blocks(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Images (B, 3, H, W), 0 to 1: blocks of 16 x 16 pixels in random colours, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(batch, 3, height // 16, width // 16, generator=generator)
    blown_up = colours.repeat_interleave(16, 2).repeat_interleave(16, 3)
    return 0.8 * blown_up + 0.2 * torch.rand(batch, 3, height, width, generator=generator)
