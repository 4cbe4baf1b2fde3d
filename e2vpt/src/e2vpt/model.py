"""Put prompts and a head on a frozen backbone, count what trains, save it, and take it off again.

Paper: Han et al., E²VPT, ICCV 2023 (arXiv 2307.13770).
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from e2vpt import adapters
from e2vpt.config import Adapter, BackboneTrains, KVInit
from e2vpt.families import Family, family_of
from e2vpt.prompts import KeyValuePrompts, KeyValueRows, Segments, VisualPrompts, VisualRows
from shared_utils.errors import InputError

PARITY_HEAD_BIAS = -math.log(99)  # a prior of 0.01 per class


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """What is put on a backbone; enough to build the same module again."""

    num_classes: int
    num_visual_prompts: int = 10
    num_kv_prompts: int = 5
    deep: bool = True
    share_kv: bool = True
    kv_deep: bool = True
    kv_init: KVInit = "kaiming"
    prompt_dropout: float = 0.1
    prompt_dim: int = 0
    pool_prompts: bool = False
    token_form: bool = False
    parity_head: bool = False
    backbone_trains: BackboneTrains = "none"
    partial_blocks: int = 1
    adapter: Adapter = "none"
    adapter_dim: int = 8
    adapter_scale: float = 1.0
    num_segments: int = 1
    num_kept_segments: int = 1
    interleaved_segments: bool = False
    per_layer_segments: bool = False
    zeroed: bool = False
    folded: bool = False

    def __post_init__(self) -> None:
        """Check what does not depend on the backbone."""
        if self.num_classes < 1:
            raise InputError("num_classes", self.num_classes, "1 or more", "correct it")
        for name in ("num_visual_prompts", "num_kv_prompts"):
            if getattr(self, name) < 0:
                raise InputError(name, getattr(self, name), "0 or more", "correct it")
        if self.prompt_dim < 0:
            raise InputError("prompt_dim", self.prompt_dim, "0 or more", "correct it")
        if not 0 <= self.prompt_dropout < 1:
            raise InputError("prompt_dropout", self.prompt_dropout, "0 <= p < 1", "correct it")
        if self.kv_init not in get_args(KVInit):
            raise InputError(
                "kv_init", repr(self.kv_init), "kaiming, trunc-normal or patch", "correct it"
            )
        adapters.check_spec(self)
        if not 1 <= self.num_kept_segments <= self.num_segments:
            raise InputError(
                "num_kept_segments",
                self.num_kept_segments,
                f"1 to num_segments ({self.num_segments})",
                "correct it",
            )

    @property
    def segments(self) -> Segments | None:
        """How visual prompts were pruned inside; None for whole ones."""
        if self.num_kept_segments == self.num_segments and not self.zeroed:
            return None
        return Segments(
            self.num_segments,
            self.num_kept_segments,
            is_interleaved=self.interleaved_segments,
            per_layer=self.per_layer_segments,
            is_zeroed=self.zeroed,
        )

    def key_value_rows(self, num_layers: int) -> list[int]:
        """How many rows the first layers have, folded visual prompts among them."""
        own = self.num_kv_prompts
        folded = self.num_visual_prompts if self.folded else 0
        counts = [folded + (own if self.kv_deep or i == 0 else 0) for i in range(num_layers)]
        return counts[: sum(count > 0 for count in counts)]

    def dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass
class _Before:
    """How the backbone was when it was taken: its head, and each part's flags."""

    head: nn.Module
    trains: dict[str, bool]
    modes: dict[str, bool]


