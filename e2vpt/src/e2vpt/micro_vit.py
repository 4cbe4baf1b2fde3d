"""A small vision transformer for 32x32 images, the backbone that ships with the package.

A plain timm `VisionTransformer`: 64 tokens of width 192 in 6 blocks of 3 heads, average pooling,
no class token. Only the patch embedding differs: four 3x3 convolutions, which learn more in the
same time than one 4x4 projection (early convolutions: Xiao et al., arXiv 2106.14881).
"""

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

IMG_SIZE = 32
PATCH_SIZE = 4


class ConvPatchEmbed(nn.Module):
    """3x3 convolutions with strides 1, 2, 1, 2: the grid of a 4x4 patch embedding.

    Takes the place of timm's `PatchEmbed`; keywords of that class that do not matter here are
    accepted and left alone.
    """

    def __init__(
        self,
        img_size: int = IMG_SIZE,
        patch_size: int = PATCH_SIZE,
        in_chans: int = 3,
        embed_dim: int = 192,
        **_unused: Any,
    ) -> None:
        """Build for square images of `img_size` pixels; `patch_size` must be 4."""
        super().__init__()
        if patch_size != PATCH_SIZE:
            raise ValueError(f"patch_size: got {patch_size}, expected {PATCH_SIZE}; leave it out")
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = (embed_dim // 4, embed_dim // 2, embed_dim // 2)
        layers: list[nn.Module] = []
        for width, stride in zip(widths, (1, 2, 1), strict=True):
            layers += [
                nn.Conv2d(in_chans, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.GELU(),
            ]
            in_chans = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(in_chans, embed_dim, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H/4 * W/4, D)."""
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


def build_micro_vit(
    num_classes: int = 200, *, embed_dim: int = 192, depth: int = 6, num_heads: int = 3
) -> VisionTransformer:
    """The architecture with random weights."""
    return VisionTransformer(
        img_size=IMG_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
        global_pool="avg",
        class_token=False,
        embed_layer=ConvPatchEmbed,
    )
