"""LoRA, AdaptFormer and partial-k: formulas, counts, learning, and the way back."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.nn import functional as F

import e2vpt
from e2vpt import adapters, model_io
from e2vpt.backbones import Backbone, fingerprint
from e2vpt.cli import main
from e2vpt.config import ModelConfig
from e2vpt.export import export_onnx
from e2vpt.micro_vit import build_micro_vit
from e2vpt.model import PromptedModel, PromptSpec, parameter_report, remove, tuned_state
from e2vpt.train import build_spec
from shared_utils import checkpoint
from shared_utils.errors import InputError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KINDS = ("lora", "adaptformer")
NOTHING = {"num_visual_prompts": 0, "num_kv_prompts": 0}


def vit(seed: int = 0, **options: Any) -> Any:
    """A class-token ViT of width 32 with layer scale, so that its place shows."""
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    backbone = timm.models.VisionTransformer(
        **{**sizes, "num_classes": 5, "init_values": 0.5, **options}
    )
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone.eval()


def model_of(backbone: nn.Module, kind: str = "none", **spec: Any) -> PromptedModel:
    return PromptedModel(backbone, PromptSpec(num_classes=3, adapter=kind, **{**NOTHING, **spec}))


def randomize(model: nn.Module) -> None:
    """Values of their own for everything that trains, zeros included."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- what is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_linear_probe(kind: str) -> None:
    linear, adapted = model_of(vit()).eval(), model_of(vit(), kind).eval()
    adapted.head.load_state_dict(linear.head.state_dict())
    with torch.no_grad():
        assert torch.equal(adapted(IMAGES), linear(IMAGES))


def test_lora_is_the_backbone_with_merged_weights() -> None:
    """W_q + alpha / r B A for queries, the same for values; keys as they were."""
    model = model_of(vit(), "lora", adapter_dim=4, adapter_scale=0.7).double().eval()
    randomize(model)
    merged = vit().double()
    with torch.no_grad():
        for block, plain in zip(model.backbone.blocks, merged.blocks, strict=True):
            updates = block.attn.qkv.updates
            assert updates.keys() == {"0", "2"}
            for start, update in ((0, updates["0"]), (64, updates["2"])):
                down, up = update.down, update.up
                assert down.weight.shape == (4, 32)
                assert up.weight.shape == (32, 4)
                plain.attn.qkv.weight[start : start + 32] += 0.7 * up.weight @ down.weight
        merged.head = model.head
        torch.testing.assert_close(
            model(IMAGES.double()), merged(IMAGES.double()), rtol=0, atol=1e-12
        )
        assert (model(IMAGES.double()) - vit().double()(IMAGES.double())[:, :3]).abs().max() > 0.1


def test_adaptformer_is_a_bottleneck_beside_the_mlp() -> None:
    """A block written out: x + ls1(attn(norm1(x))), then beside MLP, norm and layer scale."""
    model = model_of(vit(), "adaptformer", adapter_dim=4, adapter_scale=0.3).double().eval()
    randomize(model)
    plain, images = vit().double(), IMAGES.double()
    with torch.no_grad():
        x = plain.norm_pre(plain._pos_embed(plain.patch_embed(images)))
        for block, changed in zip(plain.blocks, model.backbone.blocks, strict=True):
            x = x + block.ls1(block.attn(block.norm1(x)))
            down, up = changed.mlp.down, changed.mlp.up
            beside = F.relu(x @ down.weight.T + down.bias) @ up.weight.T + up.bias
            x = x + block.ls2(block.mlp(block.norm2(x))) + 0.3 * beside
        expected = model.head(plain.norm(x)[:, 0])
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)


