"""A prompted Swin as a whole: samples stay apart, what trains, counts, files, export, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional as F

import e2vpt
from e2vpt import model_io, swin
from e2vpt.backbones import fingerprint
from e2vpt.cli import main
from e2vpt.export import Fold, export_onnx
from e2vpt.families import family_of
from e2vpt.model import PromptedModel, PromptSpec, parameter_report, remove
from shared_utils.errors import InputError

KINDS: dict[str, Callable[..., Any]] = {"v1": SwinTransformer, "v2": SwinTransformerV2}
both_kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str = "v1", seed: int = 0, **options: Any) -> Any:
    """Maps of 16 and 8 patches, windows of 4, shifted in every second block; all weights matter."""
    torch.manual_seed(seed)
    backbone = KINDS[kind](
        **{
            "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
            "num_heads": (2, 4), "num_classes": 5, **options,
        }
    )  # fmt: skip
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in key and key.endswith("weight"):
                parameter.add_(1)
    return backbone.double().eval()


def blocks_of(backbone: Any) -> list[Any]:
    return [block for stage in backbone.layers for block in stage.blocks]


def images(batch: int = 3, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=generator)


def prompted(backbone: nn.Module, **spec: Any) -> PromptedModel:
    counts = {"num_classes": 4, "num_visual_prompts": 3, "num_kv_prompts": 2}
    model = PromptedModel(backbone, PromptSpec(**{**counts, **spec})).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for module in (model.visual, model.kv, model.head):
            for parameter in module.parameters() if module is not None else ():
                parameter.normal_()
    return model


# --- samples of a batch --------------------------------------------------------------------------

FORMS = [{}, {"token_form": True}, {"deep": False}, {"deep": False, "pool_prompts": True}]
by_form = pytest.mark.parametrize("form", FORMS, ids=["cheap", "token", "shallow", "pooled"])


def gap_with_other_neighbours(model: PromptedModel, x: Tensor) -> float:
    """How far a sample's logits move when the rest of its batch changes."""
    others = torch.cat([x[:1], 5 * x[1:].flip(0) + 1])
    alone, here, there = model(x[:1])[0], model(x)[0], model(others)[0]
    return max((here - alone).abs().max().item(), (there - here).abs().max().item())


@both_kinds
@by_form
@pytest.mark.parametrize("shifted", [True, False])
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(
    kind: str, form: dict[str, Any], shifted: bool
) -> None:
    backbone = build(kind)
    for block in blocks_of(backbone):
        if not shifted:
            block.shift_size, block.attn_mask = (0, 0), None
    assert any(any(block.shift_size) for block in blocks_of(backbone)) is shifted
    assert gap_with_other_neighbours(prompted(backbone, **form), images()) < 1e-12


def by_window_first(rows: Tensor, batch: int, num_windows: int) -> Tensor:
    """The order of the paper's code, while windows are ordered by sample first."""
    return rows.expand(batch, *rows.shape[1:])[None].expand(num_windows, -1, -1, -1).flatten(0, 1)


