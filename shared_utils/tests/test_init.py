"""What holds for every module: it loads quietly and without touching a GPU."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import shared_utils

MODULES = sorted(path.stem for path in Path(shared_utils.__file__).parent.glob("[a-z]*.py"))


def test_the_modules_are_those_we_know():
    assert MODULES == ["checkpoint", "config", "errors", "metrics", "run_log", "seeding"]


def test_modules_load_in_a_fresh_interpreter_without_a_word_or_a_gpu():
    # One process for all, since each would load torch again.
    code = (
        f"import sys, {', '.join('shared_utils.' + module for module in MODULES)}\n"
        "sys.exit(sys.modules['torch'].cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_errors_load_without_torch():
    code = "import sys, shared_utils.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_is_that_of_the_installed_package():
    try:
        assert shared_utils.__version__ == version("visionpapers-shared-utils")
    except PackageNotFoundError:
        pytest.skip("used from its folder, not installed")
