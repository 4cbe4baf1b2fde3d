"""Files that are there whole or not at all, whenever the process is killed or the disk is full.

A write goes to a temporary file beside the target, is flushed to the disk and renamed; then the
folder is flushed.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shared_utils.errors import DISK_FULL, InputError


def write_text(text: str, path: Path) -> None:
    """Write a text file (UTF-8) whole or not at all. Raises: InputError where the disk is full."""
    with replacing(path) as file:
        file.write(text.encode())


def previous(path: Path) -> Path:
    """Where `replacing(path, keep_previous=True)` keeps the file before."""
    return path.with_name(path.name + ".prev")


@contextlib.contextmanager
def replacing(path: Path, keep_previous: bool = False) -> Iterator[BinaryIO]:
    """Yield a file to write; when the body is done it is `path`, and on an error nothing changed.

    The previous file gets its other name only after the new one is in place, so of `path` and
    `previous(path)` one is good at every moment, even where `path` was damaged before.

    Raises: InputError where the disk is full.
    """
    # Fixed names: what a kill leaves behind is written over by the next save.
    temporary, kept = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old"))
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        kept.unlink(missing_ok=True)
        if keep_previous and path.is_file():
            try:
                os.link(path, kept)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, kept)
        os.replace(temporary, path)
        if kept.is_file():
            os.replace(kept, previous(path))
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except Exception as error:
        if not _is_disk_full(error):
            raise
        do = "free some space and go on with --resume"
        raise InputError(str(path), "a full disk", "room to save", do) from error
    finally:
        temporary.unlink(missing_ok=True)
        kept.unlink(missing_ok=True)


def _is_disk_full(error: BaseException | None) -> bool:
    """Look behind the error too: torch.save answers a failed write with a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
