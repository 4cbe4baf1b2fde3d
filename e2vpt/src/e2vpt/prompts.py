"""The two kinds of prompts: visual tokens, and key-value rows inside attention.

Paper: Han et al., E²VPT, ICCV 2023, Sec. 3 (arXiv 2307.13770). Written from a specification, not
from the authors' code (CC-BY-NC).

Shapes: B batch, L layers, P visual prompts, n key-value prompts, H heads, D width, d_h = D / H.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.config import KVInit
from shared_utils.errors import InputError

PATCH_INIT_WIDTH = 16  # width in the bound of init "patch"; a constant of the paper's code


class VisualPrompts(nn.Module):
    """Learned tokens, P for each prompted layer."""

    def __init__(
        self,
        num_layers: int,
        num_prompts: int,
        embed_dim: int,
        *,
        patch_size: int,
        dropout: float = 0.1,
        prompt_dim: int = 0,
    ) -> None:
        """Initialise from U(-v, v), v = sqrt(6 / (3 patch_size² + width)) (paper's code).

        Args:
            num_layers: layers with prompts of their own (1: shallow).
            num_prompts: P.
            embed_dim: D.
            patch_size: of the backbone, in pixels; it sets the init range.
            dropout: share of values dropped while training, anew for each sample.
            prompt_dim: width before one learned projection that all layers share (0: none).
        """
        super().__init__()
        width = prompt_dim or embed_dim
        bound = math.sqrt(6 / (3 * patch_size**2 + width))
        self.weight = nn.Parameter(
            torch.empty(num_layers, num_prompts, width).uniform_(-bound, bound)
        )
        self.project: nn.Module = nn.Identity()
        if prompt_dim:
            project = nn.Linear(prompt_dim, embed_dim)
            nn.init.kaiming_normal_(project.weight, mode="fan_out")
            nn.init.zeros_(project.bias)
            self.project = project
        self.dropout = dropout

    def forward(self, layer: int, batch: int) -> Tensor:
        """The prompts of one layer: (1, P, D), or (B, P, D) where dropout makes samples differ."""
        rows: Tensor = self.project(self.weight[layer])[None]
        if self.training and self.dropout:
            rows = F.dropout(rows.expand(batch, -1, -1), self.dropout)
        return rows


class KeyValuePrompts(nn.Module):
    """Learned rows of the key and value matrices, n for each layer and head; queries get none.

    They enter after the projections (and key norm) and carry no bias and no position.
    """

    def __init__(
        self,
        num_layers: int,
        num_prompts: int,
        num_heads: int,
        head_dim: int,
        *,
        share: bool = True,
        init: KVInit = "kaiming",
        patch_size: int = 16,
    ) -> None:
        """Initialise every layer on its own.

        Args:
            num_layers: L; layers beyond get no rows.
            num_prompts: n.
            num_heads: H.
            head_dim: d_h.
            share: one tensor for keys and values (the released default), or two.
            init: `kaiming` U(±sqrt(6 / (n d_h))), `trunc-normal` with std 0.02, or `patch`
                U(±sqrt(6 / (3 patch_size² + 16))).
            patch_size: of the backbone, in pixels; for init `patch` only.
        """
        super().__init__()
        shape = (num_layers, num_heads, num_prompts, head_dim)
        self.key = nn.Parameter(_init_rows(torch.empty(shape), init, patch_size))
        self.value = (
            None if share else nn.Parameter(_init_rows(torch.empty(shape), init, patch_size))
        )

    @property
    def num_layers(self) -> int:
        """Layers that have rows: the first ones."""
        return self.key.shape[0]

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (H, n, d_h)."""
        key = self.key[layer]
        return key, key if self.value is None else self.value[layer]


def _init_rows(rows: Tensor, init: KVInit, patch_size: int) -> Tensor:
    _, _, num_prompts, head_dim = rows.shape
    if init == "trunc-normal":
        return nn.init.trunc_normal_(rows, std=0.02)
    if init == "kaiming":
        bound = math.sqrt(6 / (num_prompts * head_dim))
    elif init == "patch":
        bound = math.sqrt(6 / (3 * patch_size**2 + PATCH_INIT_WIDTH))
    else:
        raise InputError("kv_init", repr(init), "kaiming, trunc-normal or patch", "correct it")
    return rows.uniform_(-bound, bound)
