"""What holds for the package as a whole."""

import importlib.resources
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import dnc


def test_import_in_fresh_interpreter_is_silent_and_free_of_openmmlab(tmp_path: Path) -> None:
    # From an empty folder, so that the folder dnc/ of the repository cannot be what is found.
    code = (
        "import sys, dnc; "
        "assert dnc.__file__, 'a bare folder was imported, not the package'; "
        "found = {'mmcv', 'mmengine', 'mmseg', 'mmdet', 'matplotlib'} & set(sys.modules); "
        "assert not found, found"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_types_marker_lies_beside_the_code() -> None:
    assert importlib.resources.files(dnc).joinpath("py.typed").is_file()


def test_version_is_that_of_the_installed_distribution() -> None:
    assert dnc.__version__ == version("visionpapers-dnc")
