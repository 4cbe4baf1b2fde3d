"""TensorRT engines of the ONNX graph, for the kind of GPU that this machine has.

Written for TensorRT 10 and 11: networks are strongly typed, numbers have the type that they have in
the ONNX graph.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared_utils.errors import InputError
from yolop_mtl.export_check import Outputs, Runner
from yolop_mtl.export_graph import INPUT, Shape

if TYPE_CHECKING:
    from onnx import ModelProto

MAX_BATCH = 16  # images, where their number is free


def check_gpu() -> None:
    """Raise InputError where there is no GPU to build an engine for."""
    if not torch.cuda.is_available():
        do = "run this on the machine that is to use the engine"
        raise InputError("format tensorrt", "no NVIDIA GPU", "one", do)


def build(proto: "ModelProto", shape: Shape) -> bytes:
    """Build an engine for 1 to 16 images, or for as many as `shape` fixes.

    Args:
        proto: of a fixed size.
        shape: of its input.

    Raises: InputError where TensorRT cannot build it.
    """
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    flag = tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(proto.SerializeToString()):
        raise _refused(str(parser.get_error(0)))
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # 32 bits are to be 32
    if shape.batch is None:
        profile = builder.create_optimization_profile()
        rest = shape.example[1:]
        profile.set_shape(INPUT, (1, *rest), (1, *rest), (MAX_BATCH, *rest))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused("no engine, for the reasons above")
    return bytes(engine)


def open_engine(path: Path) -> Runner:
    """An engine on the GPU; images and outputs lie on the CPU."""
    import tensorrt

    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise _refused("an engine that does not open again")
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    outputs = [n for n in names if engine.get_tensor_mode(n) == tensorrt.TensorIOMode.OUTPUT]
    types = {tensorrt.DataType.FLOAT: torch.float32, tensorrt.DataType.INT64: torch.int64}

    def run(images: Tensor) -> Outputs:
        given = images.cuda().contiguous()
        context.set_input_shape(INPUT, tuple(given.shape))
        context.set_tensor_address(INPUT, given.data_ptr())
        found: dict[str, Any] = {}
        for name in outputs:
            shape, dtype = tuple(context.get_tensor_shape(name)), engine.get_tensor_dtype(name)
            found[name] = torch.empty(shape, dtype=types[dtype], device=given.device)
            context.set_tensor_address(name, found[name].data_ptr())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT did not run the engine")
        stream.synchronize()
        return {name: x.cpu() for name, x in found.items()}

    return run


def _refused(got: str) -> InputError:
    return InputError("format tensorrt", got, "an engine", "take ONNX, or another TensorRT")
