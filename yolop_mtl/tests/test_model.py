"""The network: counts and shapes of the released one, tasks as data, folding, what depends on what.

Numbers are those of the released network's graph (papers/yolopv2.md, sections 1.2 to 1.6).
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from yolop_mtl import build_model, fuse
from yolop_mtl.model import PRESETS, TASKS, YOLOPv2

from .networks import num_parameters, randomize


def on_meta(preset: str = "release", **options: object) -> YOLOPv2:
    with torch.device("meta"):
        return build_model(preset, **options)


@pytest.fixture(scope="module")
def release() -> YOLOPv2:
    return on_meta().eval()


def nano(**options: object) -> YOLOPv2:
    torch.manual_seed(0)
    return build_model("nano", **options)


# ---- counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("backbone.stem", 130_464),
        ("backbone.e2", 230_656),
        ("backbone.d3", 213_760),
        ("backbone.e3", 920_064),
        ("backbone.d4", 853_504),
        ("backbone.e4", 3_675_136),
        ("backbone.d5", 3_410_944),
        ("backbone.e5", 3_937_280),
        ("backbone", 13_371_808),
        ("neck.spp", 7_609_344),
        ("neck.r5", 131_584),
        ("neck.l4", 262_656),
        ("neck.n4", 1_264_128),
        ("neck.r4", 33_024),
        ("neck.l3", 65_792),
        ("neck.n3", 316_672),
        ("neck.p4d", 180_992),
        ("neck.p4", 1_264_128),
        ("neck.p5d", 722_432),
        ("neck.p5", 5_051_392),
        ("neck", 16_902_144),
        ("detection", 6_657_018),
        ("detection.convs", 6_196_736),
        ("detection.outputs", 457_725),
        ("drivable", 1_372_680 + 148),
        ("lane", 413_120 + 74 + 262_144),
        ("lane.attention", 262_144),
    ],
)
def test_parameters_of_each_part(release: YOLOPv2, part: str, expected: int) -> None:
    assert num_parameters(release.get_submodule(part)) == expected


def test_implicit_vectors_have_2557_values(release: YOLOPv2) -> None:
    detection = release.detection
    assert num_parameters(detection.adds) + num_parameters(detection.muls) == 2_557


@pytest.mark.parametrize(
    ("preset", "options", "expected"),
    [
        ("release", {}, 38_979_136),
        ("release", {"use_repconv": True}, 39_670_848),
        ("release", {"use_deconv_bias": False}, 38_978_968),
        ("base", {"num_classes": 80}, 38_979_136),
        ("base", {"num_classes": 10}, 38_601_556),
        ("base", {"num_classes": 10, "use_repconv": True}, 39_293_268),
        ("base", {"num_classes": 1}, 38_553_010),
        ("base", {"num_classes": 1, "use_repconv": True}, 39_244_722),
        ("base", {"num_classes": 1, "use_deconv_bias": False}, 38_552_842),
    ],
)
def test_parameters_unfolded(preset: str, options: dict[str, object], expected: int) -> None:
    assert num_parameters(on_meta(preset, **options)) == expected


@pytest.mark.parametrize("use_repconv", [False, True])
@pytest.mark.parametrize("use_deconv_bias", [False, True])
def test_parameters_folded(use_repconv: bool, use_deconv_bias: bool) -> None:
    options = {"use_repconv": use_repconv, "use_deconv_bias": use_deconv_bias}
    model = fuse(on_meta(**options).eval())
    assert num_parameters(model) == 38_954_661
    model.detection.merge_implicit()
    assert num_parameters(model) == 38_952_104


def test_parameters_folded_completely() -> None:
    model = fuse(on_meta().eval(), completely=True)
    assert num_parameters(model) == 38_954_453 - 2_557
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_nearest_neighbours_in_the_place_of_transposed_convolutions() -> None:
    """A 3x3 convolution has 9 kernels where a 2x2 one has 4, and no bias beside its norm."""
    usual, other = on_meta("base"), on_meta("base", lane_upsample="nearest")
    more = 5 * (128 * 128 + 32 * 32 + 8 * 8) - (128 + 32 + 8)
    assert num_parameters(other) == num_parameters(usual) + more
    assert not [m for m in other.modules() if isinstance(m, nn.ConvTranspose2d)]
    model = randomize(nano(lane_upsample="nearest"))
    x = torch.rand(1, model.lane.deconv1.conv.conv.in_channels, 2, 3)
    big = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(model.lane.deconv1(x), model.lane.deconv1.conv(big))


def test_without_attention_the_count_is_not_that_of_the_release() -> None:
    model = fuse(on_meta("base", num_classes=80, use_attention=False).eval())
    assert round(num_parameters(model), -5) == 38_700_000


@pytest.mark.parametrize(
    ("use_repconv", "convs", "norms", "channels", "buffers"),
    [(False, 125, 121, 24_515, 49_151), (True, 128, 124, 26_307, 52_738)],
)
def test_modules(use_repconv: bool, convs: int, norms: int, channels: int, buffers: int) -> None:
    modules = list(on_meta(use_repconv=use_repconv).modules())
    found = [module for module in modules if isinstance(module, nn.Conv2d)]
    batch_norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
    assert len(found) == convs
    assert {conv.groups for conv in found} == {1}
    assert sum(isinstance(module, nn.ConvTranspose2d) for module in modules) == 3
    assert sum(isinstance(module, nn.Linear) for module in modules) == 2
    assert len(batch_norms) == norms
    assert sum(norm.num_features for norm in batch_norms) == channels
    assert sum(b.numel() for norm in batch_norms for b in norm.buffers()) == buffers


def test_multiplications_of_the_release(release: YOLOPv2) -> None:
    with FlopCounterMode(display=False) as counter:
        release(torch.empty(1, 3, 384, 640, device="meta"))
    counts = counter.get_flop_counts()
    parts = ("Global", *(f"YOLOPv2.{p}" for p in ("backbone", "neck", *TASKS)))
    giga = {part: round(sum(counts[part].values()) / 2e9, 2) for part in parts}
    assert list(giga.values()) == [36.19, 19.84, 7.68, 3.84, 2.40, 2.43]


# ---- shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "cells", "anchors"),
    [
        ((384, 640), [(48, 80), (24, 40), (12, 20)], 15_120),
        ((640, 640), [(80, 80), (40, 40), (20, 20)], 25_200),
        ((352, 672), [(44, 84), (22, 42), (11, 21)], 14_553),
        ((736, 1280), [(92, 160), (46, 80), (23, 40)], 57_960),
        ((32, 32), [(4, 4), (2, 2), (1, 1)], 63),
    ],
)
def test_shapes(
    release: YOLOPv2, size: tuple[int, int], cells: list[tuple[int, int]], anchors: int
) -> None:
    with torch.no_grad():
        out = release(torch.empty(2, 3, *size, device="meta"))
    assert [x.shape for x in out["detection"]] == [(2, 255, *cell) for cell in cells]
    assert sum(3 * rows * columns for rows, columns in cells) == anchors
    assert (out["drivable"].shape, out["lane"].shape) == ((2, 2, *size), (2, 1, *size))


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_of_other_multiples_of_32(preset: str) -> None:
    model = on_meta(preset)
    for height, width in ((96, 32), (224, 416), (160, 992)):
        out = model(torch.empty(1, 3, height, width, device="meta"))
        assert [x.shape[2:] for x in out["detection"]] == [
            (height // s, width // s) for s in (8, 16, 32)
        ]
        assert out["drivable"].shape[2:] == out["lane"].shape[2:] == (height, width)


def test_another_size_is_refused(release: YOLOPv2) -> None:
    with pytest.raises(
        ValueError,
        match=r"images: got 360 x 640 pixels, expected a height and a width that are multiples of "
        r"32; letterbox to 352 x 640 or another such size",
    ):
        release(torch.empty(1, 3, 360, 640, device="meta"))
    with pytest.raises(ValueError, match="images: got 1x4x64x64, expected B x 3 x H x W; pass a"):
        release(torch.empty(1, 4, 64, 64, device="meta"))


def test_one_class_has_18_channels_and_more_drivable_classes_are_possible() -> None:
    out = on_meta("nano", num_drivable=3)(torch.empty(1, 3, 64, 64, device="meta"))
    assert [x.shape[1] for x in out["detection"]] == [18] * 3
    assert out["drivable"].shape[1] == 3


def test_nano_has_less_than_a_million_parameters() -> None:
    assert num_parameters(on_meta("nano")) < 1_000_000
    assert num_parameters(on_meta("small")) < 10_000_000


def test_start_expects_eight_objects_per_image() -> None:
    raw = [conv.bias.view(3, -1) for conv in build_model("nano", num_classes=4).detection.outputs]
    bound = [1 / conv.in_channels**0.5 for conv in nano().detection.outputs]
    for bias, spread, prior in zip(raw, bound, (-6.6846, -5.2983, -3.9120), strict=True):
        assert (bias[:, 4] - prior).abs().max() < spread + 1e-4
    share = torch.tensor([-6.6846, -5.2983, -3.9120]).sigmoid().tolist()
    assert share == pytest.approx([0.00125, 0.00498, 0.01961], rel=5e-3)


def test_start_expects_lanes_on_a_fiftieth_of_the_pixels() -> None:
    head = build_model("nano", tasks=["lane"]).lane
    assert head.output.norm.bias.sigmoid().item() == pytest.approx(0.02)


# ---- tasks ----------------------------------------------------------------------------------

SUBSETS = [subset for count in (1, 2, 3) for subset in itertools.combinations(TASKS, count)]


@pytest.mark.parametrize("tasks", SUBSETS, ids="-".join)
def test_any_subset_of_tasks_gives_its_outputs_and_trains_all_it_has(tasks: tuple[str]) -> None:
    model = nano(tasks=tasks, num_classes=2)
    assert model.tasks == tasks
    out = model(torch.rand(2, 3, 64, 64))
    assert tuple(out) == tasks
    total = sum(x.square().sum() for x in out.get("detection", ()))
    total = total + sum(out[task].square().sum() for task in tasks if task != "detection")
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("tasks", SUBSETS, ids="-".join)
def test_a_task_alone_computes_what_it_computes_among_all(tasks: tuple[str]) -> None:
    whole = randomize(nano())
    part = nano(tasks=tasks)
    unused = part.load_state_dict(whole.state_dict(), strict=False)
    assert unused.missing_keys == []
    images = torch.rand(1, 3, 32, 64)
    with torch.no_grad():
        expected, got = whole(images), part.eval()(images)
    for task in tasks:
        for mine, other in zip(_list(got[task]), _list(expected[task]), strict=True):
            assert torch.equal(mine, other)


def _list(x: object) -> list[torch.Tensor]:
    return x if isinstance(x, list) else [x]


def test_a_task_that_is_off_costs_nothing() -> None:
    whole = on_meta("base")
    for task in ("drivable", "lane"):
        rest = on_meta("base", tasks=[t for t in TASKS if t != task])
        head = num_parameters(getattr(whole, task))
        assert num_parameters(rest) == num_parameters(whole) - head
    # The drivable head takes F4; all that comes after it is only for the others.
    later = ("n4", "r4", "l3", "n3", "p4d", "p4", "p5d", "p5")
    alone = on_meta("base", tasks=["drivable"])
    assert num_parameters(alone.neck) == num_parameters(whole.neck) - sum(
        num_parameters(getattr(whole.neck, name)) for name in later
    )
    alone = on_meta("base", tasks=["lane"])
    assert num_parameters(alone.neck) == num_parameters(whole.neck) - sum(
        num_parameters(getattr(whole.neck, name)) for name in later[3:]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "bass"}, r"preset: got 'bass', expected a known one; did you mean 'base'\?"),
        ({"tasks": []}, "tasks: got none, expected one or more of detection, drivable, lane; name"),
        ({"tasks": ["lanes"]}, r"tasks: got 'lanes', expected known tasks; did you mean 'lane'\?"),
        ({"num_classes": 0}, "num_classes: got 0, expected 1 or more; correct it"),
        (
            {"preset": "release", "num_classes": 1},
            "num_classes: got 1 for preset release, expected 80; leave it out, or take preset base",
        ),
        (
            {"lane_upsample": "nearst"},
            r"lane_upsample: got 'nearst', expected a known one; did you mean 'nearest'\?",
        ),
        ({"num_drivable": 1}, "num_drivable: got 1, expected 2 or more; count the background too"),
        ({"anchors": [[[1, 2]]]}, "anchors: got 1 x 1 x 2, expected 3 scales x anchors x 2; give"),
        (
            {"anchors": [[[1, 2]], [[1, 2], [3, 4]], [[1, 2]]]},
            "anchors: got .*, expected as many .* pairs for each scale; give every scale as many",
        ),
        (
            {"anchors": [[[1, 2]], [[0, 2]], [[1, 2]]]},
            "anchors: got .*, expected sizes of more than 0 pixels; correct them",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    options = {"preset": "nano"} | options
    with pytest.raises(ValueError, match=message):
        on_meta(**options)


# ---- what depends on what -------------------------------------------------------------------


def _reached(model: YOLOPv2, task: str) -> set[str]:
    """Parts that a task's output has a gradient to."""
    model.zero_grad()
    out = model(torch.rand(2, 3, 64, 64))[task]
    sum(x.square().sum() for x in _list(out)).backward()
    parts = {
        ".".join(name.split(".")[: 2 if name.startswith("neck") else 1])
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    return parts


def test_each_head_depends_on_its_own_part_of_the_neck() -> None:
    model = nano()
    shared = {"backbone", "neck.spp", "neck.r5", "neck.l4"}
    top_down = shared | {"neck.n4", "neck.r4", "neck.l3"}
    bottom_up = {"neck.n3", "neck.p4d", "neck.p4", "neck.p5d", "neck.p5"}
    assert _reached(model, "drivable") == shared | {"drivable"}
    assert _reached(model, "lane") == top_down | {"lane"}
    assert _reached(model, "detection") == top_down | bottom_up | {"detection"}


# ---- folding --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"use_repconv": True}, {"lane_upsample": "nearest"}], ids=str
)
@pytest.mark.parametrize("completely", [False, True])
def test_a_folded_network_computes_the_same(options: dict[str, object], completely: bool) -> None:
    model = randomize(nano(**options, num_classes=2))
    folded = fuse(copy.deepcopy(model), completely=completely)
    assert num_parameters(folded) < num_parameters(model)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected, got = model(images), folded(images)
    for task in TASKS:
        for mine, other in zip(_list(got[task]), _list(expected[task]), strict=True):
            assert torch.allclose(mine, other, atol=1e-4)
            assert other.std() > 1e-2  # not a test of zeros


def test_folding_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="model: got one in training mode, expected one in eval"):
        fuse(on_meta("nano"))


def test_an_image_alone_equals_the_image_in_a_batch() -> None:
    model = randomize(nano())
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        batch, alone = model(images), model(images[1:2])
    for task in TASKS:
        for many, one in zip(_list(batch[task]), _list(alone[task]), strict=True):
            assert torch.allclose(many[1:2], one, atol=1e-5)
