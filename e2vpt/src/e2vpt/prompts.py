"""The two kinds of prompts: visual tokens, and key-value rows inside attention.

Paper: Han et al., E²VPT, ICCV 2023, Sec. 3 (arXiv 2307.13770). Written from a specification, not
from the authors' code (CC-BY-NC).

Each layer has tensors of its own, because layers may differ in width (Swin).
Shapes: B batch, L layers, P visual prompts, R segments of a prompt, K segments kept of them,
n key-value prompts, H heads, D width, d_h = D / H.
"""

import math
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.config import KVInit
from e2vpt.geometry import Geometry
from shared_utils.errors import InputError

PATCH_INIT_WIDTH = 16  # width in the bound of init "patch"; a constant of the paper's code


class VisualRows(Protocol):
    """Where a backbone gets its visual prompts from: `VisualPrompts`, or what stands in for it."""

    @property
    def num_layers(self) -> int:
        """Layers with prompts of their own; 1 where they are shallow."""

    def __call__(self, layer: int, batch: int) -> Tensor:
        """(1 or B, P, D)."""


class KeyValueRows(Protocol):
    """Where a backbone gets its key-value rows from."""

    @property
    def num_layers(self) -> int:
        """Layers that have rows: the first ones."""

    @property
    def mask(self) -> Tensor | None:
        """False for rows that an image does not have, bool (B, n); None where all have all."""

    def __call__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each (H, n, d_h), or (B, H, n, d_h) where images differ."""


class VisualPrompts(nn.Module):
    """Learned tokens, P for each prompted layer; pruned segments are not stored.

    Attributes:
        weight: per layer (P, D); where segments were pruned, the kept ones, (P, K, D / R).
        segments: int16 (1 or L, P, K), which segments `weight` holds, for all layers or for each;
            None where nothing was pruned. Where prompts were set to zero instead of removed,
            (1 or L, P, R), 1 for what is left and 0 for the rest.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_prompts: int,
        *,
        patch_size: int,
        dropout: float = 0.1,
        prompt_dim: int = 0,
        segments: "Segments | None" = None,
    ) -> None:
        """Initialise from U(-v, v), v = sqrt(6 / (3 patch_size² + width)) (paper's code).

        The width is the first layer's, for all layers.

        Args:
            widths: D of each layer with prompts of its own (one: shallow).
            num_prompts: P.
            patch_size: of the backbone, in pixels; it sets the init range.
            dropout: share of values dropped while training, anew for each sample.
            prompt_dim: width before one learned projection that all layers share (0: none).
            segments: how prompts were pruned; None for whole ones.

        Raises: InputError where layers of different widths are to share a projection, or R does
            not divide a width.
        """
        super().__init__()
        if prompt_dim and len(set(widths)) > 1:
            raise InputError(
                "prompt_dim",
                f"{prompt_dim} on layers of widths {', '.join(map(str, sorted(set(widths))))}",
                "layers of one width",
                "leave it out",
            )
        bound = math.sqrt(6 / (3 * patch_size**2 + (prompt_dim or widths[0])))
        rows = [torch.empty(num_prompts, prompt_dim or width) for width in widths]
        self.layout = segments
        self.segments: Tensor | None
        self.register_buffer("segments", None)
        if segments is not None:
            for width in widths:
                segments.check(width)
            masks = len(widths) if segments.per_layer else 1
            kept = torch.arange(segments.num_kept, dtype=torch.int16)
            if segments.is_zeroed:
                kept = torch.ones_like(kept)
            else:
                rows = [
                    row.new_empty(num_prompts, segments.num_kept, width // segments.num_segments)
                    for row, width in zip(rows, widths, strict=True)
                ]
            self.segments = kept.repeat(masks, num_prompts, 1)
        self.weight = nn.ParameterList([row.uniform_(-bound, bound) for row in rows])
        self.project: nn.Module = nn.Identity()
        if prompt_dim:
            project = nn.Linear(prompt_dim, widths[0])
            nn.init.kaiming_normal_(project.weight, mode="fan_out")
            nn.init.zeros_(project.bias)
            self.project = project
        self.dropout = dropout

    @property
    def num_layers(self) -> int:
        """Layers with prompts of their own; 1 where they are shallow."""
        return len(self.weight)

    def rows(self, layer: int) -> Tensor:
        """The prompts of one layer in full width, (P, D); pruned segments are 0."""
        weight: Tensor = self.weight[layer]
        if self.layout is not None and self.segments is not None:
            kept = self.segments[layer if self.layout.per_layer else 0].long()
            if self.layout.is_zeroed:
                weight = self.layout.join(self.layout.cut(weight) * kept[..., None])
            else:
                weight = self.layout.spread(weight, kept)
        return cast(Tensor, self.project(weight))

    def forward(self, layer: int, batch: int) -> Tensor:
        """The prompts of one layer: (1, P, D), or (B, P, D) where dropout makes samples differ."""
        rows = self.rows(layer)[None]
        if self.training and self.dropout:
            rows = F.dropout(rows.expand(batch, -1, -1), self.dropout)
        return rows


class Segments:
    """How the width of a prompt is cut into R segments, K of which are kept.

    Paper: Sec. 3.4; equal consecutive parts. The released code tiles its mask instead, so that
    dimension j belongs to segment j mod R (`is_interleaved`).
    """

    def __init__(
        self,
        num_segments: int,
        num_kept: int,
        *,
        is_interleaved: bool = False,
        per_layer: bool = False,
        is_zeroed: bool = False,
    ) -> None:
        """Describe a cut.

        Args:
            num_segments: R.
            num_kept: K, segments that each prompt still has.
            is_interleaved: dimension j belongs to segment j mod R.
            per_layer: each layer keeps segments of its own.
            is_zeroed: nothing is removed; what is pruned is zero, as in the released code.
        """
        self.num_segments, self.num_kept = num_segments, num_kept
        self.is_interleaved, self.per_layer = is_interleaved, per_layer
        self.is_zeroed = is_zeroed

    def check(self, width: int) -> None:
        """Raise InputError where R does not divide a width."""
        if width % self.num_segments:
            raise InputError(
                "num_segments",
                self.num_segments,
                f"a divisor of the width {width}",
                "choose another number",
            )

    def cut(self, rows: Tensor) -> Tensor:
        """(..., D) -> (..., R, D / R)."""
        if self.is_interleaved:
            return rows.reshape(*rows.shape[:-1], -1, self.num_segments).transpose(-1, -2)
        return rows.reshape(*rows.shape[:-1], self.num_segments, -1)

    def join(self, parts: Tensor) -> Tensor:
        """(..., R, D / R) -> (..., D), the inverse of `cut`."""
        if self.is_interleaved:
            parts = parts.transpose(-1, -2)
        return parts.flatten(-2)

    def gather(self, rows: Tensor, kept: Tensor) -> Tensor:
        """Take the kept segments: (P, D) and int64 (P, K) -> (P, K, D / R)."""
        parts = self.cut(rows)
        return parts.gather(-2, kept[..., None].expand(*kept.shape, parts.shape[-1]))

    def spread(self, weight: Tensor, kept: Tensor) -> Tensor:
        """Put kept segments back: (P, K, D / R) and int64 (P, K) -> (P, D), 0 elsewhere."""
        count, _, size = weight.shape
        parts = weight.new_zeros(count, self.num_segments, size)
        return self.join(parts.scatter(-2, kept[..., None].expand_as(weight), weight))


class KeyValuePrompts(nn.Module):
    """Learned rows of the key and value matrices, n for each layer and head; queries get none.

    They enter after the projections (and key norm) and carry no bias and no position.

    Attributes:
        key: per layer (H, n, d_h).
        value: the same, or None where keys serve as values too.
    """

    def __init__(
        self,
        geometry: Geometry,
        counts: Sequence[int],
        *,
        share: bool = True,
        init: KVInit = "kaiming",
    ) -> None:
        """Initialise every layer on its own.

        Args:
            geometry: heads of each layer, and the patch size for init `patch`.
            counts: n of each of the first layers; layers beyond get no rows.
            share: one tensor for keys and values (the released default), or two.
            init: `kaiming` U(±sqrt(6 / (n d_h))), `trunc-normal` with std 0.02, or `patch`
                U(±sqrt(6 / (3 patch_size² + 16))).
        """
        super().__init__()

        def rows() -> nn.ParameterList:
            return nn.ParameterList(
                _init_rows(
                    torch.empty(layer.num_heads, count, layer.head_dim), init, geometry.patch_size
                )
                for layer, count in zip(geometry.layers, counts, strict=False)
            )

        self.key = rows()
        self.value = None if share else rows()

    mask = None  # every image has all rows

    @property
    def num_layers(self) -> int:
        """Layers that have rows: the first ones."""
        return len(self.key)

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (H, n, d_h)."""
        key: Tensor = self.key[layer]
        value: Tensor = key if self.value is None else self.value[layer]
        return key, value


def _init_rows(rows: Tensor, init: KVInit, patch_size: int) -> Tensor:
    _, num_prompts, head_dim = rows.shape
    if init == "trunc-normal":
        return nn.init.trunc_normal_(rows, std=0.02)
    if init == "kaiming":
        bound = math.sqrt(6 / (num_prompts * head_dim))
    elif init == "patch":
        bound = math.sqrt(6 / (3 * patch_size**2 + PATCH_INIT_WIDTH))
    else:
        raise InputError("kv_init", repr(init), "kaiming, trunc-normal or patch", "correct it")
    return rows.uniform_(-bound, bound)
