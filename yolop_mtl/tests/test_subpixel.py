"""Narrow layers on cells of pixels: the same outputs as on pixels."""

import copy

import pytest
import torch
from torch.nn import functional as F

from yolop_mtl import build_model, fuse
from yolop_mtl.export_graph import Deployable
from yolop_mtl.heads import DrivableHead, LaneHead
from yolop_mtl.model import TASKS, YOLOPv2
from yolop_mtl.predictor import Predictor
from yolop_mtl.subpixel import (
    Kind,
    SubpixelDrivableHead,
    SubpixelLaneHead,
    cell_kernel,
    to_subpixel,
)

from .networks import randomize


def folded(preset: str = "nano", **options: object) -> YOLOPv2:
    torch.manual_seed(0)
    return fuse(randomize(build_model(preset, **options)), completely=True)


def by_pixels(x: torch.Tensor, weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    if kind == "transposed":
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    if kind == "doubled":
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


@pytest.mark.parametrize(
    ("kind", "kernel", "in_cell", "out_cell", "padding", "stride"),
    [
        ("plain", 1, 2, 2, 0, 1), ("plain", 3, 1, 2, 1, 2), ("plain", 3, 2, 2, 1, 1),
        ("plain", 3, 2, 4, 1, 2), ("plain", 5, 1, 4, 2, 4), ("plain", 5, 4, 4, 1, 1),
        ("doubled", 1, 1, 2, 0, 1), ("doubled", 3, 1, 2, 1, 1), ("doubled", 3, 2, 4, 1, 1),
        ("doubled", 3, 1, 4, 1, 2), ("transposed", 2, 1, 2, 0, 1), ("transposed", 2, 2, 4, 0, 1),
        ("transposed", 2, 1, 4, 0, 2),
    ],
)  # fmt: skip
def test_a_kernel_on_cells_is_the_kernel_on_pixels(
    kind: Kind, kernel: int, in_cell: int, out_cell: int, padding: int, stride: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 8, 12, generator=generator, dtype=torch.float64)
    weight = torch.rand(5, 3, kernel, kernel, generator=generator, dtype=torch.float64)
    wide, *geometry = cell_kernel(weight, kind, in_cell, out_cell)
    assert geometry == [padding, stride]
    # Every tap once for every pixel of a cell (a quarter of the taps, where each has its own).
    share = 4 if kind == "transposed" else 1
    assert wide.sum().item() == pytest.approx(weight.sum().item() * out_cell**2 / share)
    cells = F.conv2d(F.pixel_unshuffle(x, in_cell), wide, padding=padding, stride=stride)
    torch.testing.assert_close(F.pixel_shuffle(cells, out_cell), by_pixels(x, weight, kind))


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 2},
        {"preset": "small", "use_attention": False},
        {"tasks": ["lane"], "lane_upsample": "nearest"},
        {"tasks": ["lane"], "use_deconv_bias": False},
        {"tasks": ["drivable"], "num_drivable": 3},
        {"tasks": ["detection"]},
    ],
    ids=str,
)
@torch.inference_mode()
def test_outputs_stay_the_same(options: dict[str, object]) -> None:
    model = folded(**options)
    fast = to_subpixel(copy.deepcopy(model))
    kinds = {type(module) for module in fast.modules()}
    assert not kinds & {DrivableHead, LaneHead}
    for shape in ((1, 3, 32, 32), (2, 3, 64, 96), (1, 3, 96, 64)):
        images = torch.rand(shape)
        expected, got = model(images), fast(images)
        assert got.keys() == expected.keys()
        for task in TASKS[1:]:
            if task in expected:
                assert expected[task].std() > 1e-3
                torch.testing.assert_close(got[task], expected[task], rtol=1e-4, atol=1e-5)


def test_prediction_and_export_use_it() -> None:
    torch.manual_seed(0)
    model = randomize(build_model("nano"))
    exported = Deployable(model).model
    predictor = Predictor(copy.deepcopy(model), class_names=("vehicle",), img_size=(64, 96))
    for used in (exported, predictor.model):
        assert isinstance(used.drivable, SubpixelDrivableHead)
        assert isinstance(used.lane, SubpixelLaneHead)
    assert isinstance(model.drivable, DrivableHead)  # a copy was changed


def test_weights_stay_as_trainable_and_as_exact_as_they_were() -> None:
    model = to_subpixel(folded().requires_grad_(False).to(torch.bfloat16))
    parameters = dict(model.named_parameters())
    assert {value.dtype for value in parameters.values()} == {torch.bfloat16}
    assert not any(value.requires_grad for value in parameters.values())
    assert not any(module.training for module in model.modules())
    assert to_subpixel(model) is model  # twice is once
    assert parameters.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("completely", [None, False])
def test_norms_must_be_folded(completely: bool | None) -> None:
    model = build_model("nano").eval()
    if completely is not None:
        fuse(model, completely=completely)
    with pytest.raises(ValueError, match=r"model: got one with a norm, .*, expected a folded netw"):
        to_subpixel(model)
