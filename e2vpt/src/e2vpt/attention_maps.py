"""Where attention goes: the share of the softmax that falls on prompts, layer by layer.

Nothing in the model is changed for it. While images run through the backbone, a torch function mode
watches the one softmax of each layer's attention from outside, and computes it a second time where
torch fuses it.

Shapes: B batch, L layers, W windows of one image (1 where there are none), A patches in a window,
H heads, N queries, T key rows that are tokens of the sequence, P visual prompts, n key-value
prompts, M key rows in all, d_h width of a head.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.swin_transformer import window_partition
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from e2vpt import swin
from e2vpt.model import PromptedModel
from e2vpt.pruning import untouched
from shared_utils.errors import InputError

NAMES = ("visual", "kv", "tokens", "uniform_visual", "uniform_kv")
SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)
MAX_NUMBERS = 2**24  # probabilities held at a time


def attention_to_prompts(
    model: PromptedModel, loader: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Measure how much attention goes to prompts in each layer; model and random states stay.

    A share is the probability (softmax over all keys) that falls on rows of a kind, averaged over
    images, heads and all query tokens that are not prompts. Where the class token alone is pooled,
    it is the only query that the last layer has. In Swin the queries of all windows count, those
    that only fill a window up do not.

    Args:
        model: with prompts of either kind; a folded one's visual prompts count as such.
        loader: yields images (B, 3, H, W), normalised, and labels, which are not used.

    Returns: each (L,) float64 on the CPU, in [0, 1]:
        `visual`, `kv`: the shares of visual and of key-value prompts;
        `tokens`: that of the backbone's own tokens, so that the three sum to 1;
        `uniform_visual`, `uniform_kv`: what the prompts would get if every query spread its
        attention evenly over the keys it may see.

    Raises: InputError for a model without prompts, or no images.
    """
    if model.visual is None and model.kv is None:
        raise InputError("model", "no prompts", "some that get attention", "train with prompts")
    device = next(model.parameters()).device
    total, count = torch.zeros(model.geometry.num_layers, len(NAMES), dtype=torch.float64), 0
    with torch.no_grad(), untouched(model):
        for images, _ in loader:
            images = images.to(device)
            watch = _Watch(_layouts(model, images))
            with watch:
                model.family.prompted_features(
                    model.backbone,
                    images,
                    model.visual,
                    model.kv,
                    token_form=model.spec.token_form,
                    pool_prompts=model.spec.pool_prompts,
                )
            total += len(images) * watch.shares().cpu()
            count += len(images)
    if not count:
        raise InputError("loader", "no images", "at least one", "check the data")
    return dict(zip(NAMES, (total / count).unbind(1), strict=True))


@dataclass(frozen=True)
class _Layout:
    """What the key rows of a layer are: T tokens, P visual prompts, n key-value prompts, padding.

    Attributes:
        num_visual: P.
        num_kv: n.
        as_tokens: visual prompts are among the T tokens, and so among the queries.
        first_prompt: where they begin there; None: they are the last ones.
        is_patch: bool (W, A), False for what fills a window up; None: all queries are tokens.
        num_hidden: (W, A), keys that a query does not see in a shifted window; None: it sees all.
    """

    num_visual: int
    num_kv: int
    as_tokens: bool
    first_prompt: int | None
    is_patch: Tensor | None = None
    num_hidden: Tensor | None = None

    def shares(self, chunks: Iterable[Tensor], padding: int) -> Tensor:
        """Average the probabilities of one call.

        Args:
            chunks: together (B·W, H, N, M), windows ordered by image first.
            padding: the last so many of the M rows are none.

        Returns: (5,) float64, in the order of `NAMES`.
        """
        num_rows = num_queries = num_tokens = first = 0
        parts = []
        for chunk in chunks:
            num_queries, num_rows = chunk.shape[-2], chunk.shape[-1] - padding
            behind = self.num_kv + (0 if self.as_tokens else self.num_visual)
            num_tokens = num_rows - behind
            first = num_tokens
            if self.as_tokens:
                last = num_tokens - self.num_visual
                first = last if self.first_prompt is None else self.first_prompt
            p = chunk.mean(dim=1, dtype=torch.float64)  # (b, N, M)
            visual = p[..., first : first + self.num_visual].sum(-1)
            tokens = p[..., :num_tokens].sum(-1)
            kv = p[..., num_rows - self.num_kv : num_rows].sum(-1)
            parts.append(torch.stack([visual, kv, tokens - visual * self.as_tokens], dim=-1))
        masses = torch.cat(parts)  # (B·W, N, 3)
        device = masses.device
        windows = 1 if self.is_patch is None else len(self.is_patch)
        weights = torch.ones(windows, num_queries, dtype=torch.float64, device=device)
        visible = weights * num_rows
        if self.is_patch is not None:
            weights[:, : self.is_patch.shape[1]] = self.is_patch.to(device, torch.float64)
        if self.num_hidden is not None:
            visible[:, : self.num_hidden.shape[1]] -= self.num_hidden.to(device)
        if self.as_tokens and num_queries == num_tokens:
            weights[:, first : first + self.num_visual] = 0
        weights /= weights.sum()
        mean = (masses.unflatten(0, (-1, windows)).mean(dim=0) * weights[..., None]).sum((0, 1))
        even = (weights / visible).sum()
        return torch.cat([mean, torch.stack([self.num_visual * even, self.num_kv * even])])


