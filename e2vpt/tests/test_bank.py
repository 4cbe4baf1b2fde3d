"""Folding, and many tasks on one backbone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import e2vpt
from e2vpt.model import PromptedModel, PromptSpec, parameter_report
from shared_utils.errors import InputError

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (VisionTransformer, {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3,
                                "num_heads": 2}),
    "vit_avg_qk_norm": (VisionTransformer, {"img_size": 16, "patch_size": 8, "embed_dim": 16,
                        "depth": 3, "num_heads": 2, "global_pool": "avg", "qk_norm": True}),
    "eva": (Eva, {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2,
                  "use_rot_pos_emb": True, "ref_feat_shape": (2, 2)}),
    "eva_qk_norm": (Eva, {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3,
                    "num_heads": 2, "qk_norm": True, "qkv_fused": False, "global_pool": "avg"}),
    "swin": (SwinTransformer, {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16,
                               "depths": (2, 2), "num_heads": (2, 4)}),
    "swin_v2": (SwinTransformerV2, {"img_size": 32, "patch_size": 2, "window_size": 4,
                                    "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}),
}  # fmt: skip


def build(family: str) -> nn.Module:
    """A small backbone in float64 whose weights say something."""
    torch.manual_seed(0)
    kind, options = FAMILIES[family]
    backbone: nn.Module = kind(**options, num_classes=0).double().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return backbone


def task(backbone: nn.Module, seed: int, classes: int = 3, **spec: Any) -> PromptedModel:
    """Prompts and a head of their own."""
    torch.manual_seed(seed)
    options = {"num_visual_prompts": 3, "num_kv_prompts": 2, **spec}
    model = PromptedModel(backbone, PromptSpec(num_classes=classes, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                parameter.normal_()
    return model.eval()


def images_for(backbone: Any, count: int) -> Tensor:
    size = 32 if isinstance(backbone, SwinTransformer | SwinTransformerV2) else 16
    return torch.randn(
        count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "spec",
    [
        {}, {"share_kv": False}, {"num_kv_prompts": 0}, {"kv_deep": False}, {"prompt_dim": 6},
        {"prompt_dim": 6, "share_kv": False, "kv_deep": False}, {"token_form": True},
    ],
)  # fmt: skip
@torch.no_grad()
def test_folded_equals_unfolded(family: str, spec: dict[str, Any], tmp_path: Path) -> None:
    backbone = build(family)
    if "prompt_dim" in spec and family.startswith("swin"):
        with pytest.raises(InputError, match=r"^prompt_dim: got 6 on layers of widths 16, 32"):
            task(backbone, 1, **spec)
        return
    model, x = task(backbone, 1, **spec), images_for(backbone, 3)
    expected = model(x)
    fast = e2vpt.fold(model)
    assert fast.visual is None
    assert (fast(x) - expected).abs().max() < 1e-10
    assert torch.equal(model(x), expected)  # the argument is as it was
    without = task(backbone, 1, **{**spec, "num_visual_prompts": 0})
    without.head.load_state_dict(model.head.state_dict())
    assert (without(x) - expected).abs().max() > 1e-3  # the prompts matter
    single = copy.deepcopy(model).float()
    found = e2vpt.fold(single)(x.float())
    assert found.dtype == torch.float32
    assert (found - single(x.float())).abs().max() < 1e-5 * expected.abs().max()
    e2vpt.save(fast, tmp_path)
    assert torch.equal(e2vpt.load(tmp_path, build(family))(x), fast(x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [{}, {"interleaved": True}, {"per_layer": True}, {"interleaved": True, "per_layer": True}],
)
@torch.no_grad()
def test_pruned_segments_fold(family: str, how: dict[str, bool]) -> None:
    backbone = build(family)
    model, x = task(backbone, 1, share_kv=False), images_for(backbone, 3)
    scores = e2vpt.importance(model, [(x, torch.tensor([0, 1, 2]))], 4, **how)
    for compat in (False, True):
        small = e2vpt.prune(model, scores, 1, 3, compat=compat)
        expected, fast = small(x), e2vpt.fold(small)
        assert (expected - model(x)).abs().max() > 1e-3  # what went mattered
        assert (fast(x) - expected).abs().max() < 1e-10
        assert fast.kv is not None
        left = 3 if compat else 2  # what is set to zero still attends
        assert {key.shape[1] for key in fast.kv.key} == {left + 2}
        single = copy.deepcopy(small).float()
        error = (e2vpt.fold(single)(x.float()) - single(x.float())).abs().max()
        assert error < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_folding_twice_is_folding_once() -> None:
    model, x = task(build("vit"), 1, kv_deep=False), images_for(build("vit"), 3)
    once = e2vpt.fold(model)
    assert torch.equal(e2vpt.fold(once)(x), once(x))


@torch.no_grad()
def test_pruned_prompts_fold() -> None:
    backbone = build("vit")
    model, x = task(backbone, 1), images_for(backbone, 3)
    scores = e2vpt.importance(model, [(x, torch.tensor([0, 1, 2]))], 4)
    small = e2vpt.prune(model, scores, 1, 2)
    fast = e2vpt.fold(small)
    assert (fast(x) - small(x)).abs().max() < 1e-10
    assert fast.kv is not None
    assert [key.shape[1] for key in fast.kv.key] == [4, 4, 4]
    assert parameter_report(fast)["visual"] == 0


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"deep": False}, r"^model: got shallow prompts, which run through all layers, expected "),
        (
            {"backbone_trains": "bias"},
            r"^model: got a backbone that trains \(bias\), expected a fr",
        ),
        ({"pool_prompts": True}, r"^model: got prompts that are pooled \(pool_prompts\), expected"),
    ],
)
def test_what_does_not_fold_is_refused(spec: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        e2vpt.fold(task(build("vit_avg_qk_norm"), 1, **spec))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mixed_batch_equals_each_task_alone(family: str) -> None:
    backbone = build(family)
    models = {
        "pets": task(backbone, 1),
        "cars": task(backbone, 2, classes=7, num_visual_prompts=5, num_kv_prompts=0),
        "linear": task(backbone, 3, classes=2, num_visual_prompts=0, num_kv_prompts=0),
    }
    bank = e2vpt.PromptBank(backbone)
    for name, model in models.items():
        bank.add(name, model)
    tasks = ["pets", "cars", "linear", "cars", "pets", "pets"]
    x = images_for(backbone, len(tasks))
    for order in (tasks, tasks[::-1], ["cars"] * 6, ["linear"] * 6):
        found = bank(x, order)
        for i, name in enumerate(order):
            alone = models[name](x[i : i + 1])[0]
            assert found[i].shape == alone.shape
            assert (found[i] - alone).abs().max() < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_mixed_batch_under_autocast(family: str, dtype: torch.dtype) -> None:
    """Float32 becomes bf16, for the rows as for all else; float64 stays."""
    backbone = build(family).to(dtype)
    models = [task(backbone, 1), task(backbone, 2, num_visual_prompts=6)]
    bank = e2vpt.PromptBank(backbone)
    for i, model in enumerate(models):
        bank.add(f"{i}", model)
    x = images_for(backbone, 2).to(dtype)
    exact = [model(x[i : i + 1])[0] for i, model in enumerate(models)]
    with torch.autocast("cpu", torch.bfloat16):
        found = bank(x, ["0", "1"])
        alone = [e2vpt.fold(model)(x[i : i + 1])[0] for i, model in enumerate(models)]
    for mixed, single, expected in zip(found, alone, exact, strict=True):
        assert mixed.dtype == single.dtype
        largest = expected.abs().max()
        assert (mixed - single).abs().max() <= (2e-2 if dtype == torch.float32 else 1e-9) * largest
        assert (mixed - expected).abs().max() < 0.1 * largest


@pytest.mark.parametrize("most", [1, 9, 12])
@torch.no_grad()
def test_heads_are_applied_in_groups(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Heads of 3, 7 and 2 classes: alone, two together, all together."""
    monkeypatch.setattr("e2vpt.bank.MOST_CLASSES", most)
    test_mixed_batch_equals_each_task_alone("vit")


