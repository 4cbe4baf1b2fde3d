"""What holds for the package before it has any code, and must go on holding."""

import importlib.resources
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yolop_mtl


def test_import_in_fresh_interpreter_is_light_and_silent(tmp_path: Path) -> None:
    # From an empty folder, so that the folder yolop_mtl/ of the repository cannot be what is found.
    code = (
        "import sys, yolop_mtl; "
        "assert yolop_mtl.__file__, 'a bare folder was imported, not the package'; "
        "heavy = {'torch', 'numpy', 'matplotlib', 'timm', 'lightning'} & set(sys.modules); "
        "assert not heavy, heavy"
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
    assert importlib.resources.files(yolop_mtl).joinpath("py.typed").is_file()


def test_version_is_that_of_the_installed_distribution() -> None:
    assert yolop_mtl.__version__ == version("visionpapers-yolop-mtl")
