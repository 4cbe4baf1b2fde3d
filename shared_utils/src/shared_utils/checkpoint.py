"""Training checkpoints that survive a kill, a full disk and a hostile file.

A checkpoint is written whole or not at all, and the one before it stays beside it as
`<name>.prev`, so there is a good one at every moment.
"""

import pickle
import random
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from shared_utils.atomic import previous, replacing
from shared_utils.atomic import write_text as write_text
from shared_utils.errors import InputError, MissingFileError

# What zipfile and torch raise on a file in which bytes were changed; RuntimeError and ValueError
# also in subclasses, e.g. NotImplementedError for an unknown zip version.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)
FOLDER_BIT = 0x10  # of a zip entry; torch leaves the memory of such an entry unset, without a word


def save(state: Mapping[str, Any], path: Path) -> None:
    """Save plain data and tensors so that they open with `torch.load(weights_only=True)`.

    Raises: InputError where the disk is full; TypeError where `state` holds other objects, e.g. a
        NumPy number. What was saved before then stays as it was.
    """
    with replacing(path, keep_previous=True) as file:
        torch.save(dict(state), file)
        file.flush()
        if others := get_unsafe_globals_in_checkpoint(file.name):
            raise TypeError(f"state: got {others}, expected tensors and plain data; convert them")


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU. Never runs code that a file carries.

    Raises: MissingFileError; InputError naming the file where it is cut off, damaged (every byte
        is checked against its checksum) or holds more than plain data and tensors.
    """
    if not path.is_file():
        raise MissingFileError(str(path), "no such file", "a checkpoint", "check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            bad = [i.filename for i in archive.infolist() if i.external_attr & FOLDER_BIT]
            if damaged := archive.testzip() or ", ".join(bad):
                raise zipfile.BadZipFile(f"checksum or header of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        got = "a file with objects other than tensors and plain data"
        do = "do not open it; export its state dict where it came from"
        raise InputError(str(path), got, "a checkpoint that opens weights-only", do) from error
    except DAMAGE as error:
        raise _damaged(path, error) from error
    if not isinstance(state, dict):
        raise InputError(str(path), f"a {type(state).__name__}", "a dictionary", "check the path")
    return state


def load_last(path: Path) -> tuple[dict[str, Any], str]:
    """`load(path)`, or the checkpoint before it where that one is missing or damaged.

    Returns: the state and a warning to show, empty where `path` itself was good.
    """
    try:
        return load(path), ""
    except InputError as error:
        try:
            state = load(previous(path))
        except InputError:
            raise error from None
        return state, f"{str(error).partition(', expected')[0]}; going on from {previous(path)}"


def save_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Save deployable weights as safetensors, whole or not at all. Tensors may share memory.

    Raises: InputError where the disk is full; a file already there stays as it was.
    """
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with replacing(path) as file:
        file.write(safetensors_bytes(own, dict(metadata)))


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
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    do = "restore it or start a new run"
    return InputError(str(path), f"a file cut off or damaged ({error})", "a complete file", do)


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
