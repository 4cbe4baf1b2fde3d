"""The three heads: boxes, drivable area, lane lines. They give logits; decoding is elsewhere.

Paper: Han et al., YOLOPv2 (arXiv 2208.11434), Sec. 3; layers as in the released network's graph.
"""

import math
from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from shared_utils.errors import InputError, near_miss
from yolop_mtl.blocks import CSP, ChannelAttention, Conv, Deconv, Implicit, RepConv, Upconv, doubled
from yolop_mtl.boxes import check_anchors

Upsample = Literal["deconv", "nearest"]
OBJECTS_PER_IMAGE = 8  # what objectness expects at the start, on an image of PRIOR_SIZE squared
PRIOR_SIZE = 640
CLASS_PRIOR = 0.6
LANE_PRIOR = 0.02  # share of pixels that are lane, about what BDD100K's training masks have


class DetectionHead(nn.Module):
    """One map per scale with num_anchors (5 + num_classes) channels, anchor after anchor.

    Channels of an anchor: x, y, w, h, objectness, classes; all raw. See `boxes.decode`.

    Attributes:
        anchors: (scales, anchors, 2) float32 buffer, (w, h) in pixels; saved with the weights.
    """

    anchors: Tensor

    def __init__(
        self,
        *,
        in_chans: Sequence[int],
        hidden: Sequence[int],
        strides: Sequence[int],
        anchors: Sequence[Sequence[Sequence[float]]],
        num_classes: int,
        use_repconv: bool = False,
    ) -> None:
        """Build.

        Args:
            in_chans: channels of the map of each scale.
            hidden: channels before the last convolution of each scale.
            strides: pixels per cell of each scale.
            anchors: per scale (w, h) pairs in pixels of the network's input.
            num_classes: 1 or more.
            use_repconv: train the 3x3 convolutions as `RepConv`.

        Raises: InputError where anchors and scales do not fit.
        """
        super().__init__()
        table = check_anchors(anchors, num_scales=len(strides))
        self.num_classes, self.strides = num_classes, tuple(strides)
        self.register_buffer("anchors", table)
        outputs = table.shape[1] * (5 + num_classes)
        pairs = list(zip(in_chans, hidden, strict=True))
        self.convs = nn.ModuleList(
            RepConv(wide, deep) if use_repconv else Conv(wide, deep, 3) for wide, deep in pairs
        )
        self.outputs = nn.ModuleList(nn.Conv2d(deep, outputs, 1) for deep in hidden)
        self.adds: nn.ModuleList | None = nn.ModuleList(Implicit(c, mean=0) for c in hidden)
        self.muls: nn.ModuleList | None = nn.ModuleList(Implicit(outputs, mean=1) for _ in hidden)
        self.reset_biases()

    @torch.no_grad()
    def reset_biases(self) -> None:
        """Add the priors: few objects in many cells, and no class preferred."""
        for conv, stride in zip(self.outputs, self.strides, strict=True):
            bias = cast(Tensor, conv.bias).view(self.anchors.shape[1], -1)
            bias[:, 4] += math.log(OBJECTS_PER_IMAGE / (PRIOR_SIZE / stride) ** 2)
            bias[:, 5:] += math.log(CLASS_PRIOR / (self.num_classes - 0.99))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """A map per scale (B, C, H/s, W/s) -> (B, A (5 + num_classes), H/s, W/s), raw."""
        results = []
        for scale, (x, conv, output) in enumerate(zip(maps, self.convs, self.outputs, strict=True)):
            x = conv(x)
            if self.adds is not None:
                x = x + self.adds[scale]()
            x = output(x)
            if self.muls is not None:
                x = x * self.muls[scale]()
            results.append(x)
        return results

    @torch.no_grad()
    def merge_implicit(self) -> None:
        """Put the implicit vectors into the last convolutions, in place."""
        if self.adds is None or self.muls is None:
            return
        for conv, add, mul in zip(self.outputs, self.adds, self.muls, strict=True):
            scale = cast(Implicit, mul).vector
            plain = cast(nn.Conv2d, conv)
            bias = cast(Tensor, plain.bias)
            bias.copy_((bias + plain.weight[:, :, 0, 0] @ cast(Implicit, add).vector) * scale)
            plain.weight.mul_(scale[:, None, None, None])
        self.adds = self.muls = None


