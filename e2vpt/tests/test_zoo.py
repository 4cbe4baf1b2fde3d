"""Backbones that work and that do not: each is built, tried, and listed in docs/backbones.md.

Their names are in backbones.txt. The sizes in the list come from the whole network on the meta
device; what is claimed of it is tried on a tiny one of the same timm name.
`E2VPT_WRITE_DOCS=1 pytest e2vpt/tests/test_zoo.py` writes the list anew.
"""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from e2vpt.families import family_of
from e2vpt.fold import fold
from e2vpt.model import PromptedModel, PromptSpec, parameter_report, remove, with_token_form
from e2vpt.published import average_patches
from shared_utils.errors import InputError

DOCS = Path(__file__).parents[1] / "docs" / "backbones.md"
LIST, REFUSALS = "list of backbones", "list of refusals"  # between such markers the test writes
SLOW = pytest.mark.slow
CLASSES, VISUAL, KV = 100, 10, 5  # of the counts in the list


@dataclass
class Row:
    """A family of the list: what people call it, what to know of it, timm names that are tried."""

    family: str
    notes: str
    names: list[str] = field(default_factory=list)


def read_rows(part: str) -> list[Row]:
    """One part of backbones.txt."""
    rows: list[Row] = []
    text = Path(__file__).with_name("backbones.txt").read_text()
    for line in text.partition(f"[{part}]\n")[2].partition("\n\n")[0].splitlines():
        if line.startswith(" "):
            rows[-1].names.append(line.strip())
        else:
            family, _, notes = line.partition(": ")
            rows.append(Row(family, notes))
    return rows


ROWS, REFUSED = read_rows("works"), read_rows("refused")
# For tiny networks, where width, depth, heads and two by three patches do not do.
OPTIONS: dict[str, dict[str, Any]] = {
    "vit_base_patch16_sapiens2": {"num_kv_heads": 2},
    "vit_small_r26_s32_224": {"img_size": (64, 96)},
}
TRIED = {name: row for row in ROWS for name in row.names}
# The first of a family in every run, its sisters in the slow ones.
NAMES = [
    pytest.param(name, marks=[] if name == row.names[0] and "_r26_" not in name else SLOW)
    for name, row in TRIED.items()
]


def create(name: str, **options: Any) -> Any:
    """What `load_backbone` builds under this name, without weights."""
    module = timm.create_model(name, **options)
    if name.endswith(".mae"):
        average_patches(module)
    return module


@cache
def whole(name: str) -> Any:
    """In its own size, on the meta device."""
    with torch.device("meta"):
        return create(name)


def tiny(name: str) -> Any:
    """Two by three patches, width 32, depth 2, float64, in which every weight matters."""
    found = re.search(r"patch(\d+)", name)
    side = int(found[1]) if found else 16
    torch.manual_seed(0)
    sizes = {"img_size": (2 * side, 3 * side), "embed_dim": 32, "depth": 2, "num_heads": 4}
    backbone = create(name, **{**sizes, "num_classes": 5, **OPTIONS.get(name, {})})
    backbone = backbone.double().eval()
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
            if "norm" in key and key.endswith("weight"):
                parameter.add_(1)
    return backbone


def images_for(backbone: Any, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    height, width = backbone.patch_embed.img_size
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=generator)


def prompted(backbone: nn.Module, **spec: Any) -> PromptedModel:
    """A model in eval mode whose prompts are large enough to matter."""
    counts = {"num_visual_prompts": 3, "num_kv_prompts": 2, "share_kv": False}
    model = PromptedModel(backbone, PromptSpec(num_classes=5, **{**counts, **spec}))
    model = model.double().eval()
    with torch.no_grad():
        for module in (model.visual, model.kv):
            for parameter in module.parameters() if module is not None else ():
                parameter.normal_()
    return model


def largest_gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@contextmanager
def with_prefix(backbone: Any, count: int) -> Iterator[None]:
    """Tell timm's rotary attention of so many more tokens in front that are not rotated."""
    attentions = [b.attn for b in backbone.blocks if hasattr(b.attn, "num_prefix_tokens")]
    for attn in attentions:
        attn.num_prefix_tokens += count
    yield
    for attn in attentions:
        attn.num_prefix_tokens -= count


def timms_features(backbone: Any, images: Tensor, model: PromptedModel) -> Tensor:
    """Visual prompts as tokens behind the prefix, run by timm's own blocks; pooled."""
    visual, prefix = model.visual, backbone.num_prefix_tokens
    count = model.spec.num_visual_prompts
    rope: Any = None
    x = backbone.patch_embed(images)
    if hasattr(backbone, "rope"):
        x, rope = backbone._pos_embed(x)
    else:
        x = backbone._pos_embed(x)
    x = backbone.norm_pre(x)
    with with_prefix(backbone, count):
        for i, block in enumerate(backbone.blocks):
            if i == 0 or model.spec.deep:
                rows = visual.rows(i).expand(len(x), -1, -1)
                x = torch.cat([x[:, :prefix], rows, x[:, prefix + (count if i else 0) :]], dim=1)
            if rope is None:
                x = block(x)
            else:
                x = block(x, rope=rope[i] if backbone.rope_mixed else rope)
    x = backbone.norm(x)
    x = torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)
    pooled: Tensor = backbone.forward_head(x, pre_logits=True)
    return pooled


