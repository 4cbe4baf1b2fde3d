"""What tests of commands share: their errors, what a folder holds, images on disk."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e2vpt.cli import main

ONE_LINE = re.compile(r"error: [^\n]+?: got [^\n]+?, expected [^\n]+; [^\n]+\n")


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that the user must word otherwise."""
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert ONE_LINE.fullmatch(error), error
    return error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_images(folder: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """A folder per class with so many images, each class of a colour of its own."""
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        colour = np.random.default_rng(sum(map(ord, name))).integers(0, 200, 3)
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(colour + rng.integers(0, 55, (20, 24, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:02d}.png")
    return folder
