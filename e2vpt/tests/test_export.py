"""The ONNX file: it loads, its batch is free, and its logits are PyTorch's."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from e2vpt.export import Exported, Fold, export_onnx
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


def export(
    model: PromptedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Exported:
    """Save a model whose backbone has no name to load it by, and export it to `model.onnx`."""
    e2vpt.save(model, folder)
    monkeypatch.setattr(model_io, "load", lambda folder: model)
    return export_onnx(folder, folder / "model.onnx", **options)


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


def shapes_of(graph: Any) -> dict[str, tuple[int, ...]]:
    """Of every tensor that is given, made or constant, by name; 0 for the batch."""
    made = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    return made | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


@dataclass(frozen=True)
class Case:
    """A model and its file."""

    model: PromptedModel
    file: Path
    done: Exported

    @property
    def graph(self) -> Any:
        return onnx.shape_inference.infer_shapes(onnx.load(self.file)).graph

    @property
    def products(self) -> int:
        """Matrix products with weights or between activations."""
        return sum(node.op_type in ("MatMul", "Gemm") for node in self.graph.node)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """As `shapes_of`."""
        return list(shapes_of(self.graph).values())

    @property
    def work(self) -> int:
        """Multiplications with weights for an image, the patch embedding's aside."""
        shapes, total = shapes_of(self.graph), 0
        for node in self.graph.node:
            weight = shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
            if node.op_type in ("MatMul", "Gemm") and len(weight) == 2:
                total += math.prod(weight) * math.prod(shapes[node.output[0]][1:-1])
        return total


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Export a model once for all tests: `case(backbone, fold, **spec)`."""
    done: dict[str, Case] = {}

    def find(backbone: Callable[[], nn.Module], fold: Fold = "auto", **spec: Any) -> Case:
        key = f"{backbone.__name__} {fold} {spec}"
        if key not in done:
            model, folder = model_of(backbone(), **spec), tmp_path_factory.mktemp("case")
            with pytest.MonkeyPatch.context() as patch:
                result = export(model, folder, patch, fold=fold)
            done[key] = Case(model, folder / "model.onnx", result)
        return done[key]

    return find


NOTHING = {"num_visual_prompts": 0, "num_kv_prompts": 0}


@pytest.mark.parametrize("share_kv", [True, False])
def test_deep_prompts_leave_the_sequence_as_long_as_it_was(
    case: Callable[..., Case], share_kv: bool
) -> None:
    found = case(cls_vit, share_kv=share_kv)
    assert_agrees(found.file, found.model)
    # The last block computes the class token alone.
    assert mlp_lengths(found.file, 4 * 48) == {TOKENS: 2, 1: 1}


@pytest.mark.parametrize(("backbone", "tokens"), [(cls_vit, TOKENS), (micro, 64)])
def test_folded_prompts_are_key_and_value_rows_alone(
    case: Callable[..., Case], backbone: Callable[[], nn.Module], tokens: int
) -> None:
    found, plain, rows = case(backbone, share_kv=True), case(backbone, **NOTHING), PROMPTS + KV
    assert found.done.is_folded
    assert found.done.form == (
        f"folded: the plain backbone's sequence, {rows} key and value rows in a layer"
    )
    # Nothing but attention knows of more than the plain sequence: its keys, values and weights.
    longer = {tokens + PROMPTS, tokens + KV}
    assert [shape for shape in found.shapes if longer & set(shape)] == []
    assert {len(shape) for shape in found.shapes if tokens + rows in shape} == {4}
    # All that there is of prompts are constants, which are the rows.
    layers = found.model.geometry.layers
    head = (layers[0].num_heads, layers[0].head_dim)
    constants = [onnx.numpy_helper.to_array(tensor) for tensor in found.graph.initializer]
    own = [
        array
        for array in constants
        if {PROMPTS, rows} & set(array.shape[:2]) or array.shape == (1, KV, *head)
    ]
    own = [array for array in own if array.ndim > 1]  # not a vector of sizes
    assert [array.shape for array in own] == [(1, rows, *head)] * 2 * len(layers)
    folded = e2vpt.fold(found.model).kv
    for i in range(len(layers)):
        for expected in folded(i):
            given = expected.detach().transpose(0, 1)[None].numpy()
            assert sum(np.array_equal(given, array) for array in own) == 1
    # No product has to do with them. Where the last block computes the class token alone, its query
    # is a product of its own, of one token, instead of a third of a product of all tokens.
    assert found.products <= plain.products + (backbone is cls_vit)
    assert found.work <= plain.work
    unfolded = case(backbone, "no")
    assert unfolded.done == replace(unfolded.done, is_folded=False, form="not folded, as asked")
    assert unfolded.products == found.products + len(layers)
    assert unfolded.work > found.work
    assert_agrees(found.file, unfolded.model)
    assert_agrees(unfolded.file, found.model)


def test_rows_of_the_first_layer_alone(case: Callable[..., Case]) -> None:
    found = case(cls_vit, kv_deep=False)
    assert found.done.form.endswith(f"sequence, {PROMPTS} to {PROMPTS + KV} key and value rows in a"
                                    " layer")  # fmt: skip
    assert_agrees(found.file, found.model)


def test_shallow_prompts_run_through_all_blocks(case: Callable[..., Case]) -> None:
    found = case(cls_vit, deep=False, kv_deep=False)
    assert_agrees(found.file, found.model)
    assert mlp_lengths(found.file, 4 * 48) == {TOKENS + PROMPTS: 2, 1: 1}
    assert not found.done.is_folded
    assert found.done.form == (
        "not folded: model: got shallow prompts, which run through all layers, expected deep ones: "
        "folding would not be exact; use it as it is"
    )


def test_pooled_prompts_are_left_as_they_are(case: Callable[..., Case]) -> None:
    found = case(micro, pool_prompts=True)
    assert_agrees(found.file, found.model)
    assert found.done.form.startswith("not folded: model: got prompts that are pooled (pool_promp")


def test_what_must_be_folded_and_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(cls_vit(), deep=False)
    with pytest.raises(InputError, match=r"^model: got shallow prompts, which run through all la"):
        export(model, tmp_path, monkeypatch, fold="yes")
    assert not (tmp_path / "model.onnx").exists()


def test_micro_vit(case: Callable[..., Case]) -> None:
    found = case(micro, share_kv=True)
    assert_agrees(found.file, found.model)
    assert mlp_lengths(found.file, 4 * 64) == {64: 2}


def test_no_prompts_at_all(case: Callable[..., Case]) -> None:
    found = case(micro, **NOTHING)
    assert_agrees(found.file, found.model)
    assert found.done.form == "folded: the plain backbone and a head, no prompts"


def test_a_trained_run(
    tmp_path: Path, digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "there" / "digits.onnx"
    assert main(["export", str(digits_run), "--output", str(file)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{file}: onnxruntime agrees with PyTorch to ")
    assert second == "folded: the plain backbone's sequence, 6 key and value rows in a layer"
    assert [path.name for path in file.parent.iterdir()] == ["digits.onnx"]
    assert_agrees(file, model_io.load(digits_run))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    card = model_io.read_card(digits_run)
    assert json.loads(facts["class_names"]) == [str(i) for i in range(10)]
    assert json.loads(facts["preprocessing"]) == card["preprocessing"]
    assert json.loads(facts["preprocessing"])["img_size"] == [32, 32]


def trained(folder: Path, quick: list[str], *options: str) -> Path:
    """The run folder of `e2vpt train digits`."""
    argv = ["train", "digits", "--runs-dir", str(folder), "--name", "run", *quick, *options]
    assert main(argv) == 0
    return folder / "e2vpt" / "run"


def assert_run_exports(
    run: Path, form: str, capsys: pytest.CaptureFixture[str], *options: str
) -> None:
    capsys.readouterr()
    assert main(["export", str(run), *options]) == 0
    assert re.fullmatch(form, capsys.readouterr().out.splitlines()[1])
    assert_agrees(run / "model.onnx", model_io.load(run))


def test_a_run_that_does_not_fold(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, quick, "--model.method", "vpt-shallow", "--optim.lr", "1")
    capsys.readouterr()
    assert main(["export", str(run), "--fold", "yes"]) == 2
    told = capsys.readouterr()
    error = (
        "model: got shallow prompts, which run through all layers, expected deep ones: folding "
        "would not be exact; use it as it is"
    )
    assert (told.out, told.err) == ("", f"error: {error}\n")
    assert not (run / "model.onnx").exists()
    assert_run_exports(run, re.escape(f"not folded: {error}"), capsys)


def test_a_pruned_run(tmp_path: Path, digits_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["prune", str(digits_run), "--prune.num-tokens", "1", "--prune.num-segments", "4"]
    assert main([*argv, "--runs-dir", str(tmp_path), "--name", "run"]) == 0
    form = "folded: the plain backbone's sequence, 5 key and value rows in a layer"
    assert_run_exports(tmp_path / "e2vpt" / "run", form, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("linear", "folded: the plain backbone and a head, no prompts"),
        ("vpt-deep", "folded: the plain backbone's sequence, 4 key and value rows in a layer"),
        ("lora", r"not folded: model: got adapters \(lora\), expected .*"),
        ("adaptformer", r"not folded: model: got adapters \(adaptformer\), expected .*"),
        ("bias", r"not folded: model: got a backbone that trains \(bias\), expected .*"),
        ("partial", r"not folded: model: got a backbone that trains \(partial\), expected .*"),
        ("full", r"not folded: model: got a backbone that trains \(full\), expected .*"),
    ],
)
def test_a_run_of_every_method(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str], method: str, form: str
) -> None:
    run = trained(tmp_path, quick, "--model.method", method, "--optim.lr", "0.01")
    assert_run_exports(run, form, capsys)


@pytest.mark.slow
def test_a_searched_run(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["search", "digits", "--runs-dir", str(tmp_path), "--name", "run", *quick]
    argv += ["--search.lrs", "0.1", "--search.weight-decays", "0", "--search.seeds", "0"]
    argv += ["--search.candidate-epochs", "1", "--search.finalists", "1", "--search.no-controls"]
    assert main(argv) == 0
    trials = tmp_path / "e2vpt" / "run" / "trials"
    left = r"folded: the plain backbone's sequence, [345] key and value rows in a layer"
    assert_run_exports(trials / "final-e2vpt-pruned-0", left, capsys)


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
