"""What holds for every module: quiet imports, no dead options, sizes, nothing of this machine."""

import ast
import dataclasses
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import e2vpt
import shared_utils
from e2vpt import bench, cli, config, data_check, pretrain_config, search_config
from e2vpt.backbones import load_backbone
from e2vpt.methods import build_spec
from e2vpt.micro_vit import build_micro_vit
from e2vpt.model import PromptedModel, parameter_report
from e2vpt.pretrain_config import HEAD_DIM, PRETRAIN_RECIPES
from e2vpt.recipes import RECIPES

SOURCE = Path(e2vpt.__file__).parent
MODULES = sorted(name for _, name, _ in pkgutil.iter_modules([str(SOURCE)]))

# The heavy packages once, then each module alone in a fork: as fresh as a new interpreter.
IMPORTS = """
import importlib, os, sys
import timm, torch, torchvision, lightning.fabric, matplotlib.figure, onnx, PIL.Image, tyro
for name in sys.argv[1:]:
    assert not [m for m in sys.modules if m.partition(".")[0] in ("e2vpt", "shared_utils")]
    sys.stdout.flush()
    child = os.fork()
    if not child:
        argv = list(sys.argv)
        importlib.import_module(name)
        assert not torch.cuda.is_initialized(), f"{name} initialises CUDA"
        assert sys.argv == argv
        sys.stdout.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"{name} left with {status}")
"""


def test_every_module_imports_alone_and_quietly() -> None:
    names = ["e2vpt", *(f"e2vpt.{name}" for name in MODULES if name != "__main__")]
    assert len(names) > 20
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *names], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_modules_stay_under_400_lines() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCE.glob("*.py")}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}


def test_nothing_of_a_machine_or_an_index_in_the_package() -> None:
    wrong = re.compile(
        r"(?<![\w.<])/(work|home|root|tmp|Users|mnt|usr|opt|data)/|[A-Z]:\\\\"
        r"|pypi\.|pythonhosted|index-url|localhost|127\.0\.0\.1",
    )
    texts = [
        path
        for path in SOURCE.rglob("*")
        if path.suffix in (".py", ".json", ".md", ".txt") or path.name.startswith("LICENSE")
    ]
    assert {"config.py", "micro_vit.json"} <= {path.name for path in texts}
    found = {path.name: wrong.search(path.read_text()) for path in texts}
    assert {name: match[0] for name, match in found.items() if match} == {}


# ---- options --------------------------------------------------------------------------------

CONFIGS = [
    config.TrainConfig,
    search_config.SearchConfig,
    pretrain_config.PretrainConfig,
    bench.BenchConfig,
    cli.EvaluateConfig,
    cli.PredictConfig,
    cli.ExportConfig,
    cli.InfoConfig,
    data_check.CheckConfig,
]


def fields_of(cls: Any) -> Iterator[tuple[str, str]]:
    """(class, field) of a configuration and its groups."""
    for name, hint in get_type_hints(cls).items():
        kind = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        yield cls.__name__, name
        if dataclasses.is_dataclass(kind):
            yield from fields_of(kind)


class Reads(ast.NodeVisitor):
    """Names of attributes that are read; what a class does to check itself does not count."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name != "__post_init__":
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "getattr":
            name = node.args[1]
            if isinstance(name, ast.Constant):
                self.names.add(str(name.value))
        self.generic_visit(node)


def test_every_option_is_read() -> None:
    reads = Reads()
    for path in (*SOURCE.glob("*.py"), *Path(shared_utils.__file__).parent.glob("*.py")):
        reads.visit(ast.parse(path.read_text()))
    options = {pair for cls in CONFIGS for pair in fields_of(cls)}
    assert len(options) > 50
    assert {f"{cls}.{name}" for cls, name in options if name not in reads.names} == set()


def test_every_option_has_a_help_text() -> None:
    told = {path: path.read_text() for path in SOURCE.glob("*.py")}
    for cls in {pair[0] for c in CONFIGS for pair in fields_of(c)}:
        (body,) = (
            node.body
            for text in told.values()
            for node in ast.parse(text).body
            if isinstance(node, ast.ClassDef) and node.name == cls
        )
        for field, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or "Suppress" in ast.dump(field.annotation):
                continue
            is_group = "default_factory" in ast.dump(field)
            is_told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert is_group or is_told, ast.unparse(field)


# ---- recipes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_without_weights(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.recipe == name
    assert recipe.about
    with torch.device("meta"):
        backbone = load_backbone(recipe.model.backbone, recipe.model.architecture, pretrained=False)
        model = PromptedModel(backbone.module, build_spec(recipe.model, 10))
        side = recipe.data.img_size or backbone.img_size[0]
        assert model(torch.empty(2, 3, side, side)).shape == (2, 10)
    assert 0 < parameter_report(model)["percent"] < 1.5


@pytest.mark.parametrize("name", PRETRAIN_RECIPES)
def test_every_pretraining_recipe_builds(name: str) -> None:
    recipe = PRETRAIN_RECIPES[name]
    assert recipe.recipe == name
    sizes = {"embed_dim": recipe.model.embed_dim, "depth": recipe.model.depth}
    with torch.device("meta"):
        model = build_micro_vit(200, **sizes, num_heads=recipe.model.embed_dim // HEAD_DIM)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 200)


def test_the_shipped_backbone_is_small_and_has_its_papers() -> None:
    assets = SOURCE / "assets"
    assert (assets / "micro_vit.safetensors").stat().st_size < 12e6
    assert {"LICENSE-weights", "micro_vit.json", "micro_vit.safetensors"} <= {
        path.name for path in assets.iterdir()
    }
    card = json.loads((assets / "micro_vit.json").read_text())
    assert 0 < card["val"]["top1"] < 1
    assert card["config"]["optim"]["epochs"] > 0
    assert "seed" in card["config"]["run"]
