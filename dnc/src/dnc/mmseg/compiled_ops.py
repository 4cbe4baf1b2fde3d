"""A stand-in for mmcv's compiled operations, so that mmsegmentation imports without a compiler.

mmseg imports a few of them that none of its usual decoders calls. Where mmcv was installed without
them (mmcv-lite, or mmcv built without its extension) a module of the same names takes their place;
one that is called says so. With full mmcv nothing is replaced.
"""

import ast
import importlib
import importlib.util
import pkgutil
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from shared_utils.errors import InputError

NAME = "mmcv.ops"


def have_compiled_ops() -> bool:
    """Whether the installed mmcv has its compiled extension; does not import mmcv."""
    spec = importlib.util.find_spec("mmcv")
    return spec is not None and bool(
        PathFinder.find_spec("mmcv._ext", spec.submodule_search_locations)
    )


def install_stand_in() -> bool:
    """Put the stand-in into `sys.modules` where it is needed; call it before importing mmseg.

    Returns: whether a stand-in answers for `mmcv.ops` now.
    """
    known = sys.modules.get(NAME)
    if known is not None:
        return isinstance(known, StandIn)
    spec = importlib.util.find_spec("mmcv")
    if have_compiled_ops() or spec is None or spec.origin is None:
        return False
    module = StandIn(_names(Path(spec.origin).parent / "ops" / "__init__.py"))
    sys.modules[NAME] = module
    with warnings.catch_warnings():  # of what we know, and of what our pin of setuptools is for
        warnings.filterwarnings("ignore", "Fail to import ``MultiScaleDeformableAttention``")
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")
        mmcv = importlib.import_module("mmcv")
        importlib.import_module("mmcv.cnn.bricks.transformer")
    mmcv.ops = module  # type: ignore[attr-defined]
    return True


def repair_search() -> None:
    """Look for compiled operations where mmengine cannot: it needs what Python 3.14 dropped."""
    if hasattr(pkgutil, "find_loader"):
        return
    for name in ("utils.dl_utils", "utils.dl_utils.misc", "model.utils"):
        vars(importlib.import_module(f"mmengine.{name}"))["mmcv_full_available"] = have_compiled_ops
    constructor = importlib.import_module("mmengine.optim.optimizer.default_constructor")
    vars(constructor)["mmcv_full_available"] = have_compiled_ops


class StandIn(ModuleType):
    """The names of `mmcv.ops`: classes and functions that cannot be called."""

    def __init__(self, names: list[str]) -> None:
        """Stand in for `names`."""
        super().__init__(NAME, "Stand-in for compiled operations that are not installed.")
        self.__all__ = names

    def __getattr__(self, name: str) -> Any:
        """The stand-in of one operation, made when it is first asked for."""
        if name not in self.__dict__["__all__"]:
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
        found = _absent_class(name) if name[0].isupper() else _absent_function(name)
        setattr(self, name, found)
        return found


def _names(path: Path) -> list[str]:
    """What the real module offers, read from its source: importing it needs the extension."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def _refuse(name: str) -> NoReturn:
    raise InputError(
        f"{NAME}.{name}",
        "mmcv without compiled operations",
        "full mmcv 2.1.0",
        "build it (make install-mmdet; or MMCV_WITH_OPS=1 pip install --no-build-isolation "
        "mmcv==2.1.0 in place of mmcv-lite), or choose a part that does not need it",
    )


def _absent_class(name: str) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name)

    return type(name, (), {"__init__": refuse, "__module__": NAME})


def _absent_function(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name)

    refuse.__name__ = refuse.__qualname__ = name
    return refuse
