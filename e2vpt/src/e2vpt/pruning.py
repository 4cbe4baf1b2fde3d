"""Which prompts a model can do without, and taking them out.

Paper: Han et al., E²VPT, ICCV 2023, Sec. 3.4. The importance of a token is the expected absolute
gradient of the loss with respect to a mask variable that multiplies it; of a segment likewise.
By the chain rule that gradient is <p, dL/dp>, summed over the layers that share the mask. So no
mask is needed: with the prompts of every image as leaves of their own, one backward pass per batch
gives the gradients of all images, tokens and segments.

Shapes: B batch, L layers, P visual prompts, R segments of a prompt, D width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.model import PromptedModel, PromptSpec
from e2vpt.prompts import Segments, VisualPrompts
from shared_utils.checkpoint import rng_state, set_rng_state
from shared_utils.errors import InputError

Scores = dict[str, Tensor]


class _Leaves(nn.Module):
    """Stands in for `VisualPrompts`: every image of the batch has prompts of its own."""

    def __init__(self, visual: VisualPrompts) -> None:
        super().__init__()
        self.visual = visual
        self.num_layers = visual.num_layers
        self.leaves: dict[int, Tensor] = {}

    def forward(self, layer: int, batch: int) -> Tensor:
        """(B, P, D)."""
        rows = self.visual.rows(layer).detach()
        self.leaves[layer] = rows.expand(batch, -1, -1).clone().requires_grad_()
        return self.leaves[layer]


def importance(
    model: PromptedModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_segments: int = 8,
    *,
    per_layer: bool = False,
    interleaved: bool = False,
    compat: bool = False,
) -> Scores:
    """Score visual prompts and their segments; the model, its flags and all random states stay.

    Paper: Sec. 3.4. Prompt dropout is off, no optimiser takes part, and neither the order of the
    images nor the size of the batches matters.

    Args:
        model: with visual prompts.
        loader: yields images (B, 3, H, W), normalised, and labels (B,) int64.
        num_segments: R, which divides the width of every layer.
        per_layer: score the prompts of each layer on their own; otherwise prompt k of all layers
            has one score, as one mask shared by the layers gives it.
        interleaved: dimension j belongs to segment j mod R instead of consecutive parts.
        compat: as the released code does, the mean of signed gradients instead of absolute ones.
            Near a minimum it is close to zero for every prompt and ranks noise, or, under weight
            decay, the longest prompts first. For comparison only.

    Returns: `tokens` (P,) and `segments` (P, R), means over the images, float64 on the CPU, both
        with a leading L under `per_layer`; `interleaved` () bool.

    Raises: InputError where there is nothing to score, or R does not divide a width.
    """
    visual = model.visual
    if visual is None:
        raise InputError(
            "model", "no visual prompts", "some to score", "train with num_visual_prompts > 0"
        )
    cut = Segments(num_segments, num_segments, is_interleaved=interleaved)
    for layer in model.geometry.layers[: visual.num_layers]:
        cut.check(layer.embed_dim)
    device = next(model.parameters()).device
    total: Tensor | None = None
    count = 0
    with untouched(model):
        for images, labels in loader:
            parts = _mask_gradients(model, visual, cut, images.to(device), labels.to(device))
            if not per_layer:
                parts = parts.sum(dim=1, keepdim=True)
            both = torch.cat([parts.sum(dim=-1, keepdim=True), parts], dim=-1)  # (B, L, P, 1 + R)
            summed = (both if compat else both.abs()).sum(dim=0).cpu()
            total = summed if total is None else total + summed
            count += len(labels)
    if total is None:
        raise InputError("loader", "no images", "at least one", "check the data")
    mean = total / count if per_layer else total[0] / count
    return {
        "tokens": mean[..., 0],
        "segments": mean[..., 1:],
        "interleaved": torch.tensor(interleaved),
    }


def _mask_gradients(
    model: PromptedModel, visual: VisualPrompts, cut: Segments, images: Tensor, labels: Tensor
) -> Tensor:
    """Each image's loss by each segment mask at 1: (B, L, P, R) float64."""
    probe = _Leaves(visual)
    with torch.enable_grad():
        logits = model.head(model.features_with(images, probe, model.kv))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        leaves = [probe.leaves[layer] for layer in range(probe.num_layers)]
        gradients = torch.autograd.grad(loss, leaves)
    products = (
        cut.cut(leaf.detach().double() * gradient.double()).sum(dim=-1)
        for leaf, gradient in zip(leaves, gradients, strict=True)
    )
    return torch.stack(list(products), dim=1)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards modes and random states are as they were."""
    modes, random = [(m, m.training) for m in model.modules()], rng_state()
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        set_rng_state(random)


@torch.no_grad()
def prune(
    model: PromptedModel,
    scores: Scores,
    num_tokens: int = 0,
    num_segments: int = 0,
    *,
    compat: bool = False,
) -> PromptedModel:
    """Remove the visual prompts and segments of lowest importance; the tensors shrink.

    Paper: Sec. 3.4. The cascade is two calls: tokens, then `importance` of the survivors, then
    segments. To rewind, prune the model as it was at its start with the scores of the trained one.

    Args:
        model: stays usable and unchanged.
        scores: of `importance`; they say whether segments are interleaved, and whether each layer
            is pruned on its own.
        num_tokens: visual prompts to remove from every layer.
        num_segments: segments to remove from each prompt that stays.
        compat: as the released code does: by signed scores, and set to zero instead of removed.
            A zeroed prompt still passes the layer norm, attends and costs time.

    Returns: a new model on the same frozen backbone, in the same mode.

    Raises: InputError where the scores are of another model or nothing would be left.
    """
    visual, spec = model.visual, model.spec
    if visual is None:
        raise InputError("model", "no visual prompts", "some to prune", "leave it as it is")
    tokens, segments = scores["tokens"], scores["segments"]
    per_layer = tokens.ndim == 2
    count, parts = segments.shape[-2:]
    if count != spec.num_visual_prompts or (per_layer and len(tokens) != visual.num_layers):
        raise InputError(
            "scores",
            f"shape {tuple(segments.shape)}",
            f"{visual.num_layers} layers, {spec.num_visual_prompts} prompts",
            "score this model",
        )
    _check_count("num_tokens", num_tokens, count)
    _check_count("num_segments", num_segments, parts)
    if num_segments and (visual.layout is not None or spec.prompt_dim):
        got = "prompts with a projection" if spec.prompt_dim else "prompts whose segments are cut"
        raise InputError("model", got, "whole prompts", "prune tokens only")
    is_interleaved = bool(scores["interleaved"])
    layers = range(len(tokens)) if per_layer else range(1)
    by_layer = (tokens, segments) if per_layer else (tokens[None], segments[None])
    stays = [survivors(by_layer[0][i], num_tokens) for i in layers]  # (P',) each
    kept = [_highest(by_layer[1][i][stays[i]], parts - num_segments) for i in layers]  # (P', K)
    if compat:
        return _zeroed(model, stays, kept, parts, is_interleaved)
    new = replace(
        spec,
        num_visual_prompts=count - num_tokens,
        per_layer_segments=spec.per_layer_segments or (per_layer and visual.layout is not None),
    )
    if num_segments:
        new = replace(
            new,
            num_segments=parts,
            num_kept_segments=parts - num_segments,
            interleaved_segments=is_interleaved,
            per_layer_segments=per_layer,
        )
    small = _like(model, new)
    target = cast(VisualPrompts, small.visual)
    for layer, weight in enumerate(visual.weight):
        i = layer if per_layer else 0
        rows = weight[stays[i].to(weight.device)]
        if num_segments and target.layout is not None:
            rows = target.layout.gather(rows, kept[i].to(weight.device))
        target.weight[layer].copy_(rows)
    if target.segments is not None:
        for i, chosen in enumerate(target.segments):
            j = i if per_layer else 0
            if visual.segments is None:
                chosen.copy_(kept[j])
            else:
                before = visual.segments[i if len(visual.segments) > 1 else 0]
                chosen.copy_(before[stays[j].to(before.device)])
    return small


def survivors(tokens: Tensor, num_tokens: int) -> Tensor:
    """The prompts that `prune` keeps: scores (..., P) -> int64 (..., P - num_tokens), in order."""
    return _highest(tokens, tokens.shape[-1] - num_tokens)


def _zeroed(
    model: PromptedModel, stays: list[Tensor], kept: list[Tensor], parts: int, interleaved: bool
) -> PromptedModel:
    """A model whose pruned tokens and segments are zero and stay so in training."""
    new = replace(
        model.spec,
        num_segments=parts,
        num_kept_segments=parts,
        interleaved_segments=interleaved,
        per_layer_segments=len(stays) > 1,
        zeroed=True,
    )
    other = _like(model, new)
    source, target = cast(VisualPrompts, model.visual), cast(VisualPrompts, other.visual)
    for layer, weight in enumerate(source.weight):
        target.weight[layer].copy_(weight)
    masks = cast(Tensor, target.segments).zero_()
    for i, mask in enumerate(masks):
        mask[stays[i][:, None].to(mask.device), kept[i].to(mask.device)] = 1
    return other


def _highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores along the last axis, in order; of equals the later ones."""
    return scores.argsort(dim=-1, stable=True)[..., scores.shape[-1] - count :].sort(dim=-1).values


def _check_count(name: str, value: int, available: int) -> None:
    if not 0 <= value < available:
        raise InputError(name, value, f"0 to {available - 1}, so that one is left", "lower it")


def _like(model: PromptedModel, spec: PromptSpec) -> PromptedModel:
    """A model of another spec on the same backbone; what the two have alike is copied."""
    small = PromptedModel(model.backbone, spec)
    own = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        if not name.startswith(("backbone.", "visual.weight.")):
            parameter.copy_(own[name])
    return small.train(model.training)