def other_backbones() -> dict[str, Any]:
    """Tiny ones of each kind of block and attention."""
    swin = {
        "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 1),
        "num_heads": (1, 2), "num_classes": 3,
    }  # fmt: skip
    eva = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return {
        "swin": lambda: SwinTransformer(**swin),
        "swin v2": lambda: SwinTransformerV2(**swin),
        "post-norm vit": lambda: vit(block_fn=ResPostBlock),
        "eva, projections apart": lambda: Eva(**eva, qkv_fused=False, swiglu_mlp=True),
        "eva, bias apart": lambda: Eva(**eva, init_values=0.5),  # past the projection's forward
        "eva, rotary": lambda: Eva(**eva, attn_type="rope", use_rot_pos_emb=True, init_values=0.5),
        "eva, post-norm": lambda: Eva(**eva, use_post_norm=True),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", other_backbones())
def test_other_blocks_take_them(name: str, kind: Any) -> None:
    """Bit-equal at the start, moved by every layer's adapter, and bit-equal once more after."""

    def build() -> Any:
        torch.manual_seed(3)
        backbone = other_backbones()[name]()
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return backbone.eval()

    backbone, plain = build(), build()
    modules = list(backbone.named_modules())
    adapters.check_adaptable(backbone, kind)
    adapters.attach(backbone, kind, 4, 0.5)
    blocks = adapters.transformer_blocks(backbone)
    assert len(blocks) == 3
    with torch.no_grad():
        expected = plain(IMAGES)
        assert torch.equal(backbone(IMAGES), expected)
        for block in blocks:
            layers = [m for m in block.modules() if isinstance(m, adapters.LowRankLinear)]
            ups = [u.up for m in layers for u in m.updates.values()]
            ups = ups or [block.mlp.up]
            assert len(ups) == (2 if kind == "lora" else 1)
            for up in ups:
                before = backbone(IMAGES)
                up.weight.normal_()
                assert not torch.allclose(backbone(IMAGES), before)
        adapters.detach(backbone)
        assert torch.equal(backbone(IMAGES), expected)
    assert [(n, id(m)) for n, m in backbone.named_modules()] == [(n, id(m)) for n, m in modules]
    assert list(backbone.state_dict()) == list(plain.state_dict())


def test_the_merged_weight_is_what_forward_computes() -> None:
    layer = adapters.LowRankLinear(nn.Linear(8, 12), 2, 0.7, num_parts=3, updated=(0, 2)).double()
    randomize(layer)
    x = torch.randn(5, 8, dtype=torch.float64)
    merged = F.linear(x, layer.weight, layer.linear.bias)
    torch.testing.assert_close(layer(x), merged, rtol=0, atol=1e-12)
    assert torch.equal(layer.weight[4:8], layer.linear.weight[4:8])
    plain = layer.linear(x)
    is_moved = ((layer(x) - plain).abs().amax(0) > 1e-3).tolist()
    assert is_moved == [True] * 4 + [False] * 4 + [True] * 4


@pytest.mark.parametrize(("name", "gamma"), [("pre", "gamma_2"), ("post", None)])
def test_adaptformer_in_an_eva_block(name: str, gamma: str | None) -> None:
    """Beside the layer scale, and beside a norm that comes after the MLP."""
    torch.manual_seed(0)
    cls = EvaBlock if name == "pre" else EvaBlockPostNorm
    block: Any = cls(dim=16, num_heads=2, init_values=0.5).double().eval()
    plain = copy.deepcopy(block)
    wrapped = nn.ModuleDict({"block": block})
    adapters.attach(wrapped, "adaptformer", 4, 0.3)
    wrapped.double()
    randomize(block.mlp.down)
    randomize(block.mlp.up)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        attended = plain.norm1(plain.attn(x)) if gamma is None else plain.attn(plain.norm1(x))
        after = x + (attended if gamma is None else plain.gamma_1 * attended)
        beside = 0.3 * block.mlp.up(F.relu(block.mlp.down(after)))
        torch.testing.assert_close(block(x), plain_second_half(plain, after) + beside)
    adapters.detach(wrapped)
    assert list(block.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(block(x), plain(x))


def plain_second_half(block: Any, x: Tensor) -> Tensor:
    if isinstance(block, EvaBlockPostNorm):
        out: Tensor = x + block.norm2(block.mlp(x))
        return out
    out = x + block.gamma_2 * block.mlp(block.norm2(x))
    return out


# --- counts --------------------------------------------------------------------------------------


def vit_b_report(**spec: Any) -> dict[str, float]:
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224")
        return parameter_report(
            PromptedModel(backbone, PromptSpec(num_classes=100, **{**NOTHING, **spec}))
        )


HEAD = 768 * 100 + 100
PLAIN = 85_798_656  # of ViT-B/16 without its classifier
BLOCK = 2 * 2 * 768 + (768 + 1) * 3 * 768 + (768 + 1) * 768 + 2 * 768 * 3072 + 768 + 3072


@pytest.mark.parametrize(
    ("spec", "part", "count"),
    [
        ({"adapter": "lora", "adapter_dim": 1}, "adapters", 36_864),
        ({"adapter": "lora", "adapter_dim": 8}, "adapters", 8 * 36_864),
        ({"adapter": "adaptformer", "adapter_dim": 8}, "adapters",
         12 * (768 * 8 + 8 + 768 * 8 + 768)),
        ({"adapter": "adaptformer", "adapter_dim": 64}, "adapters",
         12 * (768 * 64 + 64 + 768 * 64 + 768)),
        ({"backbone_trains": "partial"}, "backbone", BLOCK + 2 * 768),
        ({"backbone_trains": "partial", "partial_blocks": 3}, "backbone", 3 * BLOCK + 2 * 768),
    ],
)  # fmt: skip
def test_counts_on_vit_b(spec: dict[str, Any], part: str, count: int) -> None:
    report = vit_b_report(**spec)
    added = count if part == "adapters" else 0
    expected = {"visual": 0, "kv": 0, "adapters": 0, "backbone": 0, "head": HEAD, part: count}
    assert {key: report[key] for key in expected} == expected
    assert report["tuned"] == count + HEAD
    assert report["total"] == PLAIN + HEAD + added
    assert report["percent"] == 100 * (count + HEAD) / (PLAIN + HEAD + added)


# --- what trains ---------------------------------------------------------------------------------


def train_two_steps(model: PromptedModel) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.eval()
    model(IMAGES)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), torch.tensor([0, 2])).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "lora"},
        {"kind": "adaptformer"},
        {"backbone_trains": "partial"},
        {"backbone_trains": "partial", "partial_blocks": 2},
    ],
)
def test_two_steps_change_what_trains_and_nothing_else(spec: dict[str, Any]) -> None:
    # No class bias on keys: a softmax does not see what is added to all keys alike.
    model = model_of(vit(qkv_bias=False), **spec)
    before, names = state_of(model), set(tuned_state(model))
    train_two_steps(model)
    assert not any(module.training for module in model.backbone.modules())
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, before[name]) == (name not in names), name
    last = range(3 - spec.get("partial_blocks", 1), 3)
    parts = {
        "lora": [f"blocks.{i}.attn.qkv.updates.{n}." for i in range(3) for n in (0, 2)],
        "adaptformer": [f"blocks.{i}.mlp.{n}." for i in range(3) for n in ("down", "up")],
    }.get(spec.get("kind", ""), [*(f"blocks.{i}." for i in last), "norm."])
    begins = (*(f"backbone.{part}" for part in parts), "head.")
    assert names == {name for name in before if name.startswith(begins)}


