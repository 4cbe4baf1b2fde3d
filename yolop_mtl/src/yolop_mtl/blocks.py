"""The blocks that trunk and heads are made of, and how each is folded for inference.

Paper: Han et al., YOLOPv2 (arXiv 2208.11434), whose text names E-ELAN. The released network's graph
has plain ELAN without groups; that is what stands here. Written from a description of the graph.

Modules are registered in the order in which they run. Shapes: B batch, C channels, H W size.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-3
NORM_MOMENTUM = 0.03  # torch's meaning: the share of the new batch
IMPLICIT_STD = 0.02


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=NORM_EPS, momentum=NORM_MOMENTUM)


def doubled(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W), by nearest neighbours."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Conv(nn.Module):
    """Convolution, batch norm and SiLU; (B, C, H, W) -> (B, C', H / stride, W / stride).

    After `fuse` the norm is part of the convolution, which then has a bias, and `norm` is None.
    """

    def __init__(
        self, in_chans: int, out_chans: int, kernel: int = 1, *, stride: int = 1, act: bool = True
    ) -> None:
        """Build with padding that keeps the size at stride 1; `act` False leaves SiLU out."""
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, bias=False)
        self.norm: nn.BatchNorm2d | None = _norm(out_chans)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Any float type."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return F.silu(x) if self.act else x

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the norm's running statistics into the convolution, in place."""
        if self.norm is not None:
            _set(self.conv, *_folded(self.conv, self.norm))
            self.norm = None


class Deconv(nn.Module):
    """Transposed convolution 2x2 with stride 2, batch norm and SiLU; doubles H and W."""

    def __init__(self, in_chans: int, out_chans: int, *, bias: bool = True) -> None:
        """Build; `bias` beside the norm, which the released graph leaves open, adds out_chans."""
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_chans, out_chans, 2, 2, bias=bias)
        self.norm: nn.BatchNorm2d | None = _norm(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W)."""
        x = self.conv(x)
        return F.silu(x if self.norm is None else self.norm(x))

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the norm's running statistics into the convolution, in place."""
        if self.norm is not None:
            _set(self.conv, *_folded(self.conv, self.norm))
            self.norm = None