def _layouts(model: PromptedModel, images: Tensor) -> list[_Layout]:
    """The key rows of each layer, by the rules of `vit.run_blocks` and `swin.prompted_features`."""
    spec, visual, num_layers = model.spec, model.visual, model.geometry.num_layers
    last = num_layers - 1
    is_swin = type(model.backbone) in swin.CLASSES
    windows = _windows(model.backbone, images) if is_swin else [{}] * num_layers
    carried = visual is not None and visual.num_layers == 1 and last > 0  # shallow
    counts = [0] * num_layers
    for i in range(0 if model.kv is None else model.kv.num_layers):
        counts[i] = model.kv(i)[0].shape[-2] if model.kv is not None else 0
    folded = spec.num_visual_prompts if spec.folded else 0  # in front of a layer's other rows
    return [
        _Layout(
            num_visual=folded if visual is None else spec.num_visual_prompts,
            num_kv=counts[i] - folded,
            as_tokens=visual is not None
            and (spec.token_form or carried or (spec.pool_prompts and i == last)),
            first_prompt=None if is_swin else model.geometry.num_prefix_tokens,
            **windows[i],
        )
        for i in range(num_layers)
    ]


def _windows(backbone: Any, images: Tensor) -> list[dict[str, Tensor | None]]:
    """`is_patch` and `num_hidden` of each block of a Swin transformer."""
    size = tuple(backbone.patch_embed.dynamic_feat_size(images.shape[-2:]))
    found: list[dict[str, Tensor | None]] = []
    for stage in backbone.layers:
        if type(stage.downsample) is not nn.Identity:
            size = (-(-size[0] // 2), -(-size[1] // 2))
        for block in stage.blocks:
            height, width = block.window_size
            ones = F.pad(torch.ones(1, *size, 1), (0, 0, 0, -size[1] % width, 0, -size[0] % height))
            mask = block.get_attn_mask(ones)  # (W, A, A), 0 where a query sees a key
            found.append(
                {
                    "is_patch": window_partition(ones, block.window_size).flatten(1) > 0,
                    "num_hidden": None if mask is None else (mask != 0).sum(-1),
                }
            )
    return found


class _Watch(TorchFunctionMode):
    """Watches the attention of one batch; every call gives what it gives without."""

    def __init__(self, layouts: list[_Layout]) -> None:
        super().__init__()
        self.layouts = layouts
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass the call on, and look at it where it is one of attention."""
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            with torch.autocast(out.device.type, enabled=False):
                self._add(_probabilities(*args, **(kwargs or {})), _num_padding(kwargs or {}))
        elif func in SOFTMAX:
            # In low precision the rounded weights of a query do not sum to 1.
            dtype = torch.promote_types(out.dtype, torch.float32)
            self._add([out if dtype == out.dtype else args[0].to(dtype).softmax(dim=-1)], 0)
        return out

    def _add(self, chunks: Iterable[Tensor], padding: int) -> None:
        if len(self.found) == len(self.layouts):
            raise RuntimeError(f"attention: got more calls than {len(self.layouts)} layers")
        self.found.append(self.layouts[len(self.found)].shares(chunks, padding))

    def shares(self) -> Tensor:
        """(L, 5), in the order of `NAMES`, after a pass through the whole backbone."""
        if len(self.found) != len(self.layouts):
            raise RuntimeError(
                f"attention: got {len(self.found)} calls, expected {len(self.layouts)}"
            )
        return torch.stack(self.found)


def _probabilities(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Iterator[Tensor]:
    """The softmax inside a call of torch's attention, in float32 or better, some samples at a time.

    Args:
        q: (B·W, H, N, d_h).
        k: (B·W, H, M, d_h).
        v: not used.
        attn_mask: added to the logits, (1 or B·W, 1 or H, 1 or N, M), or None.
        dropout_p: not used, 0 in evaluation.
        scale: factor of the logits; None: 1 / sqrt(d_h).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    step = max(1, MAX_NUMBERS // (q.shape[1] * q.shape[2] * k.shape[2]))
    for start in range(0, len(q), step):
        part = slice(start, start + step)
        logits = (q[part].to(dtype) * factor) @ k[part].to(dtype).transpose(-2, -1)
        if attn_mask is not None:
            logits += attn_mask if len(attn_mask) == 1 else attn_mask[part]
        yield logits.softmax(dim=-1)


def _num_padding(kwargs: dict[str, Any]) -> int:
    """How many key rows `attend` has appended, which its mask hides from every query."""
    mask = kwargs.get("attn_mask")
    if mask is None:
        return 0
    return int(torch.isneginf(mask).flatten(0, -2).all(dim=0).sum())
