"""Training checkpoints that survive a kill, a full disk and a hostile file.

A checkpoint is written whole or not at all, and the one before it stays beside it as
`<name>.prev`, so there is a good one at every moment.
"""

import contextlib
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from shared_utils.errors import DISK_FULL, InputError, MissingFileError


def save(state: Mapping[str, Any], path: Path) -> None:
    """Save plain data and tensors so that they open with `torch.load(weights_only=True)`.

    Raises: InputError where the disk is full; TypeError where `state` holds other objects, e.g. a
        NumPy number. What was saved before then stays as it was.
    """
    with _replacing(path, keep_previous=True) as file:
        torch.save(dict(state), file)
        file.flush()
        if others := get_unsafe_globals_in_checkpoint(file.name):
            raise TypeError(f"state: got {others}, expected tensors and plain data; convert them")


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU. Never runs code that a file carries.

    Raises: MissingFileError; InputError naming the file where it is cut off, damaged (every byte
        is checked against its checksum) or holds more than plain data and tensors.
    """
    with reading(path, "a checkpoint"):
        with zipfile.ZipFile(path) as archive:
            # Of an entry marked as a folder (0x10) torch would read nothing, without a word.
            folders = [entry for entry in archive.infolist() if entry.external_attr & 0x10]
            if damaged := archive.testzip() or folders:
                raise zipfile.BadZipFile(f"checksum or header of {damaged}")
        return dict(torch.load(path, map_location="cpu", weights_only=True))


def load_last(path: Path) -> tuple[dict[str, Any], str]:
    """`load(path)`, or the checkpoint before it where that one is missing or damaged.

    Returns: the state and a warning to show, empty where `path` itself was good.
    """
    try:
        return load(path), ""
    except InputError as error:
        warning = f"{str(error).partition(', expected')[0]}; going on from {path.name}.prev"
        with contextlib.suppress(InputError):
            return load(path.with_name(f"{path.name}.prev")), warning
        raise


def save_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Save safetensors whole or not at all; tensors may share memory. Raises: see `write_text`."""
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with _replacing(path) as file:
        file.write(safetensors_bytes(own, dict(metadata)))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata. Raises: MissingFileError; InputError on a damaged file."""
    with reading(path, "a .safetensors file"), safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def rng_state(loader: torch.Generator | None = None) -> dict[str, Any]:
    """The random state of Python, NumPy, torch, every CUDA device and the loader, as plain data."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.array(keys)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "loader": None if loader is None else loader.get_state(),
    }


def set_rng_state(state: Mapping[str, Any], loader: torch.Generator | None = None) -> None:
    """Put back what `rng_state` read. CUDA states are used for as many devices as there are."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if loader is not None and state["loader"] is not None:
        loader.set_state(state["loader"])


def write_text(text: str, path: Path) -> None:
    """Write a text file (UTF-8) whole or not at all. Raises: InputError where the disk is full."""
    with _replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Raise MissingFileError or InputError, naming the file, where the body cannot read it."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(str(path), "no such file", what, "check the path") from error
    except pickle.UnpicklingError as error:
        got, do = "more than tensors and plain data", "do not open it; get its state dict alone"
        raise InputError(str(path), got, f"{what} that opens weights-only", do) from error
    except Exception as error:  # zipfile and torch alone raise seven types on changed bytes
        got, do = f"a damaged or unreadable file ({error})", "restore it or start a new run"
        raise InputError(str(path), got, what, do) from error


@contextlib.contextmanager
def _replacing(path: Path, keep_previous: bool = False) -> Iterator[BinaryIO]:
    """Yield a file to write; when the body is done it is `path`, and on an error nothing changed.

    It is on the disk before it gets its name. With `keep_previous` the file before it becomes
    `.prev` only then: one of the two is good at every moment, even where `path` was damaged.
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
            os.replace(kept, path.with_name(f"{path.name}.prev"))
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        # A failed write shows as OSError, or below a RuntimeError of torch's zip writer.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno not in DISK_FULL:
            raise
        do = "free some space and go on with --resume"
        raise InputError(str(path), "a full disk", "room to save", do) from error
    finally:
        temporary.unlink(missing_ok=True)
        kept.unlink(missing_ok=True)
