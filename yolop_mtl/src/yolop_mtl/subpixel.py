"""Narrow layers on fine maps, done as wide layers on coarse maps: the same outputs in less time.

The two segmentation heads end in layers of 1 to 16 channels on maps of half and full size. They
leave most of a processor's vector lanes empty, whatever library runs them. A layer on pixels is
also a layer on cells of r x r pixels whose channels hold the pixels of a cell, as
`torch.pixel_unshuffle` orders them; where a pixel does not see another one of its cell there is a
zero in the kernel. Doubling by nearest neighbours is absorbed: several taps then meet one pixel.

Sub-pixel convolution: Shi et al., "Real-Time Single Image and Video Super-Resolution Using an
Efficient Sub-Pixel Convolutional Neural Network" (CVPR 2016), which trains such kernels; here they
are computed from trained ones, for inference alone.
"""

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared_utils.errors import InputError
from yolop_mtl.blocks import CSP, Conv, Deconv, Upconv, doubled
from yolop_mtl.heads import DrivableHead, LaneHead
from yolop_mtl.model import YOLOPv2

# plain: stride 1; doubled: stride 1 on what nearest neighbours have doubled; transposed: 2 x 2 with
# stride 2. All keep, or double, the size.
Kind = Literal["plain", "doubled", "transposed"]


