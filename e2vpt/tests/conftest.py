"""Fixtures of the E²VPT tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def papers_data() -> Path:
    """The folder of real public data; without it the tests that use it are skipped."""
    folder = Path(os.environ.get("PAPERS_DATA") or ROOT / "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no real data: '{folder}' is absent (PAPERS_DATA names another folder)")
    return folder
