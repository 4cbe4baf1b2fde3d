"""Which code puts prompts into which kind of backbone.

A family is a module with what `Family` lists. Shapes: B batch, P visual prompts, n
key-value prompts, H heads, D width, d_h width of a head; they may differ from layer to layer.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from e2vpt import eva, swin, vit
from e2vpt.geometry import Geometry, class_name
from e2vpt.prompts import KeyValueRows, VisualRows
from shared_utils.errors import InputError


class Family(Protocol):
    """How prompts enter one kind of backbone, without touching its modules.

    Attributes:
        CLASSIFIER: dotted name of the layer in the backbone that the prompted model's head is for.
    """

    CLASSIFIER: str

    def check_supported(self, backbone: Any) -> Geometry:
        """The sizes. Raises: InputError naming a block or attention class that is not known."""

    def prompted_features(
        self,
        backbone: Any,
        images: Tensor,
        visual: VisualRows | None,
        kv: KeyValueRows | None,
        *,
        token_form: bool = False,
        pool_prompts: bool = False,
    ) -> Tensor:
        """What the backbone's `forward_head` takes, from images (B, 3, H, W)."""

    def folded_rows(self, backbone: Any, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, each (H, P, d_h), of visual prompts (P, D) in one layer."""


FAMILIES: dict[type[nn.Module], Family] = {
    vit.CLASS: vit,
    eva.CLASS: eva,
    **dict.fromkeys(swin.CLASSES, swin),
}


def family_of(backbone: nn.Module) -> Family:
    """The family whose class the backbone is.

    Raises: InputError naming a class that no family knows.
    """
    family = FAMILIES.get(type(backbone))
    if family is not None:
        return family
    raise InputError(
        "backbone",
        f"class {class_name(backbone)}",
        "a timm " + " or ".join(known.__name__ for known in FAMILIES),
        "choose another model",
    )
