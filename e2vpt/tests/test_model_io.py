"""What is saved, that it comes back bit-equal, and that it fits nothing else (oracle O12)."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import e2vpt
from e2vpt import model_io
from e2vpt.backbones import Backbone, fingerprint, load_backbone
from e2vpt.images import Preprocessing
from e2vpt.micro_vit import build_micro_vit
from e2vpt.model import PromptedModel, PromptSpec, parameter_report, prompt, tuned_state
from shared_utils import checkpoint
from shared_utils.errors import InputError, MissingFileError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def micro(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_micro_vit(5, embed_dim=64, depth=2, num_heads=1).eval()


def model_of(backbone: nn.Module, **spec: Any) -> PromptedModel:
    """A model whose every tuned tensor has values of its own."""
    counts = {"num_classes": 3, "num_visual_prompts": 4, "num_kv_prompts": 2}
    model = PromptedModel(backbone, PromptSpec(**{**counts, **spec})).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for tensor in tuned_state(model).values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.4)  # above 0: some are variances
    return model


def each_layer(names: set[str], num_layers: int) -> set[str]:
    """Prompts have a tensor for each layer: `kv.key` stands for `kv.key.0` and so on."""
    lists = {"visual.weight", "kv.key", "kv.value"}
    return (names - lists) | {f"{n}.{i}" for n in names & lists for i in range(num_layers)}


CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "shared": ({}, {"visual.weight", "kv.key", "head.weight", "head.bias"}),
    "unshared": (
        {"share_kv": False},
        {"visual.weight", "kv.key", "kv.value", "head.weight", "head.bias"},
    ),
    "projected": (
        {"prompt_dim": 8},
        {
            "visual.weight",
            "visual.project.weight",
            "visual.project.bias",
            "kv.key",
            "head.weight",
            "head.bias",
        },
    ),
    "shallow": ({"deep": False, "kv_deep": False, "pool_prompts": True, "parity_head": True},
                {"visual.weight", "kv.key", "head.weight", "head.bias"}),
    "visual only": ({"num_kv_prompts": 0}, {"visual.weight", "head.weight", "head.bias"}),
    "kv only": ({"num_visual_prompts": 0}, {"kv.key", "head.weight", "head.bias"}),
    "linear": (
        {"num_visual_prompts": 0, "num_kv_prompts": 0}, {"head.weight", "head.bias"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal_with_exactly_these_keys(tmp_path: Path, case: str) -> None:
    options, keys = CASES[case]
    model = model_of(micro(), **options)
    e2vpt.save(model, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "model.json"}
    keys = each_layer(keys, 1 if case == "shallow" else model.geometry.num_layers)
    assert checkpoint.load_weights(folder / "model.safetensors")[0].keys() == keys
    loaded = e2vpt.load(folder, micro())
    assert loaded.spec == model.spec
    assert not loaded.training
    saved, found = tuned_state(model), tuned_state(loaded)
    assert all(torch.equal(saved[name], found[name]) for name in keys)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), loaded(IMAGES))


@pytest.mark.parametrize("trains", ["bias", "full"])
def test_round_trip_of_a_tuned_backbone(tmp_path: Path, trains: str) -> None:
    source = Backbone(micro(), "x", "x", "w", (32, 32), (0, 0, 0), (1, 1, 1), fingerprint(micro()))
    model = model_of(source.module, backbone_trains=trains)
    model_io.save(model, tmp_path, backbone=source)
    keys = set(checkpoint.load_weights(tmp_path / "model.safetensors")[0])
    network = micro()
    names = {n for n, _ in network.named_parameters() if trains == "full" or n.endswith("bias")}
    if trains == "full":
        names |= {n for n, _ in network.named_buffers()}
        assert "patch_embed.proj.1.running_var" in names
    own = {f"backbone.{n}" for n in names if not n.startswith("head.")}
    assert keys == own | each_layer(CASES["shared"][1], model.geometry.num_layers)
    loaded = e2vpt.load(tmp_path, micro())
    with torch.no_grad():
        assert torch.equal(model(IMAGES), loaded(IMAGES))
        assert not torch.equal(model(IMAGES), model_of(micro())(IMAGES))


def test_full_is_loaded_onto_any_weights_of_its_architecture(tmp_path: Path) -> None:
    model = model_of(micro(), backbone_trains="full")
    e2vpt.save(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), e2vpt.load(tmp_path, micro(seed=5))(IMAGES))


@pytest.mark.parametrize(
    ("classes", "expected"),
    [(100, 860_560), (2, 4 * (46_080 + 92_160 + 2 * 769))],
)
def test_file_is_four_bytes_per_tuned_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, expected: int
) -> None:
    """P10 n5 on ViT-B/16; of the backbone only the sizes matter, so it stays on the meta device."""
    monkeypatch.setattr(model_io, "fingerprint", lambda module: "0" * 64)
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224")
    model = prompt(backbone, classes, 10, 5)
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            owner = model.get_submodule(name.rpartition(".")[0])
            values = nn.Parameter(torch.zeros(parameter.shape))
            setattr(owner, name.rpartition(".")[2], values)
    e2vpt.save(model, tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 4 * parameter_report(model)["tuned"] == expected
    assert expected < size < expected + 3000  # names and shapes of 26 tensors


def test_the_named_backbone_is_loaded(tmp_path: Path, tiny_backbones: tuple[Path, Path]) -> None:
    source = load_backbone(str(tiny_backbones[0]), "micro_vit", img_size=(48, 48))
    model = model_of(source.module)
    prep = Preprocessing((48, 48), source.mean, source.std)
    model_io.save(model, tmp_path, backbone=source, class_names=["a", "b", "ü"], preprocessing=prep)
    card = model_io.read_card(tmp_path)
    assert card["class_names"] == ["a", "b", "ü"]
    assert Preprocessing.from_dict(card["preprocessing"]) == prep
    assert card["backbone"]["sha256"] == source.sha256
    assert card["parameters"] == parameter_report(model)
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(model(images), e2vpt.load(tmp_path)(images))


def test_timm_name_is_recorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("test_vit", img_size=32)
    again = copy.deepcopy(backbone)
    e2vpt.save(prompt(backbone, 2, 1, 1), tmp_path)
    name = model_io.read_card(tmp_path)["backbone"]["name"]
    assert name.startswith("test_vit")
    assert e2vpt.load(tmp_path, again).spec.num_classes == 2


def test_a_model_without_a_name_needs_its_module(tmp_path: Path) -> None:
    e2vpt.save(model_of(micro()), tmp_path)
    with pytest.raises(InputError, match=r"^backbone: got no name in model\.json, .*backbone="):
        e2vpt.load(tmp_path)


# ---- what does not fit ----------------------------------------------------------------------


def is_untouched(backbone: Any) -> bool:
    """Nothing of a module that was refused is frozen, in another mode or without its head."""
    trains = all(p.requires_grad for p in backbone.parameters())
    return trains and type(backbone.head) is nn.Linear and backbone(IMAGES).shape == (2, 5)


@pytest.mark.parametrize("options", [{}, {"share_kv": False}])
def test_other_weights_of_the_same_architecture_are_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    e2vpt.save(model_of(micro(), **options), tmp_path)
    other = micro(seed=1)
    match = r"^backbone: got weights with fingerprint \w{12}, expected \w{12}, those of the saved"
    with pytest.raises(InputError, match=match):
        e2vpt.load(tmp_path, other)
    assert is_untouched(other)


def test_other_weights_are_refused_where_the_biases_were_tuned(tmp_path: Path) -> None:
    source = Backbone(micro(), "x", "x", "w", (32, 32), (0, 0, 0), (1, 1, 1), fingerprint(micro()))
    model_io.save(model_of(source.module, backbone_trains="bias"), tmp_path, backbone=source)
    with pytest.raises(InputError, match=r"^backbone: got weights with fingerprint .* those of x;"):
        e2vpt.load(tmp_path, micro(seed=1))


def test_one_changed_weight_is_another_backbone(tmp_path: Path) -> None:
    e2vpt.save(model_of(micro()), tmp_path)
    other = micro()
    with torch.no_grad():
        other.blocks[1].mlp.fc2.bias[0] += 1e-6
    with pytest.raises(InputError, match="fingerprint"):
        e2vpt.load(tmp_path, other)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_visual_prompts": 5}, r"visual\.weight\.0: got shape \(4, 64\), expected \(5, 64\)"),
        ({"num_kv_prompts": 3}, r"kv\.key\.0: got shape \(1, 2, 64\), expected \(1, 3, 64\)"),
        ({"deep": False}, r"model\.safetensors: got an unexpected tensor 'visual\.weight\.1'"),
        ({"kv_deep": False}, r"model\.safetensors: got an unexpected tensor 'kv\.key\.1'"),
        ({"num_classes": 4}, r"head\.bias: got shape \(3,\), expected \(4,\)"),
        ({"share_kv": False}, r"model\.safetensors: got no tensor 'kv\.value\.0'"),
        ({"num_kv_prompts": 0}, r"model\.safetensors: got an unexpected tensor 'kv\.key\.0'"),
        ({"prompt_dim": 8}, r"model\.safetensors: got no tensor 'visual\.project\.bias'"),
        ({"backbone_trains": "full"}, r"model\.safetensors: got no tensor 'backbone\.blocks\.0"),
    ],
)  # fmt: skip
def test_tensors_of_another_model_are_refused(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    e2vpt.save(model_of(micro(), **options), tmp_path / "one")
    e2vpt.save(model_of(micro()), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "one" / "model.safetensors")
    backbone = micro()
    with pytest.raises(InputError, match=match):
        e2vpt.load(tmp_path / "one", backbone)
    assert is_untouched(backbone)


# ---- damaged, missing, foreign --------------------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[:-100]


def damaged_header(data: bytes) -> bytes:
    return data[:8] + b"\xff" + data[9:]


@pytest.mark.parametrize("damage", [cut, damaged_header, lambda data: b""])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    e2vpt.save(model_of(micro()), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"model\.safetensors: got a .*damaged"):
        e2vpt.load(tmp_path, micro())


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    e2vpt.save(model_of(micro()), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(MissingFileError, match=rf"{name}: got no such file"):
        e2vpt.load(tmp_path, micro())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", r"model\.json: got no JSON"),
        ("[1]", r"model\.json: got another kind of file, expected the card of an E²VPT model"),
        ('{"project": "dnc"}', r"model\.json: got another kind of file"),
        ('{"project": "e2vpt"}', r"model\.json: got another kind of file"),
    ],
)
def test_a_foreign_card_is_named(tmp_path: Path, text: str, match: str) -> None:
    e2vpt.save(model_of(micro()), tmp_path)
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(InputError, match=match):
        e2vpt.load(tmp_path, micro())


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("backbone", {}, "another kind of file"),
        ("spec", [], "another kind of file"),
        ("spec", {"num_classes": 3, "num_promts": 4}, r"spec\.num_promts: got an unknown key"),
        ("spec", {"num_classes": "3"}, r"spec\.num_classes: got '3', expected"),
    ],
)
def test_a_card_with_a_wrong_part_is_named(
    tmp_path: Path, part: str, value: Any, match: str
) -> None:
    e2vpt.save(model_of(micro()), tmp_path)
    card = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**card, part: value}))
    with pytest.raises(InputError, match=match):
        e2vpt.load(tmp_path, micro())


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_full_disk_keeps_both_old_files(tmp_path: Path, no_room: Any, writes: int) -> None:
    """`writes`: nothing, the weights, or their folder's entry too could be brought to the disk."""
    e2vpt.save(model_of(micro()), tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with no_room(writes), pytest.raises(InputError, match=r"got a full disk, expected room"):
        e2vpt.save(model_of(micro(), num_visual_prompts=9), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    assert e2vpt.load(tmp_path, micro()).spec.num_visual_prompts == 4