def to_subpixel(model: YOLOPv2) -> YOLOPv2:
    """Bring the ends of the segmentation heads into this form, in place; good for inference alone.

    Outputs are those of before, up to rounding, for every size that the network takes.

    Args:
        model: after `fuse(model, completely=True)`.

    Returns: the same network.

    Raises: InputError where it is not folded completely.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            do = "call yolop_mtl.fuse(model.eval(), completely=True) first"
            raise InputError("model", f"one with a norm, {name}", "a folded network", do)
    if isinstance(model.drivable, DrivableHead):
        model.drivable = cast(DrivableHead, SubpixelDrivableHead(model.drivable).eval())
    if isinstance(model.lane, LaneHead):
        model.lane = cast(LaneHead, SubpixelLaneHead(model.lane).eval())
    return model


class SubpixelDrivableHead(nn.Module):
    """A folded `DrivableHead`; its last two steps in size run on maps of a quarter."""

    def __init__(self, head: DrivableHead) -> None:
        """Take over the head's layers; its last ones are made anew."""
        super().__init__()
        self.conv1, self.csp1, self.conv2, self.conv3 = (
            head.conv1, head.csp1, head.conv2, head.conv3,
        )  # fmt: skip
        self.conv4 = _on_cells(head.conv4, "doubled", 1, 2)
        self.csp2 = _csp_on_cells(head.csp2, 2)
        self.output = _on_cells(head.output, "doubled", 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H/16, W/16) -> logits (B, num_outputs, H, W)."""
        x = self.csp1(doubled(self.conv1(x)))
        x = self.conv3(doubled(self.conv2(x)))
        return F.pixel_shuffle(self.output(self.csp2(self.conv4(x))), 4)


class SubpixelLaneHead(nn.Module):
    """A folded `LaneHead`; its last two steps in size run on maps of a quarter and a half."""

    def __init__(self, head: LaneHead) -> None:
        """Take over the head's layers; its last ones are made anew."""
        super().__init__()
        self.attention, self.conv1, self.deconv1, self.csp1, self.conv2, self.deconv2 = (
            head.attention, head.conv1, head.deconv1, head.csp1, head.conv2, head.deconv2,
        )  # fmt: skip
        self.conv3 = _on_cells(head.conv3, "plain", 1, 2)
        self.csp2 = _csp_on_cells(head.csp2, 2)
        is_deconv = isinstance(head.deconv3, Deconv)
        self.deconv3 = _on_cells(head.deconv3, "transposed" if is_deconv else "doubled", 1, 2)
        self.output = _on_cells(head.output, "plain", 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H/8, W/8) -> logits (B, 1, H, W)."""
        if self.attention is not None:
            x = self.attention(x)
        x = self.csp1(self.deconv1(self.conv1(x)))
        x = self.csp2(self.conv3(self.deconv2(self.conv2(x))))
        x = self.deconv3(F.pixel_shuffle(x, 2))
        return F.pixel_shuffle(self.output(x), 4)


def cell_kernel(weight: Tensor, kind: Kind, in_cell: int, out_cell: int) -> tuple[Tensor, int, int]:
    """A kernel on pixels as a kernel on cells.

    Args:
        weight: (O, I, k, k), with k odd, or 2 for a transposed convolution, whose first two
            dimensions are to be exchanged; padding is k // 2, or none.
        kind: what the convolution is.
        in_cell: sides of the input's cells, in pixels of the input; 1 where it has none.
        out_cell: sides of the output's cells, in pixels of the output.

    Returns: a weight (O out_cell^2, I in_cell^2, K, K), and the padding and stride that belong to
        it.
    """
    selector, padding, stride = _selector(weight.shape[-1], kind, in_cell, out_cell)
    # o i: channels; k l: taps; a b: pixel of the output's cell; c e: of the input's; u v: cells.
    picks = selector.to(weight)
    wide = torch.einsum("oikl,akcu,blev->oabiceuv", weight, picks, picks)
    size = selector.shape[-1]
    out_chans, in_chans = weight.shape[0] * out_cell**2, weight.shape[1] * in_cell**2
    return wide.reshape(out_chans, in_chans, size, size), padding, stride


def _selector(kernel: int, kind: Kind, in_cell: int, out_cell: int) -> tuple[Tensor, int, int]:
    """Where the taps of a row lie: (pixel of the output's cell, tap, pixel of the input's, cell).

    Also the padding, in cells of the input, and how many of these an output's cell spans.
    """
    pixel, tap = torch.arange(out_cell)[:, None], torch.arange(kernel)[None]
    if kind == "transposed":
        source, used = (pixel // 2).expand(-1, kernel), tap == pixel % 2
    else:
        source = pixel + tap - kernel // 2
        source = source.div(2, rounding_mode="floor") if kind == "doubled" else source
        used = torch.ones_like(source, dtype=torch.bool)
    cell = source.div(in_cell, rounding_mode="floor")
    first, last = int(cell.min()), int(cell.max())
    stride = (out_cell if kind == "plain" else out_cell // 2) // in_cell
    within = F.one_hot(source - cell * in_cell, in_cell)[..., :, None]
    places = F.one_hot(cell - first, last - first + 1)[..., None, :]
    return within * places * used[..., None, None], -first, stride


def _on_cells(module: nn.Module, kind: Kind, in_cell: int, out_cell: int) -> nn.Module:
    """A folded layer in the other form, with its activation."""
    if isinstance(module, Upconv):
        module = module.conv
    if not isinstance(module, Conv | Deconv):
        return _conv_on_cells(cast(nn.Conv2d, module), kind, in_cell, out_cell)
    layer = Conv(1, 1, act=module.act if isinstance(module, Conv) else True)
    layer.conv, layer.norm = _conv_on_cells(module.conv, kind, in_cell, out_cell), None
    return layer


def _csp_on_cells(block: CSP, cell: int) -> CSP:
    layer = CSP(2, 2)
    for index, part in enumerate(block.main):
        layer.main[index] = _on_cells(part, "plain", cell, cell)
    layer.side = cast(nn.Conv2d, _on_cells(block.side, "plain", cell, cell))
    layer.norm = None
    layer.out = cast(Conv, _on_cells(block.out, "plain", cell, cell))
    return layer


@torch.no_grad()
def _conv_on_cells(
    conv: nn.Conv2d | nn.ConvTranspose2d, kind: Kind, in_cell: int, out_cell: int
) -> nn.Conv2d:
    weight = conv.weight.transpose(0, 1) if kind == "transposed" else conv.weight
    wide, padding, stride = cell_kernel(weight, kind, in_cell, out_cell)
    layer = nn.Conv2d(
        wide.shape[1], wide.shape[0], wide.shape[-1], stride, padding, bias=conv.bias is not None,
        device="meta",
    )  # fmt: skip
    layer.weight = nn.Parameter(wide, requires_grad=conv.weight.requires_grad)
    if conv.bias is not None:
        bias = conv.bias.repeat_interleave(out_cell**2)
        layer.bias = nn.Parameter(bias, requires_grad=conv.bias.requires_grad)
    return layer