class Upconv(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution, in the place of `Deconv`."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        """Build."""
        super().__init__()
        self.conv = Conv(in_chans, out_chans, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W)."""
        return cast(Tensor, self.conv(doubled(x)))


class RepConv(nn.Module):
    """A 3x3 and a 1x1 convolution side by side, each with its norm, summed, SiLU.

    Where input and output are equally wide a norm of the input is a third branch. `fuse` makes one
    3x3 convolution with a bias of them: `conv`, None before.
    """

    def __init__(self, in_chans: int, out_chans: int) -> None:
        """Build the branches."""
        super().__init__()
        self.branches: nn.ModuleList | None = nn.ModuleList(
            [Conv(in_chans, out_chans, 3, act=False), Conv(in_chans, out_chans, 1, act=False)]
        )
        self.identity = _norm(in_chans) if in_chans == out_chans else None
        self.conv: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Any float type."""
        if self.conv is not None:
            return F.silu(self.conv(x))
        wide, narrow = cast(nn.ModuleList, self.branches)
        total = wide(x) + narrow(x)
        if self.identity is not None:
            total = total + self.identity(x)
        return F.silu(total)

    @torch.no_grad()
    def fuse(self) -> None:
        """Replace the branches by their sum, in place."""
        if self.branches is None:
            return
        wide, narrow = (cast(Conv, branch) for branch in self.branches)
        weight, bias = _folded(wide.conv, cast(nn.BatchNorm2d, wide.norm))
        thin, shift = _folded(narrow.conv, cast(nn.BatchNorm2d, narrow.norm))
        weight, bias = weight + F.pad(thin, (1, 1, 1, 1)), bias + shift
        if self.identity is not None:
            scale, shift = _scale_shift(self.identity)
            weight[:, :, 1, 1] += torch.diag(scale)
            bias = bias + shift
        out_chans, in_chans = weight.shape[:2]
        conv = nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=False, device="meta")
        conv.weight.requires_grad_(wide.conv.weight.requires_grad)
        conv.train(self.training)
        _set(conv, weight, bias)
        self.conv, self.branches, self.identity = conv, None, None


class ELAN(nn.Module):
    """Two 1x1 and two chains of 3x3 convolutions, all four results joined."""

    def __init__(self, in_chans: int, hidden: int, out_chans: int, *, num_convs: int = 2) -> None:
        """Build; `num_convs` 3x3 convolutions in each of the two chains."""
        super().__init__()
        self.a = Conv(in_chans, hidden)
        self.b = Conv(in_chans, hidden)
        self.c = nn.Sequential(*(Conv(hidden, hidden, 3) for _ in range(num_convs)))
        self.d = nn.Sequential(*(Conv(hidden, hidden, 3) for _ in range(num_convs)))
        self.out = Conv(4 * hidden, out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_chans, H, W)."""
        a, b = self.a(x), self.b(x)
        c = self.c(b)
        return cast(Tensor, self.out(torch.cat([self.d(c), c, b, a], 1)))


class ELANW(nn.Module):
    """ELAN of the neck: every convolution of one chain is joined, newest first."""

    def __init__(self, in_chans: int, out_chans: int, *, num_convs: int = 4) -> None:
        """Build; `num_convs` 3x3 convolutions in the chain, each half as wide as the output."""
        super().__init__()
        half = out_chans // 2
        self.a = Conv(in_chans, out_chans)
        self.b = Conv(in_chans, out_chans)
        widths = [out_chans] + [half] * (num_convs - 1)
        self.chain = nn.ModuleList(Conv(width, half, 3) for width in widths)
        self.out = Conv(2 * out_chans + num_convs * half, out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_chans, H, W)."""
        joined = [self.b(x), self.a(x)]
        for conv in self.chain:
            joined.insert(0, conv(joined[0]))
        return cast(Tensor, self.out(torch.cat(joined, 1)))


class Down(nn.Module):
    """Halves the size: a strided convolution beside a pooled one."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        """Build; the result has 2 out_chans channels and those of what is joined to it."""
        super().__init__()
        self.pooled = Conv(in_chans, out_chans)
        self.narrow = Conv(in_chans, out_chans)
        self.strided = Conv(out_chans, out_chans, 3, stride=2)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """(B, C, H, W), and maps of half the size to join -> (B, C', H/2, W/2)."""
        pooled = self.pooled(F.max_pool2d(x, 2))
        return torch.cat([self.strided(self.narrow(x)), pooled, *others], 1)


class SPPCSPC(nn.Module):
    """Spatial pyramid pooling beside a shortcut."""

    def __init__(self, in_chans: int, out_chans: int, *, kernels: Sequence[int] = (5, 9, 13)):
        """Build; `kernels` of the pools, odd, in cells, ascending."""
        super().__init__()
        self.kernels = tuple(kernels)
        self.before = nn.Sequential(
            Conv(in_chans, out_chans), Conv(out_chans, out_chans, 3), Conv(out_chans, out_chans)
        )
        self.after = nn.Sequential(
            Conv((1 + len(self.kernels)) * out_chans, out_chans), Conv(out_chans, out_chans, 3)
        )
        self.shortcut = Conv(in_chans, out_chans)
        self.out = Conv(2 * out_chans, out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_chans, H, W)."""
        main = self.before(x)
        pools, last, seen = [], main, 1
        for size in self.kernels:
            # The largest of the largest: what a smaller pool has seen need not be looked at again.
            step = size - seen + 1
            last, seen = F.max_pool2d(last, step, 1, step // 2), size
            pools.append(last)
        main = self.after(torch.cat([main, *pools], 1))
        return cast(Tensor, self.out(torch.cat([main, self.shortcut(x)], 1)))


class CSP(nn.Module):
    """A bottleneck beside a plain 1x1, joined under one norm and leaky ReLU (segmentation heads).

    `fuse` leaves that norm alone, as the released graph does; `fuse_joined` folds it as well.
    """

    def __init__(self, in_chans: int, out_chans: int) -> None:
        """Build; both ways are half as wide as the output, which must be even."""
        super().__init__()
        half = out_chans // 2
        self.main = nn.Sequential(
            Conv(in_chans, half), Conv(half, half), Conv(half, half, 3), _plain(half, half)
        )
        self.side = _plain(in_chans, half)
        self.norm: nn.BatchNorm2d | None = _norm(2 * half)
        self.out = Conv(2 * half, out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_chans, H, W)."""
        x = torch.cat([self.main(x), self.side(x)], 1)
        if self.norm is not None:
            x = self.norm(x)
        return cast(Tensor, self.out(F.leaky_relu(x, 0.1)))

    @torch.no_grad()
    def fuse_joined(self) -> None:
        """Fold the norm after the join into the two convolutions before it, in place."""
        if self.norm is None:
            return
        scales, shifts = (part.chunk(2) for part in _scale_shift(self.norm))
        for conv, scale, shift in zip((self.main[-1], self.side), scales, shifts, strict=True):
            plain = cast(nn.Conv2d, conv)
            _set(plain, plain.weight * scale[:, None, None, None], shift)
        self.norm = None


class ChannelAttention(nn.Module):
    """Weights channels by a small network on their means, x w + x (lane head).

    No text mentions it; the released graph has it.
    """

    def __init__(self, in_chans: int, hidden: int) -> None:
        """Build two linear layers without bias, in_chans -> hidden -> in_chans."""
        super().__init__()
        self.wide = nn.Linear(in_chans, hidden, bias=False)
        self.narrow = nn.Linear(hidden, in_chans, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), unchanged in shape."""
        weight = torch.sigmoid(self.narrow(F.silu(self.wide(x.mean((2, 3))))))
        return x * weight[:, :, None, None] + x


class Implicit(nn.Module):
    """A learned vector, one value a channel, that is added or multiplied."""

    def __init__(self, channels: int, *, mean: float) -> None:
        """Draw from N(mean, 0.02): mean 0 for a vector to add, 1 for one to multiply by."""
        super().__init__()
        self.vector = nn.Parameter(torch.empty(channels).normal_(mean, IMPLICIT_STD))

    def forward(self) -> Tensor:
        """(1, C, 1, 1)."""
        return self.vector[None, :, None, None]


def _plain(in_chans: int, out_chans: int) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 1, bias=False)


def _scale_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A norm in eval mode as scale and shift, each (C,)."""
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight / torch.sqrt(var + norm.eps)
    return scale, norm.bias - mean * scale


def _folded(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does what the two do."""
    scale, shift = _scale_shift(norm)
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    # A transposed convolution has its outputs in the second dimension.
    shape = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    return conv.weight * scale.view(shape), shift


def _set(conv: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor, bias: Tensor) -> None:
    """New parameters that train as the old weight did."""
    trains = conv.weight.requires_grad
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=trains)
    conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=trains)
