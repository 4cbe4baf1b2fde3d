"""The averaged network, which is evaluated and saved: it follows the trained one ever more slowly.

The released code's training is not known; decay and its start are those of YOLOv7.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

from yolop_mtl.model import YOLOPv2

START = 2000  # updates in which the decay comes within a factor 1 - 1/e of its end


def ema_decay(updates: int, decay: float = 0.9999) -> float:
    """The share of the average that stays in update number `updates`, counted from 1."""
    return decay * (1 - math.exp(-updates / START))


class ModelEma:
    """An exponential average of weights and running statistics.

    Attributes:
        model: the averaged network, in eval mode, without gradients.
        updates: how many there were.
    """

    def __init__(self, model: YOLOPv2, *, decay: float = 0.9999) -> None:
        """Start as a copy of `model`, on its device; a decay of 0 is no average, but a copy."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards `model`, a network of the same form."""
        self.updates += 1
        follow = 1 - ema_decay(self.updates, self.decay)
        own, other = self.model.state_dict(), model.state_dict()
        floats = [name for name, tensor in own.items() if tensor.is_floating_point()]
        # Towards an equal value a lerp does not move at all: anchors stay as they are.
        torch._foreach_lerp_([own[n] for n in floats], [other[n] for n in floats], follow)
        for name in own.keys() - set(floats):
            own[name].copy_(other[name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
