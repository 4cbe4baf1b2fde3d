"""In which order the parts run and are joined, written out as in the released graph."""

import torch
from torch.nn import functional as F

from yolop_mtl import build_model
from yolop_mtl.blocks import SPPCSPC

from .networks import randomize

SIZE = (64, 96)


def twice(x: torch.Tensor) -> torch.Tensor:
    """Each cell becomes four: nearest."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_pyramid_pooling() -> None:
    block = randomize(SPPCSPC(8, 4))
    x = torch.randn(2, 8, 15, 14)
    main = block.before[2](block.before[1](block.before[0](x)))
    padded = F.pad(main, (6, 6, 6, 6), value=-torch.inf)
    pools = [
        F.max_pool2d(padded[:, :, 6 - k // 2 : 21 + k // 2, 6 - k // 2 : 20 + k // 2], k, 1)
        for k in (5, 9, 13)
    ]
    main = block.after[1](block.after[0](torch.cat([main, *pools], 1)))
    assert torch.equal(block(x), block.out(torch.cat([main, block.shortcut(x)], 1)))


def test_the_network() -> None:
    torch.manual_seed(0)
    model = randomize(build_model("nano", num_classes=2))
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        out = model(images)
        body, neck = model.backbone, model.neck
        c2 = body.e2(body.stem(images))
        c3 = body.e3(body.d3(c2))
        c4 = body.e4(body.d4(c3))
        c5 = body.e5(body.d5(c4))
        p5 = neck.spp(c5)
        f4 = torch.cat([neck.l4(c4), twice(neck.r5(p5))], 1)
        n4 = neck.n4(f4)
        f3 = torch.cat([neck.l3(c3), twice(neck.r4(n4))], 1)
        n3 = neck.n3(f3)
        p4 = neck.p4(torch.cat([neck.p4d(n3), n4], 1))
        p5 = neck.p5(torch.cat([neck.p5d(p4), p5], 1))

        head = model.detection
        for scale, x in enumerate((n3, p4, p5)):
            x = head.outputs[scale](head.convs[scale](x) + head.adds[scale]())
            assert torch.equal(out["detection"][scale], x * head.muls[scale]())

        head = model.drivable
        x = head.csp1(twice(head.conv1(f4)))
        x = head.conv3(twice(head.conv2(x)))
        x = head.csp2(head.conv4(twice(x)))
        x = head.output.norm(head.output.conv(twice(x)))  # no SiLU
        assert torch.equal(out["drivable"], x)

        head = model.lane
        x = head.conv1(head.attention(f3))
        x = head.conv2(head.csp1(head.deconv1(x)))
        x = head.csp2(head.conv3(head.deconv2(x)))
        x = head.output.norm(head.output.conv(head.deconv3(x)))
        assert torch.equal(out["lane"], x)


def test_a_transposed_convolution_ends_in_silu() -> None:
    block = randomize(build_model("nano", tasks=["lane"])).lane.deconv1
    x = torch.randn(1, block.conv.in_channels, 3, 4)
    assert torch.equal(block(x), F.silu(block.norm(block.conv(x))))
    assert block(x).shape[2:] == (6, 8)
