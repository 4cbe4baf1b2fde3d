"""Fixtures of the E²VPT tests."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

# Modules beside the tests that assert: pytest shows the values there only when told.
pytest.register_assert_rewrite(
    *(
        f"e2vpt.tests.{name}"
        for name in ("pretrain_runs", "prompted_models", "train_runs", "vit_families")
    )
)


@pytest.fixture(scope="session")
def papers_data() -> Path:
    """The folder of real public data; without it the tests that use it are skipped."""
    folder = Path(os.environ.get("PAPERS_DATA") or ROOT / "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no real data: '{folder}' is absent (PAPERS_DATA names another folder)")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    """One thread: more cost tiny tensors six times the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_backbones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of a micro ViT of width 64 and depth 2 with weights of their own, not trained."""
    from e2vpt.micro_vit import build_micro_vit
    from e2vpt.pretrain import export_backbone
    from e2vpt.pretrain_config import PretrainConfig, PretrainModel

    cfg = PretrainConfig(model=PretrainModel(embed_dim=64, depth=2))
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("backbone")
        network = build_micro_vit(3, embed_dim=64, depth=2, num_heads=1)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("weight") and parameter.ndim == 2:
                    parameter.mul_(5)  # timm's small ones leave all images alike
        export_backbone(network, folder, cfg, ["a", "b", "c"], {"top1": 0.1})
        files.append(folder / "model.safetensors")
    return files[0], files[1]


@pytest.fixture(scope="session")
def quick(tiny_backbones: tuple[Path, Path]) -> list[str]:
    """Options of `e2vpt train` for a run of a second: a tiny backbone, few images."""
    return [
        "--model.backbone", str(tiny_backbones[0]), "--model.architecture", "micro_vit",
        "--model.num-visual-prompts", "4", "--model.num-kv-prompts", "2",
        "--data.limit", "40", "--data.batch-size", "16",
        "--optim.epochs", "2", "--optim.warmup-epochs", "0",
        "--accelerator", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, quick: list[str]) -> Path:
    """A finished run of `e2vpt train digits`, not to be changed."""
    from e2vpt.cli import main

    runs = tmp_path_factory.mktemp("runs")
    assert (
        main(
            [
                "train",
                "digits",
                "--runs-dir",
                str(runs),
                "--name",
                "done",
                *quick,
                "--optim.lr",
                "0.05",
            ]
        )
        == 0
    )
    return runs / "e2vpt" / "done"


@pytest.fixture(scope="session")
def quick_search(quick: list[str]) -> list[str]:
    """Options of `e2vpt search` for some twenty such runs."""
    return [
        *quick, "--search.lrs", "0.05", "0.02", "--search.weight-decays", "1e-4",
        "--search.candidate-epochs", "1", "--search.num-segments", "4",
        "--search.min-segments", "2", "--search.seeds", "3", "4",
    ]  # fmt: skip


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which the disk is full once `writes` files have been brought to it."""

    @contextlib.contextmanager
    def full(writes: int = 0) -> Iterator[None]:
        real, left = os.fsync, [writes]

        def fsync(file: int) -> None:
            if left[0] <= 0:
                raise OSError(28, "No space left on device")
            left[0] -= 1
            real(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            yield

    return full
