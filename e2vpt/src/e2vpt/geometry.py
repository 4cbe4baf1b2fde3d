"""What prompts must know of a backbone: how many layers it has, and how wide each is."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LayerGeometry:
    """One attention layer.

    Attributes:
        embed_dim: D, width of a token and of a visual prompt.
        num_heads: H.
        head_dim: d_h, width of a key-value prompt's row in one head.
    """

    embed_dim: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class Geometry:
    """The sizes of a backbone that prompts depend on.

    Attributes:
        layers: in the order they run; equal for a plain ViT, wider from stage to stage for Swin.
        patch_size: side of a patch in pixels; sets the range prompts start from.
        num_prefix_tokens: class token and registers in front of the patches.
    """

    layers: tuple[LayerGeometry, ...]
    patch_size: int
    num_prefix_tokens: int

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def embed_dim(self) -> int:
        """Width of the first layer, the one of the paper's init bound."""
        return self.layers[0].embed_dim


def class_name(module: nn.Module) -> str:
    """Its class with the module it is from, for error messages."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
