"""Optimisers over what is trainable, and learning-rate schedules as plain functions."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from shared_utils.errors import InputError

OptimizerName = Literal["sgd", "adamw"]
PretrainOptimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "per-epoch", "trapezoid"]

COOLDOWN_SHARE = 0.35  # of a trapezoid's steps: the linear descent to 0


def build_optimizer(
    name: OptimizerName,
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over the trainable parameters.

    Decay applies to prompts, key-value prompts and weights of two or more dimensions, not to
    biases and norms. Paper's code: decay on prompts and head weight, none on the head bias.

    Args:
        name: `sgd` or `adamw`.
        parameters: names and parameters; frozen ones are left out.
        lr: peak learning rate.
        weight_decay: factor of the L2 term (SGD) or of the decoupled decay (AdamW).
        momentum: for SGD.
    """
    trainable = [(n, p) for n, p in parameters if p.requires_grad]
    if not trainable:
        raise InputError("parameters", "none that train", "at least one", "choose another method")
    decayed = [p for _, p in trainable if p.ndim >= 2]
    plain = [p for _, p in trainable if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    return torch.optim.AdamW(groups, lr=lr)


def build_muon(
    parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Muon for the hidden matrices and convolutions, NAdamW for the rest, by timm.

    Muon moves a matrix along its momentum with all singular values set near 1 (Jordan et al.,
    kellerjordan.github.io/posts/muon); timm scales that step to AdamW's usual size (Liu et al.,
    arXiv 2502.16982), so that one rate serves both. The rest: the classifier (parameters named
    `head...`), embeddings, norms and biases; norms and biases are not decayed.

    Args:
        parameters: names and parameters, all trainable.
        lr: peak learning rate of all.
        weight_decay: factor of the decoupled decay.
    """
    from timm.optim import Muon  # here: it takes a second, and `--help` imports this module

    hidden, other, plain = [], [], []
    for name, parameter in parameters:
        if parameter.ndim in (2, 4) and not name.startswith("head"):
            hidden.append(parameter)
        elif parameter.ndim >= 2:
            other.append(parameter)
        else:
            plain.append(parameter)
    # Checkpoints hold the moments by position: these groups stay in this order.
    groups: list[dict[str, Any]] = [
        {"params": hidden},
        {"params": other, "use_fallback": True},
        {"params": plain, "use_fallback": True, "weight_decay": 0.0},
    ]
    return Muon(groups, lr=lr, weight_decay=weight_decay, nesterov=True, betas=(0.9, 0.95))


def lr_at(
    step: int,
    *,
    schedule: Schedule,
    peak: float,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float,
) -> float:
    """The learning rate of optimiser step `step` (counted from 0).

    - `cosine`: linear warm-up, then a half cosine to 0, both per step.
    - `per-epoch`: the same once per epoch as the paper's code has it, so that epoch 0 of a run
      with warm-up has rate 0 and trains nothing (parity only).
    - `trapezoid`: linear warm-up, flat, then linear to 0 over the last 35 % of the steps; until
      the descent begins such a run can be made longer without starting again.
    """
    unit: float
    if schedule == "per-epoch":
        unit, warmup, total = step // steps_per_epoch, warmup_epochs, float(epochs)
        if unit < warmup:
            return peak * unit / warmup
    else:
        unit, warmup, total = step, warmup_epochs * steps_per_epoch, float(epochs * steps_per_epoch)
        if schedule == "trapezoid":
            descent = max(total - unit, 0.0) / (COOLDOWN_SHARE * total)
            return peak * min(1.0, (unit + 1) / (warmup + 1), descent)
        if unit < warmup:
            return peak * (unit + 1) / (warmup + 1)
    done = min((unit - warmup) / max(total - warmup, 1), 1.0)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