class DrivableHead(nn.Module):
    """Stride 16 to full size in four nearest-neighbour steps; 2 logits: background, drivable."""

    def __init__(
        self, *, in_chans: int, widths: Sequence[int], csp_widths: Sequence[int], num_outputs: int
    ) -> None:
        """Build.

        Args:
            in_chans: channels of F4, the join before the top-down path's last step.
            widths: of the four 3x3 convolutions, 256, 64, 32, 16 in the release.
            csp_widths: of the two CSP blocks, 128 and 8 in the release.
            num_outputs: classes, background included.
        """
        super().__init__()
        first, second, third, fourth = widths
        inner, last = csp_widths
        self.conv1 = Conv(in_chans, first, 3)
        self.csp1 = CSP(first, inner)
        self.conv2 = Conv(inner, second, 3)
        self.conv3 = Conv(second, third, 3)
        self.conv4 = Conv(third, fourth, 3)
        self.csp2 = CSP(fourth, last)
        self.output = Conv(last, num_outputs, 3, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H/16, W/16) -> logits (B, num_outputs, H, W)."""
        x = self.csp1(doubled(self.conv1(x)))
        x = self.conv3(doubled(self.conv2(x)))
        x = self.csp2(self.conv4(doubled(x)))
        return cast(Tensor, self.output(doubled(x)))


class LaneHead(nn.Module):
    """Stride 8 to full size in three transposed convolutions (or `Upconv`); one logit.

    Starts with the share of lanes that is to be expected. From one half, as a norm starts, a nano
    network needed over a hundred steps before the overlap of a thin line began to grow.
    """

    def __init__(
        self,
        *,
        in_chans: int,
        widths: Sequence[int],
        csp_widths: Sequence[int],
        attention_width: int | None,
        use_deconv_bias: bool = True,
        upsample: Upsample = "deconv",
    ) -> None:
        """Build.

        Args:
            in_chans: channels of F3, the second join of the top-down path.
            widths: after each of the three rises in size but the first, and before it: 128, 32,
                16, 8 in the release (first convolution, second, third, last transposed one).
            csp_widths: of the two CSP blocks, 64 and 8 in the release.
            attention_width: of the channel attention's middle; None leaves attention out.
            use_deconv_bias: a bias beside each norm of a transposed convolution.
            upsample: deconv, or nearest: nearest neighbours and a 3x3 convolution, as the paper's
                predecessor has it.

        Raises: InputError for another `upsample`.
        """
        super().__init__()
        if upsample not in get_args(Upsample):
            do = near_miss(upsample, get_args(Upsample))
            raise InputError("lane_upsample", f"'{upsample}'", "a known one", do)

        def double(channels: int, out_chans: int) -> nn.Module:
            if upsample == "nearest":
                return Upconv(channels, out_chans)
            return Deconv(channels, out_chans, bias=use_deconv_bias)

        first, second, third, fourth = widths
        inner, last = csp_widths
        self.attention = None
        if attention_width is not None:
            self.attention = ChannelAttention(in_chans, attention_width)
        self.conv1 = Conv(in_chans, first, 3)
        # Called so whatever they are made of, so that weights keep their names.
        self.deconv1 = double(first, first)
        self.csp1 = CSP(first, inner)
        self.conv2 = Conv(inner, second, 3)
        self.deconv2 = double(second, second)
        self.conv3 = Conv(second, third, 3)
        self.csp2 = CSP(third, last)
        self.deconv3 = double(last, fourth)
        self.output = Conv(fourth, 1, 3, act=False)
        nn.init.constant_(
            cast(nn.BatchNorm2d, self.output.norm).bias, math.log(LANE_PRIOR / (1 - LANE_PRIOR))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H/8, W/8) -> logits (B, 1, H, W)."""
        if self.attention is not None:
            x = self.attention(x)
        x = self.csp1(self.deconv1(self.conv1(x)))
        x = self.deconv2(self.conv2(x))
        x = self.deconv3(self.csp2(self.conv3(x)))
        return cast(Tensor, self.output(x))
