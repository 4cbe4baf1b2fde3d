"""Classes put together into groups: what is trained on where `data.groups` says so.

The 20 super-classes of CIFAR-100 lie beside this file.  Source: A. Krizhevsky, "Learning Multiple
Layers of Features from Tiny Images", 2009.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from dnc.sources import Pool
from shared_utils.checkpoint import reading
from shared_utils.errors import InputError

PUBLISHED = {"cifar100": Path(__file__).parent / "class_groups" / "cifar100.json"}


def load_groups(path: Path) -> dict[str, str]:
    """The group of each class by name.

    Args:
        path: a JSON file {class: group}, or a name in `PUBLISHED`, which goes before such a file.

    Raises: MissingFileError; InputError where it is something else.
    """
    path = PUBLISHED.get(str(path), path)
    with reading(path, f"a JSON file {{class: group}}, or {' or '.join(PUBLISHED)}"):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        expected = "an object {class: group}"
        raise InputError("data.groups", f"{path}, a {type(found).__name__}", expected, "correct it")
    return {name: str(group) for name, group in found.items()}


def grouped(pools: Mapping[str, Pool], path: Path) -> dict[str, Pool]:
    """The same images, labelled by group; groups in the order of their names.

    Raises: as `load_groups`; InputError where a class has no group.
    """
    groups = load_groups(path)
    names = pools["train"].class_names
    missing = [name for name in names if name not in groups]
    if missing:
        raise InputError(
            "data.groups",
            f"no group for {missing[0]} ({len(missing)} of {len(names)} classes)",
            "one for each class",
            f"add them to {path}",
        )
    told = sorted({groups[name] for name in names})
    number = np.array([told.index(groups[name]) for name in names])
    return {
        split: replace(pool, labels=number[pool.labels], class_names=told)
        for split, pool in pools.items()
    }
