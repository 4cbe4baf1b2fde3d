"""Training checkpoints that survive a kill, a full disk and a hostile file.

A save writes a temporary file, flushes it to the disk, renames it and flushes the folder. The file
before it stays beside it as `<name>.prev`, so there is a good one at every moment.
"""

import contextlib
import errno
import os
import pickle
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from shared_utils.errors import InputError, MissingFileError


def save(state: Mapping[str, Any], path: Path) -> None:
    """Save plain data and tensors so that they open with `torch.load(weights_only=True)`.

    Raises: InputError where the disk is full; what was saved before stays as it was.
    """
    with _replacing(path, keep_previous=True) as temporary:
        torch.save(dict(state), temporary)


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU. Never runs code that a file carries.

    Raises: MissingFileError; InputError naming the file where it is cut off, damaged (every byte
        is checked against its checksum) or holds more than plain data and tensors.
    """
    if not path.is_file():
        raise MissingFileError(str(path), "no such file", "a checkpoint", "check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _damaged(path, f"a file cut off or damaged ({error})") from error
    if damaged is not None:
        raise _damaged(path, f"a damaged file (checksum of {damaged})")
    try:
        return cast(dict[str, Any], torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise InputError(str(path), "a file with objects other than tensors and plain data",
                         "a checkpoint that opens weights-only",
                         "do not open it; export its state dict where it came from") from error  # fmt: skip
    except (RuntimeError, EOFError) as error:
        raise _damaged(path, f"a damaged file ({error})") from error


def load_last(path: Path) -> tuple[dict[str, Any], str]:
    """`load(path)`, or the checkpoint before it where that one is missing or damaged.

    Returns: the state and a warning to show, empty where `path` itself was good.
    """
    try:
        return load(path), ""
    except InputError as error:
        previous = _previous(path)
        if not previous.is_file():
            raise
        return load(previous), f"{error}; going on from {previous.name}"


def save_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Save deployable weights as safetensors, atomically. Tensors may share memory.

    Raises: InputError where the disk is full; a file already there stays as it was.
    """
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with _replacing(path) as temporary:
        temporary.write_bytes(safetensors_bytes(own, dict(metadata)))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read safetensors: tensors on the CPU and the file's metadata.

    Raises: MissingFileError; InputError naming a damaged file.
    """
    if not path.is_file():
        raise MissingFileError(str(path), "no such file", "a .safetensors file", "check the path")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _damaged(path, f"a damaged file ({error})") from error


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically. Raises: InputError where the disk is full."""
    with _replacing(path) as temporary:
        temporary.write_text(text)


def rng_state(loader: torch.Generator | None = None) -> dict[str, Any]:
    """The random state of Python, NumPy, torch, every CUDA device and the loader, as plain data."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.array(keys)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "loader": None if loader is None else loader.get_state(),
    }


def set_rng_state(state: Mapping[str, Any], loader: torch.Generator | None = None) -> None:
    """Put back what `rng_state` read. CUDA states are used for as many devices as there are."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, device)
    if loader is not None and state["loader"] is not None:
        loader.set_state(state["loader"])


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".prev")


def _damaged(path: Path, got: str) -> InputError:
    return InputError(str(path), got, "a complete file", "restore it or start a new run")


@contextlib.contextmanager
def _replacing(path: Path, keep_previous: bool = False) -> Any:
    """Yield a temporary path; when the body is done it is on the disk under `path`, or nothing is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if keep_previous and path.is_file():
            link = path.with_name(f".{path.name}.{os.getpid()}.prev")
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)
            except OSError:  # a file system without hard links: the rename below leaves a gap
                os.replace(path, link)
            os.replace(link, _previous(path))
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if _is_disk_full(error):
            raise InputError(str(path), "a full disk", "room to save",
                             "free some space and go on with --resume") from error  # fmt: skip
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _is_disk_full(error: BaseException) -> bool:
    """torch.save reports a full disk as a RuntimeError of its zip writer; look at what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(seen, RuntimeError) and ("PytorchStreamWriter failed" in str(seen)
                                               or "unexpected pos" in str(seen)):  # fmt: skip
            return True
        seen = seen.__cause__ or seen.__context__
    return False
