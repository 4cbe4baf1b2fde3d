"""The ONNX file: it loads, its batch is free, and its logits are PyTorch's."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import e2vpt
from e2vpt import model_io
from e2vpt.cli import main
from e2vpt.export import export_onnx
from e2vpt.micro_vit import build_micro_vit
from e2vpt.model import PromptedModel, PromptSpec
from shared_utils.errors import InputError

TOKENS, PROMPTS, KV = 17, 5, 3  # class token and 4 x 4 patches; sizes that sum to nothing else


def cls_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0
    ).eval()


def micro() -> nn.Module:
    torch.manual_seed(0)
    return build_micro_vit(0, embed_dim=64, depth=2, num_heads=1).eval()


def model_of(backbone: nn.Module, **options: Any) -> PromptedModel:
    counts = {"num_classes": 4, "num_visual_prompts": PROMPTS, "num_kv_prompts": KV}
    model = PromptedModel(backbone, PromptSpec(**{**counts, **options})).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def exported(model: PromptedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save and export a model whose backbone has no name to load it by."""
    e2vpt.save(model, folder)
    monkeypatch.setattr(model_io, "load", lambda folder: model)
    export_onnx(folder, folder / "model.onnx")
    return folder / "model.onnx"


def assert_agrees(file: Path, model: PromptedModel, side: int = 32) -> None:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.shape[1:]) == ("images", [3, side, side])
    for batch in (1, 5):
        images = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            expected = model(images).numpy()
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        assert logits.shape == expected.shape
        assert expected.std() > 0.1
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


def mlp_lengths(file: Path, hidden: int) -> Counter[int]:
    """How many tokens each MLP's hidden activation has: shapes (B, tokens, hidden) in the graph."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(file)).graph
    lengths: Counter[int] = Counter()
    makers = {name: node.op_type for node in graph.node for name in node.output}
    for value in graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if len(shape) == 3 and shape[2] == hidden and makers.get(value.name) == "MatMul":
            lengths[shape[1]] += 1
    return lengths


@pytest.mark.parametrize("share_kv", [True, False])
def test_deep_prompts_leave_the_sequence_as_long_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share_kv: bool
) -> None:
    model = model_of(cls_vit(), share_kv=share_kv)
    file = exported(model, tmp_path, monkeypatch)
    assert_agrees(file, model)
    # The last block computes the class token alone.
    assert mlp_lengths(file, 4 * 48) == {TOKENS: 2, 1: 1}


def test_shallow_prompts_run_through_all_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(cls_vit(), deep=False, kv_deep=False)
    file = exported(model, tmp_path, monkeypatch)
    assert_agrees(file, model)
    assert mlp_lengths(file, 4 * 48) == {TOKENS + PROMPTS: 2, 1: 1}


def test_micro_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(micro())
    file = exported(model, tmp_path, monkeypatch)
    assert_agrees(file, model)
    assert mlp_lengths(file, 4 * 64) == {64: 2}


def test_no_prompts_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(micro(), num_visual_prompts=0, num_kv_prompts=0)
    assert_agrees(exported(model, tmp_path, monkeypatch), model)


def test_a_trained_run(
    tmp_path: Path, digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "there" / "digits.onnx"
    assert main(["export", str(digits_run), "--output", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: onnxruntime agrees with PyTorch to ")
    assert [path.name for path in file.parent.iterdir()] == ["digits.onnx"]
    assert_agrees(file, model_io.load(digits_run))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    card = model_io.read_card(digits_run)
    assert json.loads(facts["class_names"]) == [str(i) for i in range(10)]
    assert json.loads(facts["preprocessing"]) == card["preprocessing"]
    assert json.loads(facts["preprocessing"])["img_size"] == [32, 32]


@pytest.fixture
def another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export another graph than the model's: the mean of all pixels."""
    from onnx import TensorProto, helper

    def other(*args: Any, **options: Any) -> Any:
        given = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 3, 32, 32])
        made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 1])
        nodes = [
            helper.make_node("GlobalAveragePool", ["images"], ["colours"]),  # (b, 3, 1, 1)
            helper.make_node("Transpose", ["colours"], ["turned"], perm=[0, 2, 1, 3]),
            helper.make_node("GlobalAveragePool", ["turned"], ["mean"]),  # (b, 1, 1, 1)
            helper.make_node("Flatten", ["mean"], ["logits"]),
        ]
        graph = helper.make_graph(nodes, "wrong", [given], [made])
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return type("Program", (), {"model_proto": proto})()

    monkeypatch.setattr(torch.onnx, "export", other)


@pytest.mark.usefixtures("another_graph")
def test_a_failed_check_leaves_no_file(tmp_path: Path, digits_run: Path) -> None:
    file = tmp_path / "model.onnx"
    with pytest.raises(InputError, match=r"^export: got logits that differ by .* expected at most"):
        export_onnx(digits_run, file)
    assert not any(tmp_path.iterdir())
    file.write_bytes(b"an older one")
    with pytest.raises(InputError):
        export_onnx(digits_run, file)
    assert file.read_bytes() == b"an older one"


def test_output_that_is_a_folder(
    tmp_path: Path, digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(digits_run), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: output: got the folder '{tmp_path}', exp")
