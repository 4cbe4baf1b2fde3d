"""Baselines that change the backbone instead of adding prompts: LoRA, AdaptFormer, partial-k.

Adapters stand in the backbone as modules that wrap its own; timm's classes are not changed, and
`detach` puts the very same modules back.

Shapes: B batch, N tokens, D width, r rank, d bottleneck.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast, get_args

import torch
from timm.layers import Attention, AttentionRope
from timm.models import swin_transformer, swin_transformer_v2
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.config import Adapter, BackboneTrains
from e2vpt.geometry import class_name
from shared_utils.errors import InputError

# Blocks that normalise before the MLP, and those that do so after it.
PRE_NORM = (Block, SwinTransformerBlock, EvaBlock)
POST_NORM = (ResPostBlock, SwinTransformerV2Block, EvaBlockPostNorm)
# Attentions with query, key and value columns side by side in `qkv`, or in layers of their own.
ATTENTIONS = (
    Attention,
    AttentionRope,
    EvaAttention,
    swin_transformer.WindowAttention,
    swin_transformer_v2.WindowAttention,
)


class LowRankUpdate(nn.Module):
    """B A x, A (r, D), B (D', r).  Paper: Hu et al., LoRA, arXiv 2106.09685, Sec. 4.1.

    Differs from the paper: A starts Kaiming-uniform, as in its authors' code, not Gaussian; B at 0.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        """Start at 0."""
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        out: Tensor = self.up(self.down(x))
        return out


class LowRankLinear(nn.Module):
    """A linear layer W x + b whose equal parts may each have a low-rank update.

    Attributes:
        updates: by the number of the part.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, scale: float, *, num_parts: int, updated: Sequence[int]
    ) -> None:
        """Wrap `linear`, D -> num_parts * D'; `scale` is alpha / rank."""
        super().__init__()
        self.linear, self.scale, self.num_parts = linear, scale, num_parts
        width = linear.out_features // num_parts
        self.updates = nn.ModuleDict(
            {str(part): LowRankUpdate(linear.in_features, width, rank) for part in updated}
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., num_parts * D')."""
        parts = list(self.linear(x).chunk(self.num_parts, dim=-1))
        for part, update in self.updates.items():
            parts[int(part)] = parts[int(part)] + self.scale * update(x)
        return torch.cat(parts, dim=-1)

    @property
    def weight(self) -> Tensor:
        """W with the updates merged, for attentions that read it past `forward`."""
        parts = list(self.linear.weight.chunk(self.num_parts))
        for part, update in self.updates.items():
            delta = cast(Any, update).up.weight @ cast(Any, update).down.weight
            parts[int(part)] = parts[int(part)] + self.scale * delta
        return torch.cat(parts)


class ParallelAdapter(nn.Module):
    """The second half of a block with a bottleneck beside its MLP, without the residual.

    MLP(LN(x)) + scale * up(relu(down(x))), x being what the residual carries after attention.
    Paper: Chen et al., AdaptFormer, arXiv 2205.13535.  Differs from the paper: its Eq. 3 puts the
    layer norm before `down` too; its author says that their code, which feeds x itself, is what is
    right (issue 9 of ShoufaChen/AdaptFormer), so x itself it is here. Where a block normalises
    after the MLP, LN(MLP(x)) stands in place of MLP(LN(x)).
    """

    def __init__(self, block: Any, bottleneck: int, scale: float) -> None:
        """Wrap a block's `norm2`, `mlp` and, where it has one, the layer scale of the MLP."""
        super().__init__()
        self.norm, self.mlp = block.norm2, block.mlp
        self.is_post_norm = type(block) in POST_NORM
        self.layer_scale = getattr(block, "ls2", None)  # a module in a plain ViT,
        self.gamma = getattr(block, "gamma_2", None)  # a parameter in Eva
        width = block.norm2.normalized_shape[0]
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) before norm and MLP -> (B, N, D), to be added to it."""
        out = self.norm(self.mlp(x)) if self.is_post_norm else self.mlp(self.norm(x))
        if self.layer_scale is not None:
            out = self.layer_scale(out)
        if self.gamma is not None:
            out = self.gamma * out
        return cast(Tensor, out + self.scale * self.up(F.relu(self.down(x))))


def transformer_blocks(backbone: nn.Module) -> list[Any]:
    """The modules that have an `attn` and an `mlp`, in the order they run."""
    return [
        module
        for module in backbone.modules()
        if isinstance(getattr(module, "attn", None), nn.Module)
        and isinstance(getattr(module, "mlp", None), nn.Module)
    ]


def trainable_names(backbone: nn.Module, what: BackboneTrains, num_blocks: int) -> set[str]:
    """Names of the backbone's parameters that a method trains.

    Args:
        backbone: with or without its classifier.
        what: `none`, `bias` (each parameter of that name), `full`, or `partial`: the last blocks
            and the final norm.  Paper: Jia et al., VPT, arXiv 2203.12119, baseline Partial-k.
        num_blocks: for `partial`.

    Raises: InputError for more blocks than there are, or none.
    """
    if what == "partial":
        blocks = transformer_blocks(backbone)
        if not 1 <= num_blocks <= len(blocks):
            expected = f"1 to {len(blocks)}, the blocks of the backbone"
            raise InputError("partial_blocks", num_blocks, expected, "correct it")
        # `fc_norm` is the final norm of models that normalise after pooling; one is an identity.
        ends = [getattr(backbone, name, None) for name in ("norm", "fc_norm")]
        parts = blocks[-num_blocks:] + [end for end in ends if end is not None]
        chosen = {id(p) for part in parts for p in part.parameters()}
        return {n for n, p in backbone.named_parameters() if id(p) in chosen}
    return {
        name
        for name, _ in backbone.named_parameters()
        if what == "full" or (what == "bias" and name.endswith("bias"))
    }


def check_spec(spec: Any) -> None:
    """Check the fields of a `PromptSpec` that say what trains besides prompts and head.

    Raises: InputError, also where adapters are to come with prompts or a backbone that trains:
        they are methods of their own.
    """
    for name, kinds in (("backbone_trains", BackboneTrains), ("adapter", Adapter)):
        *words, last = get_args(kinds)
        if getattr(spec, name) not in (*words, last):
            expected = f"{', '.join(words)} or {last}"
            raise InputError(name, getattr(spec, name), expected, "correct it")
    if spec.adapter_dim < 1:
        raise InputError("adapter_dim", spec.adapter_dim, "1 or more", "correct it")
    if not 0 < spec.adapter_scale < math.inf:
        raise InputError("adapter_scale", spec.adapter_scale, "more than 0", "correct it")
    if spec.adapter == "none":
        return
    for name, alone in (
        ("num_visual_prompts", 0),
        ("num_kv_prompts", 0),
        ("backbone_trains", "none"),
    ):
        if getattr(spec, name) != alone:
            got = f"{getattr(spec, name)} beside {spec.adapter}"
            raise InputError(name, got, f"{alone}", "choose one method")


def require_free(backbone: nn.Module, adapter: Adapter) -> None:
    """Check that a new model may use the backbone. Prompts share one; adapters change it.

    Raises: InputError where it carries adapters, or is to get them and is in use.
    """
    got = ""
    if _wrappers(backbone):
        got = "one that carries the adapters of another model"
    elif adapter != "none" and hasattr(backbone, "_before_prompts"):
        got = f"one that another model uses, for {adapter}, which changes it"
    if got:
        raise InputError(
            "backbone",
            got,
            "one that is free",
            "give that model to e2vpt.remove first, or load the backbone once more",
        )


def check_adaptable(backbone: nn.Module, adapter: Adapter) -> None:
    """Check that `attach` can do its work.

    Raises: InputError naming a class of block or attention that is not known.
    """
    if adapter == "none":
        return
    blocks = transformer_blocks(backbone)
    if not blocks:
        got = f"class {class_name(backbone)} for {adapter}"
        raise InputError("backbone", got, "one of transformer blocks", "choose another model")
    known = ATTENTIONS if adapter == "lora" else PRE_NORM + POST_NORM
    for i, block in enumerate(blocks):
        part = block.attn if adapter == "lora" else block
        if type(part) not in known:
            raise InputError(
                "backbone",
                f"class {class_name(part)} in layer {i} for {adapter}",
                f"timm's {', '.join(dict.fromkeys(k.__name__ for k in known))}",
                "choose another model or method",
            )


def attach(backbone: nn.Module, adapter: Adapter, dim: int, scale: float) -> None:
    """Put adapters into every block; with their last layer at 0 the output stays as it was.

    Args:
        backbone: one that `require_free` and `check_adaptable` passed; changed in place.
        adapter: `lora` or `adaptformer`; `none` does nothing.
        dim: rank or bottleneck.
        scale: alpha / rank of LoRA, s of AdaptFormer.
    """
    if adapter == "none":
        return
    for block in transformer_blocks(backbone):
        if adapter == "adaptformer":
            _put(block, "mlp", ParallelAdapter(block, dim, scale))
        elif block.attn.qkv is not None:
            fused = LowRankLinear(block.attn.qkv, dim, scale, num_parts=3, updated=(0, 2))
            _put(block, "qkv", fused)
        else:
            for name in ("q_proj", "v_proj"):
                linear = getattr(block.attn, name)
                alone = LowRankLinear(linear, dim, scale, num_parts=1, updated=(0,))
                _put(block, name, alone)


def detach(backbone: nn.Module) -> None:
    """Put the backbone's own modules back where adapters wrap them; do nothing where none do."""
    for block, place, wrapper in _wrappers(backbone):
        if isinstance(wrapper, LowRankLinear):
            setattr(block.attn, place, wrapper.linear)
            continue
        block.norm2, block.mlp = wrapper.norm, wrapper.mlp
        if wrapper.layer_scale is not None:
            block.ls2 = wrapper.layer_scale
        if wrapper.gamma is not None:
            block.gamma_2 = wrapper.gamma


@contextmanager
def detached(backbone: nn.Module) -> Iterator[None]:
    """The backbone's own modules in place while the context lasts, then the adapters again."""
    kept = _wrappers(backbone)
    detach(backbone)
    try:
        yield
    finally:
        for block, place, wrapper in kept:
            _put(block, place, wrapper)


def num_adapter_parameters(backbone: nn.Module) -> int:
    """Parameters of the adapters in a backbone, those of the modules they wrap not counted."""
    added = [
        part
        for *_, wrapper in _wrappers(backbone)
        for part in (
            [wrapper.updates] if isinstance(wrapper, LowRankLinear) else [wrapper.down, wrapper.up]
        )
    ]
    return sum(p.numel() for part in added for p in part.parameters())


def _put(block: Any, place: str, wrapper: LowRankLinear | ParallelAdapter) -> None:
    """Let a wrapper stand where what it wraps stood; what it calls itself is switched off."""
    if isinstance(wrapper, LowRankLinear):
        setattr(block.attn, place, wrapper)
        return
    block.norm2, block.mlp = nn.Identity(), wrapper
    if wrapper.layer_scale is not None:
        block.ls2 = nn.Identity()
    if wrapper.gamma is not None:
        block.gamma_2 = None


def _wrappers(backbone: nn.Module) -> list[tuple[Any, str, LowRankLinear | ParallelAdapter]]:
    """Each adapter with its block and the name of its place there."""
    return [
        (block, place, part)
        for block in transformer_blocks(backbone)
        for owner, place in (
            (block.attn, "qkv"),
            (block.attn, "q_proj"),
            (block.attn, "v_proj"),
            (block, "mlp"),
        )
        if isinstance(part := getattr(owner, place, None), LowRankLinear | ParallelAdapter)
    ]