def test_partial_trains_the_norm_after_pooling_where_that_is_the_last() -> None:
    model = model_of(vit(global_pool="avg", class_token=False), backbone_trains="partial")
    names = {name for name in tuned_state(model) if "blocks" not in name}
    assert names == {"backbone.fc_norm.weight", "backbone.fc_norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_independent(kind: str) -> None:
    model = model_of(vit(), kind).eval()
    randomize(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(IMAGES)
        randomize(twin)
        for parameter in twin.parameters():
            parameter.mul_(2)
        assert torch.equal(model(IMAGES), expected)
        assert not torch.allclose(twin(IMAGES), expected)


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
    what = rf"adapters \({case}\), .* prompts alone" if case in KINDS else rf".* \({case}\), .*"
    assert not done.is_folded
    assert re.match(rf"not folded: model: got {what}: folding would not be exact; use", done.form)


model_io_load = model_io.load


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"adapter": "houlsby"},
         r"^adapter: got houlsby, expected none, lora or adaptformer; correct it$"),
        ({"backbone_trains": "some"},
         r"^backbone_trains: got some, expected none, bias, partial or full; correct it$"),
        ({"adapter_dim": 0}, r"^adapter_dim: got 0, expected 1 or more; "),
        ({"adapter_scale": float("nan")}, r"^adapter_scale: got nan, expected more than 0; "),
        ({"adapter_scale": float("inf")}, r"^adapter_scale: got inf, expected more than 0; "),
        ({"adapter": "lora", "num_visual_prompts": 4},
         r"^num_visual_prompts: got 4 beside lora, expected 0; choose one method$"),
        ({"adapter": "lora", "num_kv_prompts": 2}, r"^num_kv_prompts: got 2 beside lora, "),
        ({"adapter": "adaptformer", "backbone_trains": "bias"},
         r"^backbone_trains: got bias beside adaptformer, expected none; choose one method$"),
    ],
)  # fmt: skip
def test_wrong_specs(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PromptSpec(num_classes=3, **{**NOTHING, **spec})


@pytest.mark.parametrize("count", [0, 4])
def test_more_blocks_than_there_are(count: int) -> None:
    backbone = vit()
    match = rf"^partial_blocks: got {count}, expected 1 to 3, the blocks of the backbone; "
    with pytest.raises(InputError, match=match):
        model_of(backbone, backbone_trains="partial", partial_blocks=count)
    assert not hasattr(backbone, "_before_prompts")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "swinv2_cr_tiny_224",
            "lora",
            r"got class .*\.WindowMultiHeadAttention in layer 0 for lora",
        ),
        ("swinv2_cr_tiny_224", "adaptformer", r"got class .*\.SwinTransformerV2CrBlock in layer 0"),
        ("resnet18", "lora", r"got class .*ResNet for lora, expected one of transformer blocks;"),
    ],
)
def test_backbones_that_cannot_take_them(name: str, kind: str, message: str) -> None:
    with torch.device("meta"):
        backbone = timm.create_model(name)
    with pytest.raises(InputError, match=rf"^backbone: {message}"):
        adapters.check_adaptable(backbone, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("partial_blocks", 0, "1 or more"), ("lora_rank", 0, "1 or more"),
        ("adapter_dim", -1, "1 or more"), ("lora_alpha", 0.0, "more than 0"),
        ("lora_alpha", float("nan"), "more than 0"), ("adapter_scale", float("inf"), "more than 0"),
    ],
)  # fmt: skip
def test_wrong_options(field: str, value: float, least: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.{field}: got {value}, expected {least}; "):
        ModelConfig(**{field: value})


# --- from the command line -----------------------------------------------------------------------


def test_options_reach_the_model() -> None:
    lora = build_spec(ModelConfig(method="lora", lora_rank=4, lora_alpha=10), 3)
    assert (lora.adapter, lora.adapter_dim, lora.adapter_scale) == ("lora", 4, 2.5)
    beside = build_spec(ModelConfig(method="adaptformer", adapter_dim=16, adapter_scale=0.2), 3)
    assert (beside.adapter, beside.adapter_dim, beside.adapter_scale) == ("adaptformer", 16, 0.2)
    partial = build_spec(ModelConfig(method="partial", partial_blocks=2), 3)
    assert (partial.backbone_trains, partial.partial_blocks) == ("partial", 2)
    for spec in (lora, beside, partial):
        assert (spec.num_visual_prompts, spec.num_kv_prompts) == (0, 0)
    assert partial.adapter == "none"
    assert {lora.backbone_trains, beside.backbone_trains} == {"none"}


@pytest.mark.parametrize(
    ("method", "tuned"),
    [
        ("lora", 2 * 2 * 2 * 8 * 64),
        ("adaptformer", 2 * (64 * 8 + 8 + 64 * 8 + 64)),
        ("partial", 4 * 64 + 65 * 3 * 64 + 65 * 64 + 65 * 256 + 257 * 64 + 2 * 64),
    ],
)
def test_a_run(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str], method: str, tuned: int
) -> None:
    argv = ["train", "digits", "--runs-dir", str(tmp_path), "--name", "run", *quick]
    argv += ["--model.method", method, "--optim.lr", "0.01"]
    assert main(argv) == 0
    folder = tmp_path / "e2vpt" / "run"
    result = json.loads((folder / "result.json").read_text())
    assert result["method"] == method
    assert result["parameters"]["tuned"] == tuned + 65 * 10
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--accelerator", "cpu"]) == 0
    (score,) = re.findall(r"test_top1 (\S+)", capsys.readouterr().out)
    assert score == f"{result['metrics']['test_top1']:.4f}"
    assert main(["info", str(folder)]) == 0
    counted = re.findall(r"^(adapters|backbone) +([\d,]+)$", capsys.readouterr().out, re.M)
    expected = {
        "adapters": 0,
        "backbone": 0,
        "backbone" if method == "partial" else "adapters": tuned,
    }
    assert {name: int(count.replace(",", "")) for name, count in counted} == expected
    argv = ["train", "--resume", str(folder), "--optim.epochs", "3"]
    assert main(argv) == 0
    assert json.loads((folder / "result.json").read_text())["epochs"] == 3


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lora-rank", "0", "error: model.lora_rank: got 0, expected 1 or more; correct it\n"),
        ("partial-blocks", "9", "error: partial_blocks: got 9, expected 1 to 2, the blocks of the "
         "backbone; correct it\n"),
    ],
)  # fmt: skip
def test_wrong_values_are_one_line(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str],
    option: str, value: str, message: str,
) -> None:  # fmt: skip
    method = option.split("-")[0]
    argv = ["train", "digits", "--runs-dir", str(tmp_path), *quick, "--model.method", method]
    assert main([*argv, f"--model.{option}", value]) == 2
    assert capsys.readouterr().err == message
    assert not (tmp_path / "e2vpt").exists()


def test_an_unknown_method_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--model.method", "adapter"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --model.method: got ")
    assert error.count("\n") == 1