class PromptedModel(nn.Module):
    """A frozen backbone with visual prompts, key-value prompts and a linear head.

    Build it with `prompt`; `remove` gives the backbone back as it was.
    """

    def __init__(self, backbone: nn.Module, spec: PromptSpec) -> None:
        """Take over `backbone`: its classifier is put aside and its parameters are frozen."""
        super().__init__()
        self.geometry = family_of(backbone).check_supported(backbone)
        self.spec = spec
        if spec.pool_prompts and cast(Any, backbone).global_pool == "token":
            raise InputError(
                "pool_prompts",
                "True on a backbone that pools its class token",
                "average pooling",
                "leave it off",
            )
        trains = adapters.trainable_names(backbone, spec.backbone_trains, spec.partial_blocks)
        adapters.require_free(backbone, spec.adapter)
        adapters.check_adaptable(backbone, spec.adapter)
        g = self.geometry
        self.backbone: Any
        self.backbone = backbone
        # The head is put aside, not kept as a submodule: it neither counts nor moves nor saves.
        # The record stays with the backbone, which several models may share.
        if not hasattr(backbone, "_before_prompts"):
            self.backbone._before_prompts = _Before(
                head=backbone.get_submodule(self.family.CLASSIFIER),
                trains={n: p.requires_grad for n, p in backbone.named_parameters()},
                modes={n: m.training for n, m in backbone.named_modules()},
            )
            backbone.set_submodule(self.family.CLASSIFIER, nn.Identity())
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name in trains)
        adapters.attach(backbone, spec.adapter, spec.adapter_dim, spec.adapter_scale)
        self.visual = None
        if spec.num_visual_prompts and not spec.folded:
            self.visual = VisualPrompts(
                [layer.embed_dim for layer in g.layers[: None if spec.deep else 1]],
                spec.num_visual_prompts,
                patch_size=g.patch_size,
                dropout=spec.prompt_dropout,
                prompt_dim=spec.prompt_dim,
                segments=spec.segments,
            )
        self.kv = None
        counts = spec.key_value_rows(g.num_layers)
        if counts:
            self.kv = KeyValuePrompts(
                g, counts, share=spec.share_kv and not spec.folded, init=spec.kv_init
            )
        self.head = nn.Linear(cast(Any, backbone).head_hidden_size, spec.num_classes)
        if spec.parity_head:
            nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
            nn.init.constant_(self.head.bias, PARITY_HEAD_BIAS)
        else:
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)
        weight = next(backbone.parameters())
        self.to(weight.device, weight.dtype)
        self.train(self.training)

    @property
    def family(self) -> Family:
        """The code for this kind of backbone; not kept, because a module cannot be copied."""
        return family_of(self.backbone)

    def train(self, mode: bool = True) -> "PromptedModel":
        """Set the mode of prompts and head; a frozen backbone stays in eval mode."""
        super().train(mode)
        self.backbone.train(mode and self.spec.backbone_trains == "full")
        return self

    def features(self, images: Tensor) -> Tensor:
        """Pooled features the head sees: (B, 3, H, W) float -> (B, D)."""
        return self.features_with(images, self.visual, self.kv)

    def features_with(
        self, images: Tensor, visual: VisualRows | None, kv: KeyValueRows | None
    ) -> Tensor:
        """The same with other prompts than the model's own."""
        if visual is None and kv is None:
            tokens = self.backbone.forward_features(images)
        else:
            tokens = self.family.prompted_features(
                self.backbone,
                images,
                visual,
                kv,
                token_form=self.spec.token_form,
                pool_prompts=self.spec.pool_prompts,
            )
        pooled: Tensor = self.backbone.forward_head(tokens, pre_logits=True)
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Logits: (B, 3, H, W) float, normalised for the backbone -> (B, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def prompt(
    backbone: nn.Module,
    num_classes: int,
    num_visual_prompts: int = 10,
    num_kv_prompts: int = 5,
    *,
    deep: bool = True,
    share_kv: bool = True,
    kv_deep: bool = True,
    kv_init: KVInit = "kaiming",
    prompt_dropout: float = 0.1,
    prompt_dim: int = 0,
    pool_prompts: bool = False,
    token_form: bool = False,
    parity_head: bool = False,
) -> PromptedModel:
    """Put E²VPT's prompts and a new linear head on a timm backbone and freeze the rest.

    Paper: Sec. 3. Differs from the paper: patches only are averaged where the backbone pools by
    average, because a prompt's output describes no image content (`pool_prompts` restores it);
    the head starts near zero instead of from Kaiming noise (`parity_head` restores it).

    Args:
        backbone: timm `VisionTransformer`, `SwinTransformer` or `SwinTransformerV2`; it is taken
            over until `remove` gives it back.
        num_classes: outputs of the head.
        num_visual_prompts: P, tokens per layer (`deep`) or in the first layer; 0 for none.
        num_kv_prompts: n, key and value rows per layer and head; 0 for none.
        deep: prompts of their own in each layer; otherwise the first layer's run through all.
        share_kv: one tensor for keys and values.
        kv_deep: key-value prompts in every layer; otherwise in the first one only.
        kv_init: `kaiming`, `trunc-normal` or `patch`, see `KeyValuePrompts`.
        prompt_dropout: share of the visual prompts' values dropped in training, per sample.
        prompt_dim: width of the visual prompts before a learned projection (0: none).
        pool_prompts: average the last layer's prompts too (average pooling only).
        token_form: run deep prompts as tokens through whole blocks; same output, slower.
        parity_head: initialise the head as the paper's code does.

    Raises: InputError for a class of backbone or attention that is not known.
    """
    spec = PromptSpec(
        num_classes=num_classes,
        num_visual_prompts=num_visual_prompts,
        num_kv_prompts=num_kv_prompts,
        deep=deep,
        share_kv=share_kv,
        kv_deep=kv_deep,
        kv_init=kv_init,
        prompt_dropout=prompt_dropout,
        prompt_dim=prompt_dim,
        pool_prompts=pool_prompts,
        token_form=token_form,
        parity_head=parity_head,
    )
    return PromptedModel(backbone, spec)


def remove(model: PromptedModel) -> nn.Module:
    """Take prompts or adapters off: the backbone with its own head, flags and modes, bit-equal.

    Weights of its own that were tuned (`full`, `partial`, `bias`) stay tuned. The model must not be
    used any more.
    """
    if not hasattr(model, "backbone"):
        raise InputError(
            "model", "one whose prompts were removed", "a prompted one", "build another"
        )
    backbone = model.backbone
    del model.backbone
    before: _Before | None = getattr(backbone, "_before_prompts", None)
    if before is not None:  # None: given back already through another model that shared it
        del backbone._before_prompts
        adapters.detach(backbone)
        weight = next(backbone.parameters())
        head = before.head.to(weight.device, weight.dtype)
        backbone.set_submodule(family_of(backbone).CLASSIFIER, head)
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(before.trains.get(name, True))
        for name, module in backbone.named_modules():
            module.training = before.modes.get(name, module.training)
    return cast(nn.Module, backbone)


def parameter_report(model: PromptedModel) -> dict[str, float]:
    """Count parameters from the live module.

    Returns: `visual` (with the projection, if any), `kv`, `adapters`, `head`, `backbone` (what
        trains of its own), `tuned` (their sum), `total` (frozen backbone included, its own
        classifier not) and `percent`, 100 * tuned / total. Paper: the head counts on both sides.
    """

    def count(module: nn.Module | None, trains_only: bool = True) -> int:
        if module is None:
            return 0
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trains_only)

    added = adapters.num_adapter_parameters(model.backbone)
    parts = {
        "visual": count(model.visual),
        "kv": count(model.kv),
        "adapters": added,
        "head": count(model.head),
        "backbone": count(model.backbone) - added,
    }
    tuned, total = sum(parts.values()), count(model, trains_only=False)
    return {**parts, "tuned": tuned, "total": total, "percent": 100 * tuned / total}


