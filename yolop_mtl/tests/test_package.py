"""What holds for the package as a whole."""

import importlib.resources
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yolop_mtl

SOURCE = Path(yolop_mtl.__file__).parent


def test_import_in_fresh_interpreter_is_silent(tmp_path: Path) -> None:
    # From an empty folder, so that the folder yolop_mtl/ of the repository cannot be what is found.
    code = (
        "import sys, yolop_mtl, torch; "
        "assert yolop_mtl.__file__, 'a bare folder was imported, not the package'; "
        "assert not torch.cuda.is_initialized(); "
        "found = {'matplotlib', 'cv2', 'timm', 'onnx'} & set(sys.modules); "
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
    assert importlib.resources.files(yolop_mtl).joinpath("py.typed").is_file()


def test_version_is_that_of_the_installed_distribution() -> None:
    assert yolop_mtl.__version__ == version("visionpapers-yolop-mtl")


def test_modules_stay_under_400_lines() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCE.glob("*.py")}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}
