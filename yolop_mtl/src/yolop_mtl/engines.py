"""What the benchmark runs a network with: torch in several ways, ONNX Runtime, OpenVINO.

Weights may be random: time does not depend on them.
"""

import copy
import importlib.util
import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, Literal

import torch
from torch import Tensor

from yolop_mtl import packed
from yolop_mtl.measure import DTYPES, Precision
from yolop_mtl.model import YOLOPv2, fuse
from yolop_mtl.subpixel import to_subpixel

Engine = Literal["eager", "fused", "channels_last", "packed", "compiled", "onnxruntime", "openvino"]
ABOUT: dict[Engine, str] = {
    "eager": "as trained: norms apart, autocast below fp32",
    "fused": "norms folded, weights in the precision",
    "channels_last": "folded, channels last",
    "packed": "folded, sub-pixel heads, channels last, oneDNN's own layout, SiLU inside",
    "compiled": "folded, sub-pixel heads on a CPU, channels last, torch.compile",
    "onnxruntime": "ONNX file, sub-pixel heads",
    "openvino": "ONNX file, sub-pixel heads",
}
MOST_COMPILED = 1000  # networks of one process
COMPILERS = ("c++", "g++", "clang++")


class UnavailableError(Exception):
    """This machine or installation cannot run it; the text says why."""


def build_engine(
    engine: Engine, model: YOLOPv2, images: Tensor, precision: Precision
) -> Callable[[], Any]:
    """One pass of a network over a batch, ready to be timed.

    Args:
        engine: how.
        model: unfused, in eval mode; unchanged.
        images: (B, 3, H, W) float32 on the device to run on.
        precision: of weights and arithmetic.

    Returns: a function that gives the raw outputs, on a GPU perhaps before they are there.

    Raises: UnavailableError where this machine cannot run it.
    """
    if why := why_not(engine, precision, images.device):
        raise UnavailableError(why)
    model = copy.deepcopy(model).to(images.device)
    if engine == "eager":
        return _torch_step(model, images, precision, is_autocast=True)
    if engine in ("onnxruntime", "openvino"):
        proto = _as_onnx(model, images)
        build = _onnxruntime_step if engine == "onnxruntime" else _openvino_step
        return build(proto, images, precision)
    fuse(model, completely=True).to(DTYPES[precision])
    inputs = images.to(DTYPES[precision])
    if engine in ("packed", "compiled") and images.device.type == "cpu":
        to_subpixel(model)
    if engine == "packed":
        packed.pack(model, (images.shape[2], images.shape[3]), batch_size=len(images))
    if engine != "fused":
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    if engine in ("channels_last", "compiled"):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if engine == "compiled":
        return _compiled_step(model, inputs)
    return _torch_step(model, inputs, precision, is_autocast=False)


def why_not(engine: Engine, precision: Precision, device: torch.device) -> str:
    """Why an engine cannot run here in a precision; empty where it can."""
    is_gpu = device.type == "cuda"
    if precision == "fp16" and not is_gpu and engine != "openvino":
        return "half precision is for GPUs"
    if engine == "packed":
        if is_gpu:
            return "for CPUs"
        return "" if packed.is_available() else "this torch has no oneDNN"
    if engine == "compiled" and not is_gpu and not any(map(shutil.which, COMPILERS)):
        return f"no C++ compiler ({', '.join(COMPILERS)})"
    if engine in ("onnxruntime", "openvino"):
        for package in (engine, "onnx", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                return f"package {package} is not installed"
        if is_gpu:
            return "measured on the CPU only"
        if engine == "onnxruntime" and precision != "fp32":
            return "its CPU convolutions are fp32"
    return ""


def _torch_step(
    model: YOLOPv2, images: Tensor, precision: Precision, *, is_autocast: bool
) -> Callable[[], Any]:
    is_lower = is_autocast and precision != "fp32"
    dtype = DTYPES[precision] if is_lower else None

    def step() -> Any:
        with (
            torch.inference_mode(),
            torch.autocast(images.device.type, dtype, enabled=is_lower),
        ):
            return model(images)

    return step


def _compiled_step(model: YOLOPv2, images: Tensor) -> Callable[[], Any]:
    """With weights as constants on a CPU, as a CUDA graph on a GPU."""
    options: dict[str, Any] = {"freezing": True}
    if images.device.type == "cuda":
        options["triton.cudagraphs"] = True
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, options=options)

    def step() -> Any:
        with torch.inference_mode():
            return compiled(images)

    try:
        # All networks share one `forward`, which would be run as it is after eight of them.
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
            step()
    except Exception as error:  # of compilers and drivers, in many types
        reason = str(error).strip().splitlines()[0]
        raise UnavailableError(f"torch.compile failed: {reason}") from error
    return step


def _as_onnx(model: YOLOPv2, images: Tensor) -> Any:
    """The folded network with raw outputs, of this very shape."""
    from yolop_mtl import export_graph, export_onnx

    shape = export_graph.Shape(len(images), (images.shape[2], images.shape[3]))
    graph = export_graph.Deployable(model, is_raw=True)
    names = list(graph(images))
    with redirect_stdout(io.StringIO()):  # the exporter tells of its progress
        return export_onnx.convert(export_graph.record(graph, shape), names, shape)


def _onnxruntime_step(proto: Any, images: Tensor, precision: Precision) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that went on looking for work after a pass would slow down the next engine's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, inputs)


def _openvino_step(proto: Any, images: Tensor, precision: Precision) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.read_model(model=io.BytesIO(proto.SerializeToString()))
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    inputs = [images.numpy()]
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)