def tuned_state(model: PromptedModel) -> dict[str, Tensor]:
    """What was trained, by name, and which segments were kept of pruned prompts. No copies.

    Buffers too where the whole backbone trains.
    """
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if model.visual is not None and model.visual.segments is not None:
        state["visual.segments"] = model.visual.segments
    if model.spec.backbone_trains == "full":
        state |= {n: b.detach() for n, b in model.named_buffers()}
    return state


def with_token_form(model: PromptedModel, token_form: bool) -> PromptedModel:
    """Switch between the cheap form and the token form in place; the weights are the same."""
    model.spec = replace(model.spec, token_form=token_form)
    return model


@torch.no_grad()
def load_tuned_state(model: PromptedModel, state: dict[str, Tensor], where: str) -> None:
    """Copy saved tuned tensors into a model.

    Raises: InputError naming a tensor that is missing, unexpected or of another shape; then
        nothing was copied.
    """
    own = tuned_state(model)
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own:
            got = "no" if name not in state else "an unexpected"
            raise InputError(
                where,
                f"{got} tensor '{name}'",
                "the tensors of this model",
                "build the model as the saved one was",
            )
        if own[name].shape != state[name].shape:
            raise InputError(
                f"{where} {name}",
                f"shape {tuple(state[name].shape)}",
                f"{tuple(own[name].shape)}",
                "build the model as the saved one was",
            )
    for name, tensor in state.items():
        own[name].copy_(tensor)
