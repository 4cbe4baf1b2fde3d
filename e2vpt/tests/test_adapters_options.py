"""Options of LoRA, AdaptFormer and partial-k, wrong ones too, and whole runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from e2vpt import adapters
from e2vpt.cli import main
from e2vpt.config import ModelConfig
from e2vpt.model import PromptSpec
from e2vpt.train import build_spec
from shared_utils.errors import InputError

from .adapter_models import NOTHING, model_of, vit

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
