"""Packed convolutions: the same outputs, of any size and kind of network."""

import copy

import pytest
import torch

from yolop_mtl import build_model, fuse, packed
from yolop_mtl.model import YOLOPv2
from yolop_mtl.packed import PackedConv, pack

from .networks import randomize

pytestmark = pytest.mark.skipif(
    not packed.is_available(), reason="this build of torch has no oneDNN"
)


def folded(**options: object) -> YOLOPv2:
    torch.manual_seed(0)
    return fuse(randomize(build_model("nano", **options)), completely=True)


def flat(out: dict[str, object]) -> list[torch.Tensor]:
    return [*out.get("detection", []), *(out[name] for name in ("drivable", "lane") if name in out)]


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 2},
        {"num_classes": 1, "use_repconv": True, "use_attention": False},
        {"tasks": ["lane"], "lane_upsample": "nearest"},
        {"tasks": ["drivable"], "num_drivable": 3},
    ],
)
@torch.inference_mode()
def test_outputs_stay_the_same(options: dict[str, object]) -> None:
    model = folded(**options)
    fast = pack(copy.deepcopy(model), (64, 96))
    kinds = {type(module) for module in fast.modules()}
    assert PackedConv in kinds
    assert not kinds & {torch.nn.Conv2d, torch.nn.ConvTranspose2d}
    for shape in ((1, 3, 64, 96), (2, 3, 64, 96), (1, 3, 96, 64)):  # packed for the first
        images = torch.rand(shape)
        for one, other in zip(flat(model(images)), flat(fast(images)), strict=True):
            assert one.std() > 1e-3
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_outputs_in_bfloat16() -> None:
    model = folded(num_classes=2)
    exact = flat(model(images := torch.rand(1, 3, 64, 96)))
    usual = copy.deepcopy(model).to(torch.bfloat16)
    fast = pack(copy.deepcopy(model), (64, 96), dtype=torch.bfloat16)
    assert fast.detection.anchors.equal(model.detection.anchors)
    for a, b, c in zip(exact, flat(usual(images.bfloat16())), flat(fast(images)), strict=True):
        assert c.dtype == torch.bfloat16
        # No further from the truth than what it replaces, which rounds once more.
        assert (c - a).abs().mean() <= 1.1 * (b - a).abs().mean()


def test_what_cannot_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(build_model("nano"))
    with pytest.raises(ValueError, match=r"model: got backbone\.stem\.0 with its norm, expected a"):
        pack(model, (64, 96))
    with pytest.raises(ValueError, match=r"expected a folded network; call yolop_mtl\.fuse"):
        pack(fuse(model).train(), (64, 96))
    with pytest.raises(ValueError, match="model: got one on meta, expected one on the CPU"):
        pack(folded().to("meta"), (64, 96))
    monkeypatch.setattr(packed, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"pack: got torch .* without oneDNN, expected one with"):
        pack(folded(), (64, 96))
