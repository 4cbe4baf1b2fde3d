"""Exported files give what the network gives, whatever the size; and say what they are."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import parser
from torch import Tensor
from torchvision.ops import box_iou

from yolop_mtl import build_model, export_check, export_graph, model_io
from yolop_mtl.boxes import Decoded, decode, suppress
from yolop_mtl.cli import main
from yolop_mtl.config import DataConfig, ModelConfig
from yolop_mtl.export import ExportConfig, export
from yolop_mtl.export_onnx import SUPPRESSION, Suppression
from yolop_mtl.model import PRESETS
from yolop_mtl.postprocess import detect

from .networks import blocks, enliven

SIZES = [(1, 64, 96), (2, 128, 64), (3, 96, 160)]
OUTPUTS = ["boxes", "scores", "drivable", "lane"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, lively: Path) -> Path:
    """Folder of all formats that this machine can write."""
    out = tmp_path_factory.mktemp("files")
    formats = ["onnx", "torchscript", "torch-export"]
    if importlib.util.find_spec("openvino"):
        formats.append("openvino")
    assert main(["export", str(lively), "--out", str(out), "--format", *formats]) == 0
    return out


def expected(folder: Path, images: Tensor) -> dict[str, Tensor]:
    model = model_io.load(folder).model
    with torch.no_grad():
        raw = model(images)
    boxes, scores = decode(raw["detection"], model.detection.anchors, model.detection.strides)
    return {"boxes": boxes, "scores": scores, "drivable": raw["drivable"], "lane": raw["lane"]}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, x in wanted.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], x, atol=1e-4 * float(x.abs().max()), rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_onnx_of_any_size(files: Path, lively: Path, size: tuple[int, int, int]) -> None:
    session = onnxruntime.InferenceSession(files / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    shapes = {output.name: output.shape for output in session.get_outputs()}
    assert shapes == {
        "boxes": ["batch", "num_predictions", 4],
        "scores": ["batch", "num_predictions", 3],
        "drivable": ["batch", 2, "height", "width"],
        "lane": ["batch", 1, "height", "width"],
    }
    images = blocks(*size)
    found = [torch.from_numpy(x) for x in session.run(OUTPUTS, {"images": images.numpy()})]
    assert_same(dict(zip(OUTPUTS, found, strict=True)), expected(lively, images))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ending", ["torchscript", "pt2"])
def test_files_of_torch_of_any_size(
    files: Path, lively: Path, ending: str, size: tuple[int, int, int]
) -> None:
    path, facts = files / f"model.{ending}", {"metadata.json": ""}
    if ending == "pt2":
        module = torch.export.load(path, extra_files=facts).module()
    else:
        with pytest.warns(DeprecationWarning, match=r"torch\.jit\.load"):
            module = torch.jit.load(path, _extra_files=facts)
    assert json.loads(facts["metadata.json"])["class_names"] == ["car", "bus", "tram"]
    images = blocks(*size)
    with torch.no_grad():
        assert_same(module(images), expected(lively, images))


@pytest.mark.parametrize("size", SIZES)
def test_openvino_of_any_size(files: Path, lively: Path, size: tuple[int, int, int]) -> None:
    openvino = pytest.importorskip("openvino")
    facts = openvino.Core().read_model(files / "model.xml").get_rt_info(["yolop_mtl", "tasks"])
    assert json.loads(facts.astype(str)) == ["detection", "drivable", "lane"]
    images = blocks(*size)
    found = export_check.open_openvino(files / "model.xml", OUTPUTS)(images)
    assert_same(found, expected(lively, images))


def test_the_file_says_what_it_is(files: Path, lively: Path) -> None:
    proto = onnx.load(files / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 18}
    facts = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    card = json.loads((lively / "model.json").read_text())
    assert facts.pop("anchors") == card["anchors"]
    outputs = facts.pop("outputs")
    assert list(outputs) == OUTPUTS
    assert facts == {
        "format_version": 1,
        "tasks": ["detection", "drivable", "lane"],
        "class_names": ["car", "bus", "tram"],
        "drivable_names": ["background", "drivable"],
        "strides": [8, 16, 32],
        "precision": "float32",
        "preprocessing": {
            "img_size": [64, 96],
            "channels": "RGB",
            "divide_by": 255,
            "padding": 114,
            "multiple_of": 32,
        },
    }
    # Nothing of where it was made.
    assert b".py" not in proto.SerializeToString()
    names = {path.name for path in files.iterdir()}
    assert names - {"model.xml", "model.bin"} == {"model.onnx", "model.torchscript", "model.pt2"}


# ---- suppression ---------------------------------------------------------------------------------


def test_suppression_in_the_file_keeps_the_same_boxes(with_nms: Path, lively: Path) -> None:
    session = onnxruntime.InferenceSession(with_nms)
    shapes = {output.name: output.shape for output in session.get_outputs()}
    assert shapes == {
        "num_detections": ["batch"],
        "boxes": ["batch", 300, 4],
        "scores": ["batch", 300],
        "labels": ["batch", 300],
        "drivable": ["batch", 2, 64, 96],
        "lane": ["batch", 1, 64, 96],
    }
    images = blocks(3, 64, 96)
    found = dict(zip(shapes, session.run(list(shapes), {"images": images.numpy()}), strict=True))
    model = model_io.load(lively).model
    with torch.no_grad():
        maps = model(images)["detection"]
    wanted = detect(maps, model.detection.anchors, conf=0.3, iou=0.45, max_det=300)
    for image, one in enumerate(wanted):
        count = len(one.scores)
        assert found["num_detections"][image] == count > 5
        boxes, scores = (torch.from_numpy(found[name][image]) for name in ("boxes", "scores"))
        assert found["labels"][image].tolist() == [*one.labels.tolist(), *[-1] * (300 - count)]
        assert box_iou(boxes[:count], one.boxes_xyxy).diagonal().min() > 0.99
        assert float((scores[:count] - one.scores).abs().max()) < 1e-3
        assert not boxes[count:].any()
        assert not scores[count:].any()
    facts = {x.key: json.loads(x.value) for x in onnx.load(with_nms).metadata_props}
    assert facts["nms"] == {"conf": 0.3, "iou": 0.45, "max_det": 300}
    assert list(facts["outputs"]) == list(shapes)


@pytest.mark.parametrize(("num_classes", "max_det", "conf"), [(1, 5, 0.2), (4, 40, 0.6), (2, 9, 0)])
def test_suppression_alone(num_classes: int, max_det: int, conf: float) -> None:
    """On random boxes; an image without any, and fewer boxes than rows."""
    torch.manual_seed(0)
    corners = torch.rand(3, 30, 2) * 80
    boxes = torch.cat([corners, corners + 5 + torch.rand(3, 30, 2) * 60], 2)
    scores = torch.rand(3, 30, num_classes)
    scores[1] = 0
    text = SUPPRESSION.format(ir_version=10, opset=18, conf=conf, iou=0.3, max_det=max_det)
    model = parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    given = {"all_boxes": boxes.numpy(), "all_scores": scores.numpy()}
    found = dict(zip(names, session.run(names, given), strict=True))
    wanted = suppress(
        Decoded(boxes, scores), conf_threshold=conf, iou_threshold=0.3, max_detections=max_det
    )
    assert found["num_detections"].tolist() == [len(one.scores) for one in wanted]
    assert found["num_detections"][1] == 0
    for image, one in enumerate(wanted):
        count = len(one.scores)
        assert found["labels"][image, :count].tolist() == one.labels.tolist()
        np.testing.assert_array_equal(found["boxes"][image, :count], one.boxes_xyxy)
        np.testing.assert_array_equal(found["scores"][image, :count], one.scores)


# ---- the check of a file -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"lane": x["lane"] + 0.1}, r"onnx lane: got a difference of 0\.1, expected"),
        (lambda x: x | {"boxes": x["boxes"] + 0.02}, r"onnx boxes: got a difference of 0\.02, exp"),
        (lambda x: x | {"scores": x["scores"] * torch.nan}, r"scores: got a difference of nan"),
        (lambda x: {"boxes": x["boxes"], "lane": x["lane"]}, r"scores: got shape none, expected "),
        (lambda x: x | {"lane": x["lane"][:1]}, r"onnx lane: got shape \(1, .*, expected \(2, 1"),
    ],
)
def test_a_file_that_gives_something_else_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    images = torch.zeros(2, 3, 64, 96)
    wanted = {
        "boxes": torch.rand(2, 4, 4) * 90,
        "scores": torch.rand(2, 4, 3),
        "lane": torch.randn(2, 1, 64, 96),
    }
    found = export_check.compare("onnx", [wanted], [wanted], [images], 1e-4)
    assert found == dict.fromkeys(wanted, 0.0)
    with pytest.raises(ValueError, match=message):
        export_check.compare("onnx", [change(wanted)], [wanted], [images], 1e-4)


def kept(conf: float = 0.3) -> tuple[dict[str, Tensor], Decoded, Suppression]:
    """Two boxes of an image, in four rows, and what they were chosen from."""
    boxes = torch.tensor([[10.0, 10, 30, 30], [50, 10, 80, 40]])
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.6]])
    found = {
        "num_detections": torch.tensor([2]),
        "boxes": torch.cat([boxes, torch.zeros(2, 4)])[None],
        "scores": torch.tensor([[0.9, 0.6, 0, 0]]),
        "labels": torch.tensor([[0, 1, -1, -1]]),
    }
    return found, Decoded(boxes[None], scores[None]), Suppression(conf=conf, iou=0.5, max_det=4)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("num_detections", (0,), 1, r"onnx num_detections: got 1, expected 2"),
        ("boxes", (0, 0, 0), 11, r"onnx boxes: got \(11\.0, 10\.0, 30\.0, 30\.0\) alone, expected"),
        ("scores", (0, 1), 0.62, r"got \(50\.0, .*\) alone"),
        ("labels", (0, 1), 0, r"got \(50\.0, .*\) alone"),
        ("labels", (0, 2), 0, r"got values after the last one, expected 0, with label -1"),
        ("scores", (0, 3), 0.1, r"got values after the last one"),
    ],
)
def test_a_file_that_keeps_other_boxes_is_refused(
    name: str, place: tuple[int, ...], value: float, message: str
) -> None:
    found, decoded, how = kept()
    assert export_check.compare_kept("onnx", found, decoded, how) == 2
    found[name][place] = value
    with pytest.raises(ValueError, match=message):
        export_check.compare_kept("onnx", found, decoded, how)


def test_a_refused_file_is_removed_and_an_older_one_stays(
    lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise export_check.refused("torchscript lane", "a difference of 9", "less")

    (tmp_path / "model.torchscript").write_text("older")
    monkeypatch.setattr(export_check, "compare", wrong)
    with pytest.raises(ValueError, match=r"got a difference of 9, expected less; no file was kept"):
        export(ExportConfig(source=lively, out=tmp_path, format=("torchscript",)))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


# ---- options -------------------------------------------------------------------------------------


def test_raw_maps_of_one_task_and_16_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tasks = ("detection",)
    net = enliven(build_model("nano", num_classes=2, tasks=tasks))
    config, data = ModelConfig(preset="nano", tasks=tasks), DataConfig(img_size=(64, 64))
    model_io.save(net, tmp_path, config=config, data=data, class_names=("a", "b"))
    options = {"format": ("torchscript",), "raw": True, "half": True}
    (done,) = export(ExportConfig(source=tmp_path / "model.safetensors", **options))
    assert done.path == tmp_path / "model_raw_fp16.torchscript"
    images = blocks(2, 64, 64)
    found = export_graph.load_torchscript(done.path)(images)
    assert [(name, tuple(x.shape)) for name, x in found.items()] == [
        ("detection_s8", (2, 21, 8, 8)),
        ("detection_s16", (2, 21, 4, 4)),
        ("detection_s32", (2, 21, 2, 2)),
    ]
    with torch.no_grad():
        wanted = net(images)["detection"]
    for got, x in zip(found.values(), wanted, strict=True):
        assert got.dtype == torch.float32
        difference = float((got - x).abs().max())
        assert 0 < difference < 0.02 * float(x.abs().max())
    assert done.differences.keys() == found.keys()
    assert "(1.3 MiB) differs from the network by at most: detection_s8 0.00" in str(done)


@pytest.mark.parametrize("option", ["nms", "raw"])
def test_boxes_of_a_network_for_lanes(option: str, tmp_path: Path) -> None:
    config = ModelConfig(preset="nano", tasks=("lane",))
    net = build_model("nano", tasks=("lane",))
    model_io.save(net, tmp_path, config=config, data=DataConfig(), class_names=("a",))
    cfg = ExportConfig(source=tmp_path, **{option: True})
    with pytest.raises(
        ValueError, match=rf"{option}: got a network for lane, expected one for box"
    ):
        export(cfg)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--img-size", "100", "640"],
            r"img_size: got \(100, 640\), expected a height and a width",
        ),
        (["--batch-size", "0"], r"batch_size: got 0, expected 1 or more"),
        (["--conf", "1.5"], r"conf: got 1\.5, expected 0 or more and at most 1"),
        (["--nms", "--raw"], r"nms: got raw maps, expected decoded boxes"),
        (
            ["--nms", "--format", "onnx", "torchscript"],
            r"nms: got format torchscript, expected onn",
        ),
        (
            ["--nms", "--half", "--format", "openvino"],
            r"half: got nms with another format than onnx",
        ),
        (["--format"], r"format: got nothing, expected one or more of onnx, torchscript"),
        (["--format", "tflite"], r"--format: got "),
        (
            ["--format", "tensorrt"],
            r"format tensorrt: got no package 'tensorrt', expected it insta",
        ),
        (
            ["--format", "openvino"],
            r"format openvino: got no package 'openvino', expected it insta",
        ),
        ([], r"model\.json: got no such file"),
    ],
)
def test_wrong_words_are_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "onnxscript" or None)
    assert main(["export", str(tmp_path), *options]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.search(message, told), told


def test_no_engine_without_a_gpu(
    lively: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["export", str(lively), "--format", "tensorrt"]) == 2
    assert (
        "format tensorrt: got no NVIDIA GPU, expected one; run this on" in capsys.readouterr().err
    )


# ---- slow ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_all_presets(preset: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, config = build_model(preset).eval(), ModelConfig(preset=preset)
    names = [f"kind {number}" for number in range(net.detection.num_classes)]
    data = DataConfig(img_size=(64, 96))
    model_io.save(net, tmp_path, config=config, data=data, class_names=names)
    (done,) = export(ExportConfig(source=tmp_path))
    assert list(done.differences) == OUTPUTS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"half": True, "batch_size": 2}, "model_fp16.onnx"),
        ({"half": True, "nms": True, "img_size": (64, 96)}, "model_nms_fp16.onnx"),
        ({"raw": True, "format": ("onnx", "openvino")}, "model_raw.onnx"),
        ({"nms": True, "format": ("onnx", "openvino")}, "model_nms.onnx"),
        ({"half": True, "format": ("openvino",), "img_size": (32, 64)}, "model_fp16.xml"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_further_forms(lively: Path, options: dict[str, object], name: str, tmp_path: Path) -> None:
    if "openvino" in options.get("format", ()):
        pytest.importorskip("openvino")
    done = export(ExportConfig(source=lively, out=tmp_path, **options))
    assert done[0].path.name == name
    limit = 5 if options.get("half") else 0.01  # of boxes, in pixels
    assert all(0 <= value < limit for one in done for value in one.differences.values())
    if options.get("nms"):
        assert all(one.num_suppressed > 20 for one in done)
