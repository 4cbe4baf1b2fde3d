"""The stand-in for mmcv's compiled operations."""

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from torch import nn

from dnc.mmseg import compiled_ops
from shared_utils.errors import InputError


def test_mmcv_lite_is_what_is_installed() -> None:
    assert not compiled_ops.have_compiled_ops()
    assert isinstance(sys.modules["mmcv.ops"], compiled_ops.StandIn)
    assert compiled_ops.install_stand_in()  # once is enough


def test_an_operation_that_is_called_says_its_name_and_how_to_get_it() -> None:
    from mmcv.ops import DeformConv2d, point_sample

    told = (
        r"mmcv\.ops\.{}: got mmcv without compiled operations, expected full mmcv 2\.1\.0; build it"
    )
    with pytest.raises(InputError, match=told.format("point_sample")):
        point_sample(1, 2)
    with pytest.raises(InputError, match=told.format("DeformConv2d")):
        DeformConv2d(3, 3, 3)
    assert not isinstance(3, DeformConv2d)


def test_only_real_names_are_answered_for() -> None:
    module = sys.modules["mmcv.ops"]
    assert {"point_sample", "PSAMask", "nms"} <= set(module.__all__)
    with pytest.raises(AttributeError, match="no_such_operation"):
        _ = module.no_such_operation


def test_full_mmcv_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    full = ModuleType("mmcv.ops")
    monkeypatch.setitem(sys.modules, "mmcv.ops", full)
    assert not compiled_ops.install_stand_in()
    monkeypatch.delitem(sys.modules, "mmcv.ops")
    monkeypatch.setattr(compiled_ops, "have_compiled_ops", lambda: True)
    assert not compiled_ops.install_stand_in()
    assert "mmcv.ops" not in sys.modules


def test_the_search_for_operations_does_without_what_python_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(pkgutil, "find_loader", raising=False)
    for name in ("utils.dl_utils", "utils.dl_utils.misc", "model.utils"):
        module = importlib.import_module(f"mmengine.{name}")
        monkeypatch.setattr(module, "mmcv_full_available", module.mmcv_full_available)
    constructor = importlib.import_module("mmengine.optim.optimizer.default_constructor")
    monkeypatch.setattr(constructor, "mmcv_full_available", constructor.mmcv_full_available)
    compiled_ops.repair_search()
    revert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3)))
    optimizer = {"type": "SGD", "lr": 0.1, "weight_decay": 0.1}
    build_optim_wrapper(
        nn.Linear(2, 2), {"optimizer": optimizer, "paramwise_cfg": {"norm_decay_mult": 0}}
    )


@pytest.mark.slow
def test_the_plug_in_imports_silently() -> None:
    code = "import dnc.mmseg, mmseg.models"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
