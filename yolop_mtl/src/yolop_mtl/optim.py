"""Optimisers with three groups of parameters, and their rates as plain functions of the step.

Warm-up and cosine as in YOLOv7; the paper names momentum, rate and epochs only.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from yolop_mtl.blocks import Implicit
from yolop_mtl.config import OptimConfig

NOMINAL_BATCH = 64  # images per step that weight decay is meant for


class Groups(NamedTuple):
    """Trainable parameters, each in one group; the order is that of `Optimizer.param_groups`.

    Attributes:
        weights: of convolutions and linear layers, which decay.
        plain: scales of norms, implicit vectors and learned weights of losses, without decay.
        biases: without decay, and with a rate of their own in warm-up.
    """

    weights: list[nn.Parameter]
    plain: list[nn.Parameter]
    biases: list[nn.Parameter]


def split_parameters(network: nn.Module) -> Groups:
    """The trainable parameters of a network by what the optimiser does with them."""
    groups = Groups([], [], [])
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias":
                groups.biases.append(parameter)
            elif isinstance(module, Implicit) or parameter.ndim < 2:
                groups.plain.append(parameter)
            else:
                groups.weights.append(parameter)
    return groups


def build_optimizer(
    cfg: OptimConfig, network: nn.Module, *, images_per_step: int
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW whose first beta is the momentum.

    Args:
        cfg: which, and its numbers.
        network: its trainable parameters are taken.
        images_per_step: of all processes and micro-batches; weight decay is meant for 64.
    """
    decay = cfg.weight_decay * images_per_step / NOMINAL_BATCH
    weights, plain, biases = split_parameters(network)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": biases, "weight_decay": 0.0, "is_bias": True},
    ]
    groups = [{"is_bias": False, **group} for group in groups if group["params"]]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=True)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.momentum, 0.999))


class Rates(NamedTuple):
    """Of one step: learning rate, that of biases, and momentum."""

    lr: float
    bias_lr: float
    momentum: float


def cosine_lr(cfg: OptimConfig, epoch: float) -> float:
    """The rate after so many epochs, which may be broken: a cosine from lr to lr · final_lr."""
    share = (1 + math.cos(math.pi * epoch / cfg.epochs)) / 2
    return cfg.lr * (share * (1 - cfg.final_lr) + cfg.final_lr)


def rates_at(cfg: OptimConfig, step: int, steps_per_epoch: int) -> Rates:
    """Rates of optimiser step `step`, counted from 0.

    In warm-up the rate grows from 0 and momentum from `warmup_momentum` to where the schedule is by
    then. Under SGD the rate of biases falls from `warmup_bias_lr` instead; under AdamW, whose steps
    are as long as the rate, it grows as the others.
    """
    lr = cosine_lr(cfg, step / steps_per_epoch)
    least = min(cfg.warmup_steps, cfg.epochs * steps_per_epoch // 3)
    warmup = max(round(cfg.warmup_epochs * steps_per_epoch), least)
    if step >= warmup:
        return Rates(lr, lr, cfg.momentum)
    done = step / warmup
    start = cfg.warmup_bias_lr if cfg.optimizer == "sgd" else 0.0
    momentum = cfg.warmup_momentum + done * (cfg.momentum - cfg.warmup_momentum)
    return Rates(done * lr, start + done * (lr - start), momentum)


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Give the rates to an optimiser of `build_optimizer`."""
    for group in optimizer.param_groups:
        group["lr"] = rates.bias_lr if group["is_bias"] else rates.lr
        if "betas" in group:
            group["betas"] = (rates.momentum, group["betas"][1])
        else:
            group["momentum"] = rates.momentum
