"""Checkpoints of mmengine that open under torch's weights-only default, and those that do not.

mmengine pickles the objects of its log into every checkpoint, which torch refuses to open since it
could run code. A hook writes them as plain data and restores them after loading. A file of someone
else that does not open is refused by name; the prefix `trusted:` before its path in a config, or
`--trusted` of a command, says that it may run code.
"""

import pickle
from collections import OrderedDict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import HOOKS
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from shared_utils.checkpoint import reading
from shared_utils.errors import InputError

HISTORY, ARRAY = "dnc.HistoryBuffer", "dnc.ndarray"  # the one key of a dict that stands for one
WEIGHTS = ("state_dict", "ema_state_dict")  # of a checkpoint: nothing but tensors
TRUSTED = "trusted:"
_PLAIN = (str, int, float, complex, bool, bytes, type(None), torch.Size, torch.dtype)


def to_plain(value: Any, where: str = "checkpoint") -> Any:
    """Tensors and plain data in place of histories and NumPy's numbers and arrays.

    What cannot be turned is left out, with a warning that names it: a checkpoint that does not open
    would be worth less.
    """
    if isinstance(value, HistoryBuffer):
        numbers, counts = (torch.from_numpy(np.array(part)) for part in value.data)
        return {HISTORY: [numbers, counts, int(value.max_length)]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {ARRAY: torch.from_numpy(value.copy())}
    if isinstance(value, Mapping):
        made = {to_plain(k): to_plain(v, f"{where}.{k}") for k, v in value.items()}
        return OrderedDict(made) if isinstance(value, OrderedDict) else made
    if isinstance(value, (list, tuple, deque, set, frozenset, np.ndarray)):
        parts = [to_plain(part, f"{where}[{i}]") for i, part in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Path):
        return str(value)
    print_log(f"{where} is not saved: {type(value)} is no plain data", "current")
    return None


def from_plain(value: Any) -> Any:
    """What `to_plain` was given, but for lists in place of deques and sets."""
    if isinstance(value, Mapping):
        if value.keys() == {HISTORY}:
            numbers, counts, length = value[HISTORY]
            return HistoryBuffer(numbers.cpu().numpy(), counts.cpu().numpy(), length)
        if value.keys() == {ARRAY}:
            return value[ARRAY].cpu().numpy()
        made = {k: from_plain(v) for k, v in value.items()}
        return OrderedDict(made) if isinstance(value, OrderedDict) else made
    if type(value) in (list, tuple):
        return type(value)(from_plain(part) for part in value)
    return value


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Writes checkpoints as plain data, after all other hooks had their say, and restores them."""

    priority = "LOWEST"

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Turn everything but the weights into plain data; in place."""
        for key in checkpoint.keys() - set(WEIGHTS):
            checkpoint[key] = to_plain(checkpoint[key], key)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Restore it; in place."""
        for key in checkpoint.keys() - set(WEIGHTS):
            checkpoint[key] = from_plain(checkpoint[key])


def load(path: str | Path, *, trusted: bool = False, map_location: Any = "cpu") -> dict[str, Any]:
    """Open a checkpoint; only a trusted one may run code that it carries.

    Raises: MissingFileError; InputError naming a file that is damaged, holds no state dict, or does
        not open weights-only and is not trusted.
    """
    path = Path(str(path).removeprefix(TRUSTED)).expanduser()
    with reading(path, "a checkpoint"):
        path.stat()
        try:
            found = torch.load(path, map_location=map_location, weights_only=not trusted)
        except pickle.UnpicklingError as error:
            # What is cut off or no checkpoint at all fails with the same exception.
            if "weights_only" not in str(error).lower() or not _is_pickle(path):
                raise ValueError("no checkpoint of torch") from error
            found = None
    if found is None:
        raise InputError(
            str(path),
            "more than tensors and plain data, which can run code when it is opened",
            "a checkpoint that opens weights-only",
            f"if you trust its source, give --trusted (in a config: load_from='{TRUSTED}PATH')",
        )
    if not isinstance(found, dict):
        raise InputError(str(path), type(found).__name__, "a dict with a state_dict", "check it")
    return found


def state_dict_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint: those under `state_dict` or `model`, or all of it."""
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            return dict(checkpoint[key])
    return {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}


def _is_pickle(path: Path) -> bool:
    """Whether it is an archive of torch.save, or a pickle as it wrote them before."""
    with path.open("rb") as file:
        head = file.read(2)
    return head in (b"PK", b"\x80\x02")


@CheckpointLoader.register_scheme(prefixes=TRUSTED)
def _load_trusted(filename: str, map_location: Any = None) -> dict[str, Any]:
    return load(filename, trusted=True, map_location=map_location)
