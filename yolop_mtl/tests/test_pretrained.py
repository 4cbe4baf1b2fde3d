"""Weights of local files: by name, or a trunk by order; and a network written and read back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared_utils import checkpoint
from yolop_mtl import build_model, model_io
from yolop_mtl.blocks import SPPCSPC, Conv
from yolop_mtl.config import DataConfig, ModelConfig
from yolop_mtl.model import YOLOPv2
from yolop_mtl.pretrained import load_pretrained

from .networks import randomize

PYRAMID = ("before.0", "shortcut", "before.1", "before.2", "after.0", "after.1", "out")


def foreign(model: YOLOPv2) -> dict[str, Tensor]:
    """The trunk of a network as files of YOLOv7 name it, and a layer more."""
    state: dict[str, Tensor] = {}
    layers: list[tuple[str, Conv]] = []
    for part in (model.backbone, model.neck):
        for name, module in part.named_modules():
            if isinstance(module, SPPCSPC):
                inner = dict(module.named_modules())
                count = len(layers)
                for number, own in enumerate(PYRAMID, 1):
                    layers.append((f"model.{count}.cv{number}", inner[own]))
            elif isinstance(module, Conv) and not name.startswith("spp."):
                layers.append((f"model.{len(layers)}", module))
    for name, conv in layers:
        state[f"{name}.conv.weight"] = conv.conv.weight.detach()
        for key, tensor in conv.norm.state_dict().items():
            state[f"{name}.bn.{key}"] = tensor
    state["model.105.m.0.weight"] = torch.zeros(255, 128, 1, 1)
    return state


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_trunk_fits_by_order_and_shape(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(0)
    other, model = randomize(build_model("nano")), build_model("nano", num_classes=3)
    path = tmp_path / f"x{ending}"
    if ending == ".pt":
        checkpoint.save({"model": foreign(other), "epoch": 3}, path)
    else:
        checkpoint.save_weights(foreign(other), path, {})
    head = model.detection.outputs[0].weight.clone()
    report = load_pretrained(model, path)
    for part in ("backbone", "neck"):
        wanted = getattr(other, part).state_dict()
        for name, tensor in getattr(model, part).state_dict().items():
            if "num_batches" not in name:
                assert tensor.equal(wanted[name]), name
    assert model.detection.outputs[0].weight.equal(head)
    assert report.unexpected[-1] == "model.105.m.0.weight"
    assert any(name.startswith("lane.") for name in report.missing)
    assert not any("conv.weight" in name for name in report.missing if name.startswith("neck"))
    assert str(report).startswith(f"{len(report.loaded)} tensors loaded, ")


def test_own_weights_fit_by_name_except_where_classes_differ(tmp_path: Path) -> None:
    torch.manual_seed(0)
    anchors = [[[1.0, 1.0]] * 3] * 3
    other, model = (
        randomize(build_model("nano", num_classes=2, anchors=anchors)),
        build_model("nano"),
    )
    checkpoint.save({"ema": {"model": other.state_dict(), "updates": 3}}, tmp_path / "last.ckpt")
    report = load_pretrained(model, tmp_path / "last.ckpt")
    own, wanted = model.state_dict(), other.state_dict()
    assert all(own[name].equal(wanted[name]) for name in report.loaded)
    changed = {f"detection.outputs.{i}.{x}" for i in range(3) for x in ("weight", "bias")}
    assert set(report.missing) == changed | {f"detection.muls.{i}.vector" for i in range(3)}
    assert set(report.unexpected) == set(report.missing)
    assert not model.detection.anchors.equal(other.detection.anchors)


@pytest.mark.parametrize("state", [{}, foreign(build_model("small"))], ids=["empty", "wider"])
def test_a_file_of_which_nothing_fits_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    checkpoint.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"model\.weights: got .* of which no tensor fits"):
        load_pretrained(build_model("nano"), tmp_path / "x.pt")


def test_a_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save({"model": nn.Conv2d(1, 1, 1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="more than tensors and plain data, expected"):
        load_pretrained(build_model("nano"), tmp_path / "x.pt")


def test_a_network_is_written_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    anchors = [[[2.0, 3.0]] * 3] * 3
    options = {"tasks": ("detection", "lane"), "use_attention": False}
    model = randomize(build_model("nano", num_classes=2, anchors=anchors, **options))
    config = ModelConfig(preset="nano", **options)
    names = ("cat", "dog")
    model_io.save(model, tmp_path, config=config, data=DataConfig(), class_names=names)
    found = model_io.load(tmp_path)
    assert (found.class_names, found.img_size) == (names, (384, 640))
    assert found.model.state_dict().keys() == model.state_dict().keys()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.model(images)["lane"], model(images)["lane"])
    assert found.model.detection.anchors.tolist() == anchors


def test_files_of_two_runs_do_not_fit(tmp_path: Path) -> None:
    for name, preset in (("a", "nano"), ("b", "small")):
        model = build_model(preset, tasks=["lane"])
        config = ModelConfig(preset=preset, tasks=("lane",))
        folder = tmp_path / name
        model_io.save(model, folder, config=config, data=DataConfig(), class_names=["x"])
    (tmp_path / "a/model.json").replace(tmp_path / "b/model.json")
    with pytest.raises(ValueError, match=r"model\.safetensors backbone.*by model\.json"):
        model_io.load(tmp_path / "b")