@both_kinds
@torch.no_grad()
def test_prompts_ordered_by_window_first_would_mix_samples(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original's fault. Its windows get the prompts of other samples of the batch.

    Where all samples have the same prompts (deep, without dropout) that makes no odds. From the
    second block on shallow prompts are a sample's own; then the output depends on the batch.
    """
    deep, shallow = prompted(build(kind), token_form=True), prompted(build(kind), deep=False)
    x = images()
    expected, right = deep(x), shallow(x)
    monkeypatch.setattr(swin, "per_window", by_window_first)
    assert torch.equal(deep(x), expected)
    assert gap_with_other_neighbours(shallow, x) > 1e-3
    assert (shallow(x) - right).abs().max() > 1e-3
    monkeypatch.undo()
    assert torch.equal(shallow(x), right)


class OwnPrompts:
    """Prompts that differ from sample to sample, as dropout makes them."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.own, self.num_layers = rows, len(rows)

    def __call__(self, layer: int, batch: int) -> Tensor:
        assert len(self.own[layer]) == batch
        return self.own[layer]


@both_kinds
@by_form
@torch.no_grad()
def test_a_samples_windows_get_that_samples_prompts(kind: str, form: dict[str, Any]) -> None:
    backbone, x = build(kind), images()
    options = {k: v for k, v in form.items() if k != "deep"}
    blocks = blocks_of(backbone)[: None if form.get("deep", True) else 1]
    rows = [torch.randn(3, 2, block.dim, dtype=torch.float64) for block in blocks]
    together = swin.prompted_features(backbone, x, OwnPrompts(rows), None, **options)
    for i in range(3):
        own = OwnPrompts([r[i : i + 1] for r in rows])
        alone = swin.prompted_features(backbone, x[i : i + 1], own, None, **options)
        assert (together[i] - alone[0]).abs().max() < 1e-12
    assert (together[0] - together[1]).abs().max() > 0.1


@torch.no_grad()
def test_prompt_dropout_is_drawn_for_each_sample() -> None:
    model = prompted(build(), prompt_dropout=0.5).train()
    features = model.features(images(1).expand(2, -1, -1, -1))
    assert (features[0] - features[1]).abs().max() > 1e-3


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@torch.no_grad()
def test_fused_attention_agrees_with_the_explicit_one(
    spec: dict[str, Any], dtype: torch.dtype, bound: float
) -> None:
    model, x = prompted(build().to(dtype), **spec), images().to(dtype)
    outputs = []
    for fused in (False, True):
        for block in blocks_of(model.backbone):
            block.attn.fused_attn = fused
        outputs.append(model.features(x))
    assert (outputs[0] - outputs[1]).abs().max() < bound


@both_kinds
@torch.no_grad()
def test_autocast(kind: str) -> None:
    model, x = prompted(build(kind).float()), images().float()
    expected = model.features(x)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.features(x)
    assert F.cosine_similarity(features.float(), expected).min() > 0.99


def test_parameter_counts_of_swin_base() -> None:
    """Specification, Sec. 8.1: 12,032 per deep visual token and per shared key-value prompt."""
    name = "swin_base_patch4_window7_224"
    with torch.device("meta"):
        models = {
            counts: e2vpt.prompt(timm.create_model(name), 100, *counts)
            for counts in [(5, 5), (6, 5), (5, 6)]
        }
    report = parameter_report(models[5, 5])
    assert report == {
        "visual": 60_160, "kv": 60_160, "adapters": 0, "head": 102_500, "backbone": 0,
        "tuned": 222_820, "total": 86_966_044, "percent": pytest.approx(0.2562, abs=5e-5),
    }  # fmt: skip
    assert sum(p.numel() for p in models[5, 5].backbone.parameters()) == 86_743_224
    assert parameter_report(models[6, 5])["visual"] - report["visual"] == 12_032
    assert parameter_report(models[5, 6])["kv"] - report["kv"] == 12_032
    widths = [weight.shape[1] for weight in models[5, 5].visual.weight]
    assert widths == [128] * 2 + [256] * 2 + [512] * 18 + [1024] * 2
    assert models[5, 5].visual.weight[0].shape == (5, 128)
    assert {key.shape[2] for key in models[5, 5].kv.key} == {32}


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    name = "swin_base_patch4_window7_224"
    assert main(["info", name, "--num-visual-prompts", "5"]) == 0
    told = capsys.readouterr().out
    assert "layers     24, width 128, heads 4 to width 256, heads 8 to" in told
    assert "222,820" in told


# --- taking over and giving back -----------------------------------------------------------------


@both_kinds
@torch.no_grad()
def test_without_prompts_the_backbones_own_forward_runs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, x = build(kind), images()
    expected = backbone.forward_head(backbone.forward_features(x), pre_logits=True)
    model = prompted(backbone, num_visual_prompts=0, num_kv_prompts=0)
    monkeypatch.setattr(swin, "prompted_features", None)
    assert torch.equal(model.features(x), expected)


@both_kinds
def test_remove_gives_the_backbone_back(kind: str) -> None:
    backbone, x = build(kind), images()
    backbone.layers[0].blocks[0].train()
    backbone.head.fc.train()
    backbone.norm.weight.requires_grad_(False)
    head, fc = backbone.head, backbone.head.fc
    state = {n: t.clone() for n, t in backbone.state_dict().items()}
    modes = {n: m.training for n, m in backbone.named_modules()}
    trains = {n: p.requires_grad for n, p in backbone.named_parameters()}
    logits, mark = backbone(x), fingerprint(backbone)
    model = prompted(backbone)
    assert "head.fc.weight" not in backbone.state_dict()
    assert fingerprint(backbone) == mark
    model(x).sum().backward()
    assert remove(model) is backbone
    assert (backbone.head, backbone.head.fc) == (head, fc)
    assert backbone.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in backbone.state_dict().items())
    assert {n: m.training for n, m in backbone.named_modules()} == modes
    assert {n: p.requires_grad for n, p in backbone.named_parameters()} == trains
    assert torch.equal(backbone(x), logits)


