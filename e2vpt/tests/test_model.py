"""What is counted, which options there are, and that the backbone comes back as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models import create_model
from timm.models.vision_transformer import VisionTransformer

from e2vpt.model import (
    PromptedModel,
    PromptSpec,
    parameter_report,
    prompt,
    remove,
    with_token_form,
)
from shared_utils.errors import InputError

from .prompted_models import changed, images, micro, model_of, plain, snapshot, train_steps


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- the parameter table -------------------------------------------------------------------------


def on_meta(
    name: str, num_classes: int, num_visual: int, num_kv: int, **options: Any
) -> PromptedModel:
    with torch.device("meta"):
        return prompt(create_model(name), num_classes, num_visual, num_kv, **options)


@pytest.mark.parametrize(
    ("num_visual", "num_kv", "num_classes", "visual", "kv", "head", "tuned", "total", "percent"),
    [
        (10, 5, 100, 92_160, 46_080, 76_900, 215_140, 86_013_796, 0.2501),
        (5, 5, 100, 46_080, 46_080, 76_900, 169_060, 85_967_716, 0.1967),
        (1, 1, 102, 9_216, 9_216, 78_438, 96_870, 85_895_526, 0.1128),
        (32, 5, 102, 294_912, 46_080, 78_438, 419_430, 86_218_086, 0.4865),
        (10, 10, 2, 92_160, 92_160, 1_538, 185_858, 85_984_514, 0.2162),
        (100, 20, 18, 921_600, 184_320, 13_842, 1_119_762, 86_918_418, 1.2883),
        (10, 0, 100, 92_160, 0, 76_900, 169_060, 85_967_716, 0.1967),  # VPT-Deep
        (50, 0, 10, 460_800, 0, 7_690, 468_490, 86_267_146, 0.5431),  # VPT-Deep
    ],
)
def test_vit_b16_counts_are_the_papers(
    num_visual: int, num_kv: int, num_classes: int, visual: int, kv: int, head: int, tuned: int,
    total: int, percent: float,
) -> None:  # fmt: skip
    model = on_meta("vit_base_patch16_224", num_classes, num_visual, num_kv)
    report = parameter_report(model)
    assert round(report.pop("percent"), 4) == percent
    assert report == {
        "visual": visual, "kv": kv, "adapters": 0, "head": head, "backbone": 0, "tuned": tuned,
        "total": total,
    }  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == tuned


@pytest.mark.parametrize(
    ("name", "backbone", "per_prompt", "head"),
    [
        ("vit_small_patch16_224", 21_665_664, 4_608, 385),
        ("vit_base_patch16_224", 85_798_656, 9_216, 769),
        ("vit_large_patch16_224", 303_301_632, 24_576, 1_025),
    ],
)
def test_counts_of_the_three_sizes(name: str, backbone: int, per_prompt: int, head: int) -> None:
    report = parameter_report(on_meta(name, 10, 3, 2))
    assert report["visual"] == 3 * per_prompt
    assert report["kv"] == 2 * per_prompt
    assert report["head"] == 10 * head
    assert report["total"] - report["visual"] - report["kv"] - report["head"] == backbone


def test_counts_of_the_options() -> None:
    def report(**options: Any) -> dict[str, float]:
        return parameter_report(on_meta("vit_base_patch16_224", 100, 10, 5, **options))

    assert report(share_kv=False)["kv"] == 2 * 46_080
    assert report(kv_deep=False)["kv"] == 5 * 768
    assert report(deep=False)["visual"] == 10 * 768
    assert report(prompt_dim=64)["visual"] == 12 * 10 * 64 + 64 * 768 + 768
    bare = parameter_report(on_meta("vit_base_patch16_224", 100, 0, 0))
    assert bare == {"visual": 0, "kv": 0, "adapters": 0, "head": 76_900, "backbone": 0,
                    "tuned": 76_900, "total": 85_875_556,
                    "percent": 100 * 76_900 / 85_875_556}  # fmt: skip


def test_counts_of_a_backbone_that_trains() -> None:
    backbone = plain(num_classes=0)
    everything = sum(p.numel() for p in backbone.parameters())
    biases = sum(p.numel() for n, p in backbone.named_parameters() if n.endswith("bias"))
    full = parameter_report(model_of(backbone, backbone_trains="full"))
    assert full["backbone"] == everything
    assert full["tuned"] == full["total"] == everything + full["visual"] + full["kv"] + full["head"]
    assert full["percent"] == 100
    report = parameter_report(model_of(plain(), backbone_trains="bias"))
    assert report["backbone"] == biases
    assert report["tuned"] == biases + report["visual"] + report["kv"] + report["head"]


def test_the_backbones_own_classifier_is_neither_counted_nor_saved() -> None:
    for classes in (0, 7, 1000):
        model = model_of(plain(num_classes=classes))
        assert not any(n.startswith("backbone.head") for n in model.state_dict())
        assert parameter_report(model)["total"] == parameter_report(model_of(plain()))["total"]


# --- the head and the options of `prompt` --------------------------------------------------------


def test_parity_head_starts_as_the_papers_code_has_it() -> None:
    head = model_of(plain(embed_dim=96), num_classes=500, parity_head=True).head
    assert head.bias.unique().tolist() == pytest.approx([-4.59512], abs=5e-6)
    assert head.weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.02)  # fan out


def test_head_starts_near_zero() -> None:
    head = model_of(plain(embed_dim=96), num_classes=500).head
    assert head.bias.abs().max() == 0
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_logits_are_the_head_of_the_features() -> None:
    model = model_of(plain()).eval()
    logits = model(images())
    assert logits.shape == (4, 3)
    assert torch.equal(logits, model.head(model.features(images())))


def test_prompt_passes_every_option_on() -> None:
    options = {
        "deep": False, "share_kv": False, "kv_deep": False, "kv_init": "patch",
        "prompt_dropout": 0.3, "prompt_dim": 6, "pool_prompts": True, "token_form": True,
        "parity_head": True,
    }  # fmt: skip
    model = prompt(micro(), 3, 4, 2, **options)
    assert model.spec.dict() == {
        "num_classes": 3, "num_visual_prompts": 4, "num_kv_prompts": 2,
        "backbone_trains": "none", "partial_blocks": 1, "adapter": "none", "adapter_dim": 8,
        "adapter_scale": 1.0, "zeroed": False, "folded": False,
        "num_segments": 1, "num_kept_segments": 1,
        "interleaved_segments": False, "per_layer_segments": False, **options,
    }  # fmt: skip
    assert model.spec == PromptSpec(**model.spec.dict())
    assert [rows.shape for rows in model.visual.weight] == [(4, 6)]
    assert model.visual.dropout == 0.3
    assert [rows.shape for rows in model.kv.key] == [(2, 2, 8)]
    assert [rows.shape for rows in model.kv.value] == [(2, 2, 8)]
    assert (
        model.kv.key[0].abs().max() <= (6 / (3 * 4**2 + 16)) ** 0.5
    )  # by the backbone's patch size
    assert model.head.bias[0].item() == pytest.approx(-4.59512, abs=5e-6)


def test_prompt_defaults_are_the_papers() -> None:
    spec = prompt(plain(), 3).spec
    assert spec == PromptSpec(num_classes=3)
    assert (spec.num_visual_prompts, spec.num_kv_prompts) == (10, 5)
    assert spec.deep
    assert spec.share_kv
    assert spec.kv_deep
    assert (spec.kv_init, spec.prompt_dropout, spec.prompt_dim) == ("kaiming", 0.1, 0)
    assert (spec.pool_prompts, spec.token_form, spec.parity_head) == (False, False, False)


def test_init_ranges_follow_the_backbones_patch_size() -> None:
    model = model_of(
        plain(embed_dim=64, patch_size=4), num_visual_prompts=50, num_kv_prompts=50, kv_init="patch"
    )
    assert max(rows.abs().max().item() for rows in model.visual.weight) == pytest.approx(
        (6 / (3 * 16 + 64)) ** 0.5, rel=0.01
    )
    largest = max(rows.abs().max().item() for rows in model.kv.key)
    assert largest == pytest.approx((6 / (3 * 16 + 16)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, r"^num_classes: got 0, expected 1 or more; "),
        ({"num_visual_prompts": -1}, r"^num_visual_prompts: got -1, expected 0 or more; "),
        ({"num_kv_prompts": -2}, r"^num_kv_prompts: got -2, expected 0 or more; "),
        (
            {"backbone_trains": "some"},
            r"^backbone_trains: got some, expected none, bias, partial or full; ",
        ),
        ({"kv_init": "he"}, r"^kv_init: got 'he', expected kaiming, trunc-normal or patch; "),
        (
            {"pool_prompts": True},
            r"^pool_prompts: got True on a backbone that pools its class token, expected average ",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_of(plain(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"pool_prompts": True},
        {"kv_init": "he"},
        {"prompt_dropout": 1.0},
        {"prompt_dim": -3},
    ],
)
def test_a_refusal_leaves_the_backbone_alone(options: dict[str, Any]) -> None:
    backbone = uneven(plain)
    head = backbone.head
    trains = {n: p.requires_grad for n, p in backbone.named_parameters()}
    with pytest.raises(InputError):
        model_of(backbone, **options)
    assert backbone.head is head
    assert {n: p.requires_grad for n, p in backbone.named_parameters()} == trains
    assert not backbone.blocks[0].training
    assert backbone.blocks[1].training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_prompts_and_head_take_the_backbones_dtype(dtype: torch.dtype) -> None:
    model = model_of(plain().to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(images().to(dtype)).dtype == dtype


def test_pool_prompts_is_taken_by_an_average_pooling_backbone() -> None:
    assert model_of(micro(), pool_prompts=True).spec.pool_prompts


def test_with_token_form_switches_in_place_and_changes_no_output() -> None:
    model = model_of(plain().double()).double().eval()
    x = images().double()
    cheap = model(x)
    assert with_token_form(model, True) is model
    assert model.spec.token_form
    torch.testing.assert_close(model(x), cheap, atol=1e-12, rtol=0)
    assert not with_token_form(model, False).spec.token_form
    assert torch.equal(model(x), cheap)


# --- taking the prompts off ----------------------------------------------------------------------


def uneven(build: Callable[[], VisionTransformer]) -> VisionTransformer:
    """A backbone with flags and modes of every kind."""
    backbone = build().train()
    backbone.blocks[0].eval()
    backbone.head.eval()
    for i, parameter in enumerate(backbone.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    return backbone


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    "options", [{}, {"num_visual_prompts": 0, "num_kv_prompts": 0}, {"token_form": True}]
)
@pytest.mark.parametrize("build", [micro, plain])
def test_remove_gives_the_backbone_back_as_it_was(
    build: Callable[[], VisionTransformer], options: dict[str, Any], steps: int
) -> None:
    backbone = uneven(build)
    state, own_head = snapshot(backbone), backbone.head
    names = list(state)
    trains = {n: p.requires_grad for n, p in backbone.named_parameters()}
    modes = {n: m.training for n, m in backbone.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules()]
    with torch.no_grad():
        expected = copy.deepcopy(backbone).eval()(images())
    model = model_of(backbone, **options).train()
    train_steps(model, steps)
    model.eval()
    model(images())
    assert remove(model) is backbone
    assert list(backbone.state_dict()) == names
    assert changed(backbone, state) == set()
    assert backbone.head is own_head
    assert {n: p.requires_grad for n, p in backbone.named_parameters()} == trains
    assert {n: m.training for n, m in backbone.named_modules()} == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(backbone.eval()(images()), expected)


def test_remove_after_a_change_of_dtype() -> None:
    model = model_of(plain()).double()
    backbone = remove(model)
    assert backbone(images().double()).dtype == torch.float64


def test_removed_backbone_can_be_prompted_again() -> None:
    backbone = plain()
    first = prompt(backbone, 3)
    backbone = remove(first)
    second = prompt(backbone, 5).eval()
    assert second(images()).shape == (4, 5)
    assert remove(second).head.out_features == 7


def test_weights_that_were_tuned_stay_tuned_after_remove() -> None:
    for trains in ("full", "bias"):
        backbone = plain()
        before = snapshot(backbone)
        model = model_of(backbone, backbone_trains=trains).train()
        train_steps(model, 1)
        names = changed(remove(model), before)
        assert "blocks.0.attn.qkv.bias" in names
        assert ("blocks.0.attn.qkv.weight" in names) == (trains == "full")
        assert not any(n.startswith("head") for n in names)


def test_models_may_share_a_backbone_and_it_comes_back_whole() -> None:
    backbone = plain()
    head, x = backbone.head, images()
    expected = backbone.eval()(x)
    first, second = model_of(backbone), model_of(backbone)
    logits = second.eval()(x)
    assert remove(first) is backbone
    assert backbone.head is head
    assert torch.equal(backbone(x), expected)
    # Flags that are back change the last bits of torch's own linear layers.
    torch.testing.assert_close(second(x), logits)
    assert remove(second).head is head
    with pytest.raises(InputError, match="prompts were removed"):
        remove(second)