@torch.no_grad()
def test_a_task_holds_its_own_memory_and_no_more() -> None:
    bank = e2vpt.PromptBank(build("swin"))
    bank.add("pets", task(bank.host.backbone, 1))
    bank.add("cars", task(bank.host.backbone, 2))
    kept = bank._tasks["pets"]
    stored = {t.untyped_storage().data_ptr(): t for t in (*kept.rows, kept.weight, kept.bias)}
    held = sum(t.untyped_storage().nbytes() for t in stored.values())
    # Keys and values of 3 + 2 prompts in layers of width 16, 16, 32 and 32, and the head.
    assert held == bank.memory_bytes("pets") == 8 * (2 * 5 * 96 + 3 * 32 + 3)


@torch.no_grad()
def test_tasks_come_and_go() -> None:
    backbone = build("vit")
    x = images_for(backbone, 2)
    plain = copy.deepcopy(backbone)(x)
    bank = e2vpt.PromptBank(backbone)
    first = task(backbone, 1)
    bank.add("pets", first)
    with pytest.raises(
        InputError, match=r"^name: got 'pets', which is in the bank, expected a new"
    ):
        bank.add("pets", first)
    bank.add("cars", task(backbone, 2))
    expected = bank(x, ["pets", "pets"])
    bank.drop("cars")
    assert bank.tasks == ["pets"]
    assert torch.equal(torch.stack(bank(x, ["pets", "pets"])), torch.stack(expected))
    with pytest.raises(InputError, match=r"^task: got 'cars', expected a task in the bank; there"):
        bank(x, ["pets", "cars"])
    with pytest.raises(InputError, match=r"^tasks: got 1 names, expected 2; name one per image$"):
        bank(x, ["pets"])
    # Folded rows: keys and values of 3 + 2 prompts in 3 layers of width 16, and the head.
    assert bank.memory_bytes("pets") == 8 * (2 * 5 * 3 * 16 + 3 * 16 + 3)
    assert torch.equal(bank.release()(x), plain)


