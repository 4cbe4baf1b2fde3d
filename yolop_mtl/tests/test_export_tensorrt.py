"""Engines are asked for as TensorRT documents it; the engines themselves need a GPU."""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from onnx import ModelProto

from yolop_mtl.export_graph import Shape
from yolop_mtl.export_tensorrt import build, open_engine


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A stand-in that takes every graph."""
    module = MagicMock()
    module.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
    module.Builder().build_serialized_network.return_value = b"engine"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def test_a_free_batch_gets_a_profile(tensorrt: MagicMock) -> None:
    assert build(ModelProto(), Shape(None, (64, 96))) == b"engine"
    builder = tensorrt.Builder()
    builder.create_network.assert_called_once_with(2)
    profile = builder.create_optimization_profile()
    one, most = (1, 3, 64, 96), (16, 3, 64, 96)
    profile.set_shape.assert_called_once_with("images", one, one, most)
    builder.create_builder_config().add_optimization_profile.assert_called_once_with(profile)


def test_a_fixed_batch_gets_none(tensorrt: MagicMock) -> None:
    assert build(ModelProto(), Shape(4, (64, 96))) == b"engine"
    tensorrt.Builder().create_builder_config().add_optimization_profile.assert_not_called()


def test_a_graph_that_tensorrt_does_not_take(tensorrt: MagicMock) -> None:
    tensorrt.Builder().build_serialized_network.return_value = None
    with pytest.raises(
        ValueError, match=r"format tensorrt: got no engine, for the reasons above, "
    ):
        build(ModelProto(), Shape(1, (64, 96)))
    tensorrt.OnnxParser().parse.return_value = False
    tensorrt.OnnxParser().get_error.return_value = "node 7"
    with pytest.raises(ValueError, match=r"got node 7, expected an engine; take ONNX, or another"):
        build(ModelProto(), Shape(1, (64, 96)))


def test_an_engine_that_does_not_open(tensorrt: MagicMock, tmp_path: Path) -> None:
    tensorrt.Runtime().deserialize_cuda_engine.return_value = None
    (tmp_path / "x.engine").write_bytes(b"engine")
    with pytest.raises(ValueError, match="got an engine that does not open again, expected an eng"):
        open_engine(tmp_path / "x.engine")
