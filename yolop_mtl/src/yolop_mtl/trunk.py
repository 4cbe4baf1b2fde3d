"""Backbone and neck: what the three heads share.

Paper: Han et al., YOLOPv2 (arXiv 2208.11434), Sec. 3. Layers as in the released network's graph,
whose backbone is plain ELAN, not the text's E-ELAN with groups.

Names follow strides: 3, 4, 5 are 8, 16, 32 pixels per cell.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from yolop_mtl.blocks import ELAN, ELANW, SPPCSPC, Conv, Down, doubled

STRIDES = (8, 16, 32)


def scaled(channels: int, width: float) -> int:
    """A channel count times the width multiplier, as a multiple of 8 and at least 8."""
    return max(8, round(channels * width / 8) * 8)


class Backbone(nn.Module):
    """Image -> maps at strides 8, 16 and 32 with 512, 1024 and 1024 channels times `width`."""

    def __init__(self, *, width: float = 1.0, num_convs: int = 2) -> None:
        """Build; `num_convs` 3x3 convolutions in each chain of an ELAN block."""
        super().__init__()

        def w(channels: int) -> int:
            return scaled(channels, width)

        def elan(in_chans: int, hidden: int, out_chans: int) -> ELAN:
            return ELAN(w(in_chans), w(hidden), w(out_chans), num_convs=num_convs)

        self.stem = nn.Sequential(
            Conv(3, w(32), 3),
            Conv(w(32), w(64), 3, stride=2),
            Conv(w(64), w(64), 3),
            Conv(w(64), w(128), 3, stride=2),
        )
        self.e2 = elan(128, 64, 256)
        self.d3 = Down(w(256), w(256) // 2)
        self.e3 = elan(256, 128, 512)
        self.d4 = Down(w(512), w(512) // 2)
        self.e4 = elan(512, 256, 1024)
        self.d5 = Down(w(1024), w(1024) // 2)
        self.e5 = elan(1024, 256, 1024)
        self.out_chans = (w(512), w(1024), w(1024))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> C3, C4, C5."""
        c3 = self.e3(self.d3(self.e2(self.stem(images))))
        c4 = self.e4(self.d4(c3))
        return c3, c4, self.e5(self.d5(c4))


class Necks(NamedTuple):
    """What the neck gives; None where no head asks for it."""

    drivable: Tensor
    lane: Tensor | None
    detection: tuple[Tensor, Tensor, Tensor] | None


class Neck(nn.Module):
    """Spatial pyramid, top-down path, and the bottom-up path that only boxes need."""

    def __init__(
        self,
        *,
        width: float = 1.0,
        num_convs: int = 4,
        has_lane: bool = True,
        has_detection: bool = True,
    ) -> None:
        """Build.

        Args:
            width: multiplier of channels, that of the backbone.
            num_convs: 3x3 convolutions in the chain of an ELAN-W block.
            has_lane: go up to F3, which the lane head takes.
            has_detection: add the second half, which gives maps for boxes.
        """
        super().__init__()

        def w(channels: int) -> int:
            return scaled(channels, width)

        def elan(in_chans: int, out_chans: int) -> ELANW:
            return ELANW(in_chans, w(out_chans), num_convs=num_convs)

        self.has_lane, self.has_detection = has_lane, has_detection
        self.spp = SPPCSPC(w(1024), w(512))
        self.r5 = Conv(w(512), w(256))
        self.l4 = Conv(w(1024), w(256))
        self.f4_chans, self.f3_chans = 2 * w(256), 2 * w(128)
        self.out_chans = (w(128), w(256), w(512))
        if has_lane or has_detection:
            self.n4 = elan(self.f4_chans, 256)
            self.r4 = Conv(w(256), w(128))
            self.l3 = Conv(w(512), w(128))
        if has_detection:
            self.n3 = elan(self.f3_chans, 128)
            self.p4d = Down(w(128), w(128))
            self.p4 = elan(2 * w(128) + w(256), 256)
            self.p5d = Down(w(256), w(256))
            self.p5 = elan(2 * w(256) + w(512), 512)

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor) -> Necks:
        """C3, C4, C5 -> F4 at stride 16, F3 at stride 8, box maps at strides 8, 16, 32."""
        p5 = self.spp(c5)
        f4 = torch.cat([self.l4(c4), doubled(self.r5(p5))], 1)
        if not (self.has_lane or self.has_detection):
            return Necks(f4, None, None)
        n4 = self.n4(f4)
        f3 = torch.cat([self.l3(c3), doubled(self.r4(n4))], 1)
        if not self.has_detection:
            return Necks(f4, f3, None)
        n3 = self.n3(f3)
        p4 = self.p4(self.p4d(n3, n4))
        return Necks(f4, f3, (n3, p4, self.p5(self.p5d(p4, p5))))
