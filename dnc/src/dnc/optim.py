"""Optimisers, and learning rates as a plain function of the step."""

import math
from typing import Any

import torch
from torch import nn

from dnc.config import OptimConfig

POSITIONS = ("pos_embed", "position_bias_table", "cls_token")


def build_optimizer(cfg: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 or AdamW.

    With `decay_norms` off, norms, biases and position tables are not decayed.
    """
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        is_plain = parameter.ndim < 2 or name.endswith(POSITIONS)
        (plain if is_plain and not cfg.decay_norms else decayed).append(parameter)
    every: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in every if group["params"]]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=cfg.lr,
            momentum=0.9,
            weight_decay=cfg.weight_decay,
            nesterov=cfg.nesterov,
        )
    return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay)


def lr_at(cfg: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimiser step `step`, counted from 0: warm-up, then the schedule."""
    epoch = step // steps_per_epoch
    warmup = cfg.warmup_epochs * steps_per_epoch
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    if cfg.schedule == "step":
        return cfg.lr * cfg.gamma ** sum(epoch >= at for at in cfg.milestones)
    if cfg.schedule == "exponential":
        return cfg.lr * cfg.gamma**epoch
    done = (step - warmup) / max(cfg.epochs * steps_per_epoch - warmup, 1)
    low = cfg.lr * cfg.final_lr
    return low + (cfg.lr - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
