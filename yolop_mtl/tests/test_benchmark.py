"""The benchmark at tiny sizes: rows, reasons, finite values. No time is judged."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yolop_mtl import engines
from yolop_mtl.bench_network import Case, network, network_rows
from yolop_mtl.bench_parts import per_core_second
from yolop_mtl.bench_scene import make_street
from yolop_mtl.benchmark import BenchmarkConfig, benchmark
from yolop_mtl.boxes import COCO_ANCHORS
from yolop_mtl.cli import main
from yolop_mtl.engines import UnavailableError, build_engine, why_not
from yolop_mtl.measure import Row, Times, count_flops, matrix_peak, matrix_sides, race
from yolop_mtl.model import fuse
from yolop_mtl.postprocess import detect, native_detections, native_drivable, native_lane

from .networks import randomize

CPU = torch.device("cpu")
SIZE = (64, 96)
ANCHORS = torch.tensor(COCO_ANCHORS, dtype=torch.float32)
SMALL = {"matrix_sizes": (8, 16), "num_scenes": 2, "seconds": 0.0, "size": (120, 160)}
FIELDS = {"name", "value", "unit", "target", "direction", "detail"}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_rows_and_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = BenchmarkConfig(
        presets=("nano",), engines=("eager", "fused", "channels_last", "packed"),
        img_size=(*SIZE, 96, 64), repeats=5, accelerator="cpu", output=tmp_path / "bench/x.json",
    )  # fmt: skip
    report = benchmark(cfg, **SMALL, img_size=(64, 64))
    assert report == read(tmp_path / "bench/x.json")
    assert report.keys() == {"machine", "rows", "latencies", "skipped"}
    assert report["machine"]["threads"] == torch.get_num_threads()
    for row in report["rows"]:
        assert row.keys() == FIELDS
        assert math.isfinite(row["value"])
        assert row["value"] > 0
        assert row["direction"] in ("lower", "higher")
    names = [row["name"] for row in report["rows"]]
    assert len(set(names)) == len(names)
    for size in ("64 x 96", "96 x 64"):
        for precision in ("fp32", "bf16"):
            assert f"nano, {precision}, {size}: post-processing / network" in names
            assert f"nano, {precision}, {size}: whole predict / network" in names
            for engine in cfg.engines:
                assert f"nano, {precision}, {size}, batch 1, {engine}" in names
    assert names[-2:] == [
        "training samples per core-second, mosaic", "generated scenes per core-second",
    ]  # fmt: skip
    assert len(report["latencies"]) == 2 * 2 * 4
    for found in report["latencies"]:
        numbers = [value for value in found.values() if isinstance(value, float)]
        assert len(numbers) == 6
        assert all(math.isfinite(value) and value > 0 for value in numbers)
        assert found["p90_ms"] >= found["median_ms"]
        assert found["with_postprocessing_ms"] > found["median_ms"]
    told = capsys.readouterr().out
    if not torch.cuda.is_available():
        reasons = {row["name"]: row["reason"] for row in report["skipped"]}
        assert reasons["base, fp16, batch 32, on a GPU"] == "no GPU that torch can use"
        assert "skipped: base, fp16, batch 1, on a GPU: no GPU" in told


def test_targets_belong_to_base_at_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from yolop_mtl import bench_network

    def quick(preset: str) -> Any:
        return network("nano")

    times: dict[str, float] = {"matrix fp32 8": 1e-3, "post-processing": 0.1}
    times |= {"base": 0.6, "small": 0.2, "nano": 0.03}

    def fixed(sides: Any, repeats: int, device: torch.device) -> dict[str, Times]:
        return {
            name: Times(times.get(name, times.get(name.partition(",")[0], 0)), 1.0)
            for name in sides
        }

    monkeypatch.setattr(bench_network, "network", quick)
    monkeypatch.setattr(bench_network, "race", fixed)
    monkeypatch.setattr(bench_network, "count_flops", lambda model, shape: 1_024_000 * 0.6 * 0.9)
    presets, kinds = ("base", "small", "nano"), ("eager",)
    case = Case("fp32", (384, 640), 1)
    found = network_rows(case, presets, kinds, repeats=5, device=CPU, matrix_sizes=(8,))
    share, small, nano = (row for row in found.rows if row.target is not None)
    assert (share.value, share.target, share.verdict) == (pytest.approx(0.9), 0.80, "met")
    assert "best engine (eager)" in share.name
    assert (small.value, small.target, small.verdict) == (pytest.approx(3), 4, "MISSED")
    assert (nano.value, nano.target, nano.verdict) == (pytest.approx(20), 12, "met")
    for other in (Case("fp32", (384, 640), 2), Case("fp32", (64, 96), 1)):
        found = network_rows(other, presets, kinds, repeats=5, device=CPU, matrix_sizes=(8,))
        assert all(row.target is None for row in found.rows)


@torch.inference_mode()
@pytest.mark.parametrize("engine", ["eager", "fused", "channels_last", "packed", "onnxruntime",
                                    "openvino"])  # fmt: skip
def test_every_engine_gives_what_the_network_gives(engine: engines.Engine) -> None:
    if reason := why_not(engine, "fp32", CPU):
        pytest.skip(reason)
    model = randomize(network("nano"))
    images = torch.rand(1, 3, *SIZE)
    expected = model(images)["lane"].numpy()
    found = build_engine(engine, model, images, "fp32")()
    if isinstance(found, dict) and "lane" in found:
        lane = found["lane"].numpy()
    else:
        outputs = list(found.values()) if hasattr(found, "values") else found
        (lane,) = (x for x in map(np.asarray, outputs) if x.shape == expected.shape)
    np.testing.assert_allclose(lane, expected, atol=1e-3)
    assert any(name.endswith("norm.weight") for name in model.state_dict())  # unchanged


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.inference_mode()
def test_compiled_networks_give_what_the_network_gives(precision: Any) -> None:
    if reason := why_not("compiled", precision, CPU):
        pytest.skip(reason)
    model = randomize(network("nano"))
    images = torch.rand(1, 3, *SIZE)
    found = build_engine("compiled", model, images, precision)()["lane"].float()
    off = 1e-3 if precision == "fp32" else 5e-2
    torch.testing.assert_close(found, model(images)["lane"], rtol=0, atol=off)


@pytest.mark.gpu
def test_every_engine_on_a_gpu(tmp_path: Path) -> None:
    cfg = BenchmarkConfig(
        presets=("nano",), precisions=("fp16",), batch_sizes=(1, 2), img_size=SIZE, repeats=5,
        suite="network", output=tmp_path / "x.json",
    )  # fmt: skip
    report = benchmark(cfg, matrix_sizes=(64,))
    engines_run = {row["engine"] for row in report["latencies"]}
    assert engines_run == {"eager", "fused", "channels_last", "compiled"}
    assert all(math.isfinite(row["value"]) for row in report["rows"])
    assert {row["reason"] for row in report["skipped"]} == {"for CPUs", "measured on the CPU only"}


def test_what_this_machine_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert why_not("fused", "fp16", CPU) == "half precision is for GPUs"
    assert why_not("packed", "fp32", gpu) == "for CPUs"
    assert why_not("onnxruntime", "fp32", gpu) == "measured on the CPU only"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert why_not("compiled", "fp32", CPU) == "no C++ compiler (c++, g++, clang++)"
    assert why_not("compiled", "fp32", gpu) == ""
    with pytest.raises(UnavailableError, match="no C"):
        build_engine("compiled", network("nano"), torch.rand(1, 3, *SIZE), "fp32")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert why_not("openvino", "fp32", CPU) == "package openvino is not installed"
    monkeypatch.setattr(engines.packed, "is_available", lambda: False)
    assert why_not("packed", "fp32", CPU) == "this torch has no oneDNN"
    case = Case("fp32", SIZE, 1)
    found = network_rows(
        case, ("nano",), ("fused", "compiled"), repeats=5, device=CPU, matrix_sizes=(8,)
    )
    assert found.skipped == [
        {"name": "nano, fp32, 64 x 96, batch 1, compiled",
         "reason": "no C++ compiler (c++, g++, clang++)"}
    ]  # fmt: skip
    assert len(found.rows) == 1


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not("compiled", "fp32", CPU):
        pytest.skip("no C++ compiler")

    def fail(*args: object, **kwargs: object) -> Any:
        def call(images: object) -> None:
            raise RuntimeError("no room\nat all")

        return call

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UnavailableError, match=r"^torch\.compile failed: no room$"):
        build_engine("compiled", network("nano"), torch.rand(1, 3, *SIZE), "fp32")


def test_a_street_gives_its_labels_back() -> None:
    street = make_street(ANCHORS, 1, (384, 640), (720, 1280))
    scene, letterbox = street.scene, street.letterbox
    assert 50 <= street.num_fired <= 300
    (found,) = detect(street.raw["detection"], ANCHORS, conf=0.3)
    boxes = native_detections(found, letterbox).boxes_xyxy.numpy()
    low = np.maximum(boxes[:, None, :2], scene.boxes_xyxy[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], scene.boxes_xyxy[None, :, 2:])
    inner = (high - low).clip(min=0).prod(2)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (boxes, scene.boxes_xyxy)]
    iou = inner / (areas[0][:, None] + areas[1][None] - inner)
    assert (iou.max(0) > 0.5).mean() > 0.8
    assert (iou.max(1) > 0.5).all()
    road = native_drivable(street.raw["drivable"][0], letterbox) > 0
    assert (road == (scene.drivable > 0)).mean() > 0.98
    lane = native_lane(street.raw["lane"][0], letterbox)
    assert 0.5 < lane.sum() / scene.lane.sum() < 1.5
    counts = (detect(street.raw["detection"], ANCHORS, conf=0.3, iou=1.0)[0].scores > 0.3).sum()
    assert counts == street.num_fired


def test_sides_take_turns_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    found = race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 5, CPU)
    assert "".join(calls) == "ab" * 7
    assert found.keys() == {"a", "b"}
    assert all(0 <= times.median <= times.p90 for times in found.values())


def test_the_peak_is_the_best_product() -> None:
    sides = matrix_sides("bf16", CPU, (4, 8))
    product = sides["matrix bf16 8"]()
    assert (product.shape, product.dtype) == ((8, 8), torch.bfloat16)
    times = {"matrix bf16 4": Times(1.0, 2.0), "matrix bf16 8": Times(4.0, 9.0), "x": Times(0, 0)}
    assert matrix_peak(times, "bf16") == 2 * 8**3 / 4


def test_operations_of_a_pass() -> None:
    """The paper's network has 36.19 G multiply-accumulates at 384 x 640 (convolutions)."""
    with torch.device("meta"):
        model = fuse(network("release"), completely=True)
    assert count_flops(model, (1, 3, 384, 640)) / 2e9 == pytest.approx(36.19, abs=0.01)
    small = fuse(network("nano"), completely=True)
    computed = count_flops(small, (1, 3, *SIZE))
    assert computed == count_flops(small.to("meta"), (1, 3, *SIZE)) > 1e7