def test_the_head_is_as_wide_as_what_is_pooled() -> None:
    assert prompted(build(global_pool="catavgmax")).head.in_features == 64
    assert prompted(build()).head.in_features == 32


@both_kinds
@pytest.mark.parametrize("deep", [True, False])
def test_gradients_reach_every_prompt_and_nothing_else(kind: str, deep: bool) -> None:
    model = prompted(build(kind), deep=deep, share_kv=False).train()
    assert not any(module.training for module in model.backbone.modules())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.startswith(("visual.", "kv.", "head."))}
    assert len([n for n in changed if n.startswith("visual.")]) == (4 if deep else 1)
    assert len([n for n in changed if n.startswith("kv.")]) == 8


@both_kinds
def test_a_backbone_that_trains_gets_gradients_everywhere(kind: str) -> None:
    backbone = build(kind, drop_path_rate=0.5, proj_drop_rate=0.1, attn_drop_rate=0.1)
    model = prompted(backbone, backbone_trains="full", token_form=True).train()
    torch.manual_seed(0)
    sum(model(images()).square().sum() for _ in range(4)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@both_kinds
@torch.no_grad()
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model, x = prompted(build(kind), share_kv=False), images()
    e2vpt.save(model, tmp_path)
    again = e2vpt.load(tmp_path, backbone=build(kind)).double()
    assert torch.equal(again(x), model(x))
    with pytest.raises(InputError, match=r"^backbone: got weights with fingerprint "):
        e2vpt.load(tmp_path, backbone=build(kind, seed=1))


@pytest.mark.parametrize(
    ("kind", "deep", "fold"),
    [
        ("v1", True, "yes"),
        pytest.param("v1", True, "no", marks=pytest.mark.slow),
        pytest.param("v1", False, "no", marks=pytest.mark.slow),
        pytest.param("v2", True, "yes", marks=pytest.mark.slow),
        pytest.param("v2", True, "no", marks=pytest.mark.slow),
        pytest.param("v2", False, "no", marks=pytest.mark.slow),
    ],
)
def test_onnx(
    kind: str, deep: bool, fold: Fold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps of 10 and 5 patches: windows are padded, shifted in the second block, and merged."""
    backbone = build(kind, img_size=20, depths=(2, 1)).float()
    model = prompted(backbone, deep=deep)
    e2vpt.save(model, tmp_path)
    monkeypatch.setattr(model_io, "load", lambda folder: model)
    assert export_onnx(tmp_path, tmp_path / "model.onnx", fold=fold).is_folded == (fold == "yes")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for batch in (1, 4):
        x = images(batch, 20).float()
        with torch.no_grad():
            expected = model(x).numpy()
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


# --- refusals ------------------------------------------------------------------------------------


def change(where: str, to: nn.Module | None = None) -> Callable[[], Any]:
    """Builds a backbone with another part there, or with a subclass of the part that is there."""

    def changed() -> Any:
        backbone = build()
        part = backbone.get_submodule(where)
        if to is None:
            part.__class__ = type("Other", (type(part),), {})
        else:
            backbone.set_submodule(where, to)
        return backbone

    return changed


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            change("layers.1.blocks.0.attn"),
            r"attention class .*Other in layer 2, expected timm's WindowAttention; choose",
        ),
        (
            change("layers.0.blocks.1"),
            r"block class .*Other in layer 1, expected timm's SwinTransformerBlock; choose",
        ),
        (
            change("layers.1.downsample"),
            r"merging class .*Other in stage 1, expected timm's PatchMerging; choose",
        ),
        (
            change("layers.0"),
            r"stage class .*Other in place 0, expected timm's SwinTransformerStage; choose",
        ),
        (
            change("head", nn.Linear(32, 5)),
            r"head class .*Linear at the end, expected timm's ClassifierHead; choose",
        ),
        (
            lambda: build(global_pool=""),
            r"global_pool '', expected avg, max, avgmax or catavgmax; build it",
        ),
    ],
)
def test_what_is_not_known_is_refused(backbone: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^backbone: got {message}"):
        prompted(backbone())


def test_other_families_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"expected a timm VisionTransformer or .*SwinTransformerV2;"
    ):
        family_of(timm.create_model("test_resnet"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"prompt_dim": 8},
            r"^prompt_dim: got 8 on layers of widths 16, 32, expected layers of one width; leave ",
        ),
        (
            {"num_segments": 32, "num_kept_segments": 8},
            r"^num_segments: got 32, expected a divisor of the width 16; choose another number$",
        ),
    ],
)
def test_options_that_the_widths_do_not_allow(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prompted(build(), **spec)