@torch.no_grad()
def test_bank_loads_what_was_saved(tmp_path: Path) -> None:
    backbone = build("vit")
    model, x = task(backbone, 1), images_for(backbone, 2)
    e2vpt.save(model, tmp_path / "pets", class_names=["cat", "dog", "fox"])
    bank = e2vpt.PromptBank(backbone)
    bank.add("pets", tmp_path / "pets")
    assert (torch.stack(bank(x, ["pets"] * 2)) - model(x)).abs().max() < 1e-10
    assert bank.class_names("pets") == ["cat", "dog", "fox"]
    other = e2vpt.PromptBank(build("vit_avg_qk_norm"))
    with pytest.raises(InputError, match=r"^backbone: got weights with fingerprint"):
        other.add("pets", tmp_path / "pets")
    with pytest.raises(InputError, match=r"^model: got prompts on another backbone, expected"):
        other.add("cars", model)


@torch.no_grad()
def test_bank_refuses_what_does_not_fold_or_differs_between_layers() -> None:
    backbone = build("vit")
    bank = e2vpt.PromptBank(backbone)
    with pytest.raises(InputError, match=r"^model: got shallow prompts"):
        bank.add("a", task(backbone, 1, deep=False))
    with pytest.raises(InputError, match=r"^model: got a number of rows that differs between"):
        bank.add("a", task(backbone, 1, kv_deep=False))
    assert bank.tasks == []


@torch.no_grad()
def test_bank_moves_with_its_backbone() -> None:
    backbone = build("vit")
    bank = e2vpt.PromptBank(backbone)
    bank.add("pets", task(backbone, 1))
    x = images_for(backbone, 2)
    expected = torch.stack(bank(x, ["pets"] * 2))
    bank.float()
    found = torch.stack(bank(x.float(), ["pets"] * 2))
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_bank_takes_timm_models_by_name() -> None:
    bank = e2vpt.PromptBank(timm.create_model("vit_tiny_patch16_224", depth=1))
    assert bank.tasks == []
