"""Adapters on a backbone and off it, saved, loaded and exported."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

import e2vpt
from e2vpt import adapters, model_io
from e2vpt.backbones import Backbone, fingerprint
from e2vpt.export import export_onnx
from e2vpt.micro_vit import build_micro_vit
from e2vpt.model import PromptedModel, PromptSpec, remove, tuned_state
from shared_utils import checkpoint
from shared_utils.errors import InputError

from .adapter_models import (
    IMAGES,
    KINDS,
    NOTHING,
    model_of,
    randomize,
    state_of,
    train_two_steps,
    vit,
)

# --- on the backbone and off it ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_remove_gives_the_same_modules_back(kind: str) -> None:
    backbone = vit().train()
    backbone.blocks[1].norm2.weight.requires_grad_(False)
    backbone.blocks[2].attn.qkv.eval()
    state, modules = state_of(backbone), dict(backbone.named_modules())
    flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
    modes = {name: module.training for name, module in modules.items()}
    sha256 = fingerprint(backbone)
    model = model_of(backbone, kind)
    train_two_steps(model)
    with adapters.detached(backbone):
        assert fingerprint(backbone) == sha256
    with torch.no_grad():
        logits = model(IMAGES)
    assert adapters.num_adapter_parameters(backbone) > 0
    assert logits.shape == (2, 3)
    assert remove(model) is backbone
    found = dict(backbone.named_modules())
    assert list(found) == list(modules)
    assert all(found[name] is module for name, module in modules.items())
    assert {name: module.training for name, module in found.items()} == modes
    assert {name: p.requires_grad for name, p in backbone.named_parameters()} == flags
    assert list(backbone.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())
    with torch.no_grad():
        assert torch.equal(backbone.eval()(IMAGES), vit()(IMAGES))
    model_of(backbone, kind)  # free for the next


@pytest.mark.parametrize("kind", KINDS)
def test_detached_is_for_a_while(kind: str) -> None:
    model = model_of(vit(), kind).eval()
    randomize(model)
    linear = model_of(vit()).eval()
    linear.head.load_state_dict(model.head.state_dict())
    with torch.no_grad():
        expected = model(IMAGES)
        with adapters.detached(model.backbone):
            assert torch.equal(model(IMAGES), linear(IMAGES))
        assert torch.equal(model(IMAGES), expected)
        assert not torch.allclose(expected, linear(IMAGES))


@pytest.mark.parametrize("cls", [SwinTransformer, SwinTransformerV2])
@pytest.mark.parametrize(
    "spec",
    [{"kind": "lora"}, {"kind": "adaptformer"}, {"backbone_trains": "partial"}],
    ids=["lora", "adaptformer", "partial"],
)
def test_swin_trains_with_each(cls: Any, spec: dict[str, Any]) -> None:
    torch.manual_seed(0)
    backbone = cls(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(1, 2),
        num_classes=5,
    ).eval()  # fmt: skip
    with torch.no_grad():  # V2 starts with norms of 0, through which nothing passes back
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    modules, state = dict(backbone.named_modules()), state_of(backbone)
    model = model_of(backbone, **spec)
    before, names = state_of(model), set(tuned_state(model))
    train_two_steps(model)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    # What is added to all keys alike does not change a softmax.
    assert names - changed <= {"backbone.layers.1.blocks.0.attn.qkv.bias"}
    assert changed <= names
    if "kind" not in spec:
        begins = ("backbone.layers.1.blocks.0.", "backbone.norm.", "head.")
        assert all(name.startswith(begins) for name in names)
        return
    remove(model)
    assert dict(backbone.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())


TAKEN = r"^backbone: got one that carries the adapters of another model, expected one that is free;"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["none", *KINDS])
def test_a_backbone_with_adapters_is_not_shared(kind: str, other: str) -> None:
    backbone = vit()
    model = model_of(backbone, kind).eval()
    randomize(model)
    with torch.no_grad():
        expected = model(IMAGES)
        with pytest.raises(InputError, match=TAKEN):
            model_of(backbone, other)
        assert torch.equal(model(IMAGES), expected)  # the refusal changed nothing
        assert sum(p.requires_grad for p in backbone.parameters()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_do_not_come_to_a_backbone_in_use(kind: str) -> None:
    backbone = vit()
    model = model_of(backbone, num_visual_prompts=2).eval()
    match = (
        rf"^backbone: got one that another model uses, for {kind}, which changes it, expected one "
        r"that is free; give that model to e2vpt\.remove first, or load the backbone once more$"
    )
    with torch.no_grad():
        expected = model(IMAGES)
        with pytest.raises(InputError, match=match):
            model_of(backbone, kind)
        assert torch.equal(model(IMAGES), expected)
    assert type(remove(model).blocks[0].attn.qkv) is nn.Linear  # type: ignore[union-attr,index]


@pytest.mark.parametrize("kind", KINDS)
def test_what_shares_the_backbone_refuses_adapters(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path, kind)
    with torch.no_grad():
        expected = model(IMAGES)
        match = rf"^model: got adapters \({kind}\), expected prompts alone: folding would not be ex"
        with pytest.raises(InputError, match=match):
            e2vpt.fold(model)
        assert torch.equal(model(IMAGES), expected)
    bank = e2vpt.PromptBank(micro())
    with pytest.raises(
        InputError, match=rf"^backbone: got one that another model uses, for {kind}"
    ):
        bank.add("task", tmp_path)
    assert bank.tasks == []
    assert adapters.num_adapter_parameters(bank.release()) == 0


# --- saved and loaded ----------------------------------------------------------------------------

SPECS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "lora": (
        {"adapter": "lora", "adapter_dim": 2, "adapter_scale": 1.5},
        {f"backbone.blocks.{i}.attn.qkv.updates.{part}.{j}.weight"
         for i in range(2) for part in (0, 2) for j in ("down", "up")},
    ),
    "adaptformer": (
        {"adapter": "adaptformer", "adapter_dim": 2, "adapter_scale": 0.4},
        {f"backbone.blocks.{i}.mlp.{part}.{kind}"
         for i in range(2) for part in ("down", "up") for kind in ("weight", "bias")},
    ),
    "partial": (
        {"backbone_trains": "partial", "partial_blocks": 1},
        {f"backbone.blocks.1.{part}.{kind}" for kind in ("weight", "bias")
         for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
        | {"backbone.fc_norm.weight", "backbone.fc_norm.bias"},
    ),
}  # fmt: skip


def micro(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_micro_vit(5, embed_dim=64, depth=2, num_heads=1).eval()


def saved(folder: Path, case: str, *, with_source: bool = False) -> PromptedModel:
    source = None
    backbone = micro()
    if with_source:
        sha256 = fingerprint(backbone)
        source = Backbone(backbone, "x", "x", "w", (32, 32), (0, 0, 0), (1, 1, 1), sha256)
    model = PromptedModel(backbone, PromptSpec(num_classes=3, **{**NOTHING, **SPECS[case][0]}))
    randomize(model)
    model_io.save(model.eval(), folder, backbone=source)
    return model


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("case", SPECS)
def test_round_trip_stores_what_was_tuned(tmp_path: Path, case: str, with_source: bool) -> None:
    model = saved(tmp_path, case, with_source=with_source)
    keys = SPECS[case][1] | {"head.weight", "head.bias"}
    assert checkpoint.load_weights(tmp_path / "model.safetensors")[0].keys() == keys
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["parameters"]["tuned"] == sum(t.numel() for t in tuned_state(model).values())
    if case != "partial":
        assert card["backbone"]["sha256"] == fingerprint(micro())
        assert card["parameters"]["adapters"] > 0
    loaded = e2vpt.load(tmp_path, micro())
    assert loaded.spec == model.spec
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))


@pytest.mark.parametrize("case", SPECS)
def test_another_backbone_is_refused(tmp_path: Path, case: str) -> None:
    saved(tmp_path, case, with_source=True)
    other = micro(seed=1)
    with pytest.raises(InputError, match=r"^backbone: got weights with fingerprint "):
        e2vpt.load(tmp_path, other)
    assert not hasattr(other, "_before_prompts")


def test_tensors_that_do_not_fit_leave_the_backbone_free(tmp_path: Path) -> None:
    saved(tmp_path, "lora")
    card = json.loads((tmp_path / "model.json").read_text())
    card["spec"]["adapter_dim"] = 3
    (tmp_path / "model.json").write_text(json.dumps(card))
    backbone = micro()
    with pytest.raises(InputError, match=r"shape \(2, 64\), expected \(3, 64\)"):
        e2vpt.load(tmp_path, backbone)
    assert adapters.num_adapter_parameters(backbone) == 0
    assert fingerprint(backbone) == fingerprint(micro())


@pytest.mark.parametrize("case", KINDS)
def test_onnx_agrees(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, case)
    monkeypatch.setattr("e2vpt.export.model_io.load", lambda folder: model_io_load(folder, micro()))
    done = export_onnx(tmp_path, tmp_path / "model.onnx")
    assert done.difference < 1e-5
    what = rf"adapters \({case}\), expected prompts alone"
    assert not done.is_folded
    assert re.match(rf"not folded: model: got {what}: folding would not be exact; use", done.form)


model_io_load = model_io.load