# --- what works ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_without_prompts_features_are_the_backbones_own(name: str) -> None:
    backbone = tiny(name).requires_grad_(False)
    x, family = images_for(backbone), family_of(backbone)
    expected = backbone.forward_head(backbone.forward_features(x), pre_logits=True)
    model = prompted(backbone, num_visual_prompts=0, num_kv_prompts=0)
    assert torch.equal(model.features(x), expected)
    tokens = family.prompted_features(backbone, x, None, None)
    assert tokens.shape[1] == 1 or backbone.global_pool != "token"
    assert largest_gap(backbone.forward_head(tokens, pre_logits=True), expected) < 1e-12
    assert expected.std() > 1e-2


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_visual_prompts_equal_tokens_in_timms_own_blocks(name: str, deep: bool) -> None:
    """In rotary attention timm's blocks are told that prompts are prefix tokens: not rotated."""
    backbone = tiny(name)
    x = images_for(backbone)
    plain = backbone.forward_head(backbone.forward_features(x), pre_logits=True)
    model = prompted(backbone, num_kv_prompts=0, deep=deep)
    expected = timms_features(backbone, x, model)
    assert largest_gap(model.features(x), expected) < 1e-12
    assert largest_gap(with_token_form(model, True).features(x), expected) < 1e-12
    assert largest_gap(plain, expected) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forms_agree_with_key_value_prompts(name: str) -> None:
    backbone = tiny(name)
    x = images_for(backbone)
    for spec in ({}, {"share_kv": True, "kv_deep": False}, {"deep": False}):
        model = prompted(backbone, **spec)
        cheap = model.features(x)
        assert largest_gap(with_token_form(model, True).features(x), cheap) < 1e-12
        for block in backbone.blocks:
            block.attn.fused_attn = False
        assert largest_gap(model.features(x), cheap) < 1e-12
        for block in backbone.blocks:
            block.attn.fused_attn = True
        model.kv.key[0].copy_(model.kv.key[0].flip(0))  # other heads
        assert largest_gap(model.features(x), cheap) > 1e-9


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_deep_visual_prompts_fold_into_key_value_rows(name: str) -> None:
    model = prompted(tiny(name))
    x, folded = images_for(model.backbone), fold(model)
    assert folded.visual is None
    assert largest_gap(folded.features(x), model.features(x)) < 1e-12


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_order_of_prompts_does_not_matter(name: str) -> None:
    backbone = tiny(name)
    x, model = images_for(backbone), prompted(backbone)
    before = model.features(x)
    for i in range(2):
        model.visual.weight[i].copy_(model.visual.weight[i].flip(0))
        model.kv.key[i].copy_(model.kv.key[i].flip(1))
        model.kv.value[i].copy_(model.kv.value[i].flip(1))
    assert largest_gap(model.features(x), before) < 1e-12
    assert largest_gap(with_token_form(model, True).features(x), before) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_pooled_prompts_are_in_the_average(name: str) -> None:
    backbone = tiny(name)
    if backbone.global_pool == "token":
        with pytest.raises(InputError, match="on a backbone that pools its class token"):
            prompted(backbone, pool_prompts=True)
        return
    x = images_for(backbone)
    with torch.no_grad():
        model = prompted(backbone, pool_prompts=True)
        tokens = model.family.prompted_features(
            backbone, x, model.visual, model.kv, pool_prompts=True
        )
        without = model.family.prompted_features(backbone, x, model.visual, model.kv)
        prefix = backbone.num_prefix_tokens
        assert tokens.shape[1] == without.shape[1] + 3
        assert largest_gap(tokens[:, prefix + 3 :], without[:, prefix:]) < 1e-12
        assert largest_gap(with_token_form(model, True).features(x), model.features(x)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_prompt_and_nothing_else(name: str) -> None:
    model = prompted(tiny(name))
    x = images_for(model.backbone)
    grads: dict[bool, list[Tensor]] = {}
    for token_form in (False, True):
        model.zero_grad()
        features = with_token_form(model, token_form).features(x)
        (features * torch.linspace(-1, 1, features.shape[1])).sum().backward()
        assert all(p.grad is None for p in model.backbone.parameters())
        prompts = [*model.visual.parameters(), *model.kv.parameters()]
        grads[token_form] = [p.grad.clone() for p in prompts]
        for grad in grads[token_form]:
            assert grad.isfinite().all()
            assert grad.abs().amax(dim=-1).min() > 0  # each prompt, in each layer and head
    for cheap, whole_blocks in zip(grads[False], grads[True], strict=True):
        assert largest_gap(cheap, whole_blocks) < 1e-9 * max(1.0, cheap.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_remove_gives_the_backbone_back(name: str) -> None:
    backbone = tiny(name)
    x, state = images_for(backbone), copy.deepcopy(backbone.state_dict())
    logits, head = backbone(x), backbone.head
    model = prompted(backbone)
    model.features(x)
    assert remove(model) is backbone
    assert backbone.head is head
    assert torch.equal(backbone(x), logits)
    assert backbone.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())


# --- the list ------------------------------------------------------------------------------------

POOLING = {"token": "class token", "avg": "average", "map": "attention"}


def list_of_backbones() -> str:
    """Markdown, one line per family; counts in order of the names."""
    lines = [
        f"| family | timm names tried | pooling | backbone | tuned (P{VISUAL} n{KV}) | notes |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        poolings, sizes, shares = [], [], []
        for name in row.names:
            backbone = copy.deepcopy(whole(name))
            pooling = POOLING[backbone.global_pool]
            spec = PromptSpec(num_classes=CLASSES, num_visual_prompts=VISUAL, num_kv_prompts=KV)
            report = parameter_report(PromptedModel(backbone, spec))
            size = report["total"] - report["tuned"]
            sizes.append(f"{size / 1e9:.1f} B" if size >= 1e9 else f"{size / 1e6:.1f} M")
            shares.append(f"{report['percent']:.2f} %")
            if pooling not in poolings:
                poolings.append(pooling)
        names = ", ".join(f"`{name}`" for name in row.names)
        lines.append(
            f"| {row.family} | {names} | {', '.join(poolings)} | {', '.join(sizes)} "
            f"| {', '.join(shares)} | {row.notes} |"
        )
    return "\n".join(lines)


def refusal(name: str) -> str:
    """What is not known of a backbone."""
    with pytest.raises(InputError) as error:
        family_of(whole(name)).check_supported(whole(name))
    got = str(error.value).removeprefix("backbone: got ").partition(", expected ")[0]
    return re.sub(r"(?:block |attention )?class timm\.(?:\w+\.)+", "", got).removesuffix(
        " in layer 0"
    )


def list_of_refusals() -> str:
    """Markdown, one line per family."""
    lines = ["| family | timm names tried | refused for |", "|---|---|---|"]
    for row in REFUSED:
        names = ", ".join(f"`{name}`" for name in row.names)
        reasons = ", ".join(dict.fromkeys(refusal(name) for name in row.names))
        lines.append(f"| {row.family} | {names} | {reasons} |")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("marker", "make"), [(LIST, list_of_backbones), (REFUSALS, list_of_refusals)]
)
def test_list_in_the_docs_is_what_was_found(marker: str, make: Any) -> None:
    start, end = f"<!-- {marker} -->\n", "<!-- end -->"
    before, found, behind = DOCS.read_text().partition(start)
    assert found, f"no '{start}' in {DOCS.name}"
    written = f"{before}{start}{make()}\n{end}{behind.partition(end)[2]}"
    if os.environ.get("E2VPT_WRITE_DOCS") == "1":
        DOCS.write_text(written)
    assert DOCS.read_text() == written, "run it with E2VPT_WRITE_DOCS=1"


@pytest.mark.parametrize(
    ("name", "parameters", "tuned"),
    [
        ("vit_small_patch16_224.augreg_in21k", 21_665_664, 4_608 * 15 + 385 * 100),
        ("vit_base_patch16_224.augreg_in21k", 85_798_656, 215_140),
        ("vit_large_patch16_224.augreg_in21k", 303_301_632, 24_576 * 15 + 1_025 * 100),
    ],
)
def test_counts(name: str, parameters: int, tuned: int) -> None:
    """Worked by hand: L D per prompt, and the head."""
    spec = PromptSpec(num_classes=CLASSES, num_visual_prompts=VISUAL, num_kv_prompts=KV)
    report = parameter_report(PromptedModel(copy.deepcopy(whole(name)), spec))
    assert (report["total"] - report["tuned"], report["tuned"]) == (parameters, tuned)


@pytest.mark.slow
def test_every_other_name_of_these_modules() -> None:
    """The docs say of timm's two modules which names do not work; nothing else is refused."""
    refused = []
    for name in timm.list_models():
        if timm.model_entrypoint(name).__module__.rpartition(".")[2] not in (
            "vision_transformer",
            "eva",
        ):
            continue
        with torch.device("meta"):
            backbone = timm.create_model(name)
        try:
            family_of(backbone).check_supported(backbone)
        except InputError:
            refused.append(name)
    sentence = re.search(r"all work but\n(.*?)\.\n", DOCS.read_text(), flags=re.DOTALL)
    assert sentence is not None
    assert re.findall(r"`(\w+)`", sentence[1]) == sorted(refused)


def test_pooling_without_a_class_of_its_own_is_refused() -> None:
    for name in ("vit_small_patch16_224", "vit_small_patch16_dinov3"):
        backbone = tiny(name) if name in TRIED else create(name)
        backbone.reset_classifier(0, "")
        with pytest.raises(InputError, match=r"got global_pool ''.*token, avg, avgmax, max or map"):
            family_of(backbone).check_supported(backbone)
