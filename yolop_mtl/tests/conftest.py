"""What tests of several modules share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def papers_data() -> Path:
    """The folder of real public data; without it the tests that use it are skipped."""
    folder = Path(os.environ.get("PAPERS_DATA") or ROOT / "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no real data: '{folder}' is absent (PAPERS_DATA names another folder)")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    """One thread: more cost tiny tensors much time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