def test_steps_of_a_core() -> None:
    calls: list[int] = []
    rate = per_core_second([lambda: calls.append(0), lambda: calls.append(1)], 0.0)
    assert calls == [0, 1, 0, 1]
    assert rate > 0


@pytest.mark.parametrize(
    ("value", "target", "direction", "verdict"),
    [(1, None, "lower", ""), (1, 1, "lower", "met"), (1.1, 1, "lower", "MISSED"),
     (1.1, 1, "higher", "met"), (0.9, 1, "higher", "MISSED")],
)  # fmt: skip
def test_verdicts(value: float, target: float | None, direction: Any, verdict: str) -> None:
    assert Row("x", value, "ratio", target, direction, "").verdict == verdict


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "4"], r"repeats: got 4, expected 5 or more"),
        (["--img-size", "384"], r"img_size: got 1 numbers, expected pairs"),
        (["--img-size", "384", "641"], r"img_size: got \(384, 641\), expected multiples of 32"),
        (["--batch-sizes", "0"], r"batch_sizes: got \(0,\), expected 1 or more each"),
        (["--engines"], r"engines: got none, expected one or more"),
        (["--engines", "turbo"], r"--engines: got "),
        (["--output", "/dev/null/x/y.json"], r"output: got .*expected a file that can be written"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--accelerator", "gpu"]) == 2
    assert "accelerator: got gpu, expected a GPU that torch can use" in capsys.readouterr().err
