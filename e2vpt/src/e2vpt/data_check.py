"""Say what is missing of a benchmark's data: lists, images, or with `deep` what does not decode."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from e2vpt import fgvc, vtab
from e2vpt.images import UnreadableImage, decode_image
from e2vpt.readers import some_of
from shared_utils.errors import InputError, MissingFileError

Suite = Literal["vtab", "fgvc"]
FOLDERS = {"vtab": list(vtab.TASK_OF_FOLDER), "fgvc": list(fgvc.SET_OF_FOLDER)}
LISTS: dict[str, Sequence[str]] = {"vtab": list(vtab.LISTS), "fgvc": fgvc.SPLITS}
NOUNS = {"vtab": "tasks", "fgvc": "data sets"}
PAGES = {"vtab": "vtab-1k.md", "fgvc": "fgvc.md"}
WIDTH = 22


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """List what a benchmark's folder holds and what it lacks."""

    suite: tyro.conf.Positional[Suite]
    """vtab (VTAB-1k) or fgvc"""
    folder: tyro.conf.Positional[Path]
    """the folder that holds a folder per task or data set"""
    deep: bool = False
    """decode every image too; without it only their files are looked for"""


@dataclass(frozen=True)
class Report:
    """What there is of one task or data set."""

    name: str
    counts: dict[str, int]
    """images of each list that could be read"""
    problems: list[str]
    """a line each; none: complete"""

    def text(self, lists: Sequence[str]) -> str:
        """A row of the table, and a line for each problem."""
        cells = "".join(f"{self.counts.get(name, '-')!s:>16}" for name in lists)
        state = "incomplete" if self.problems else "complete"
        return "\n".join(
            [f"{self.name:<{WIDTH}}{cells}  {state}", *(f"    {told}" for told in self.problems)]
        )


def header(suite: Suite) -> str:
    """The table's first line."""
    return f"{'':<{WIDTH}}" + "".join(f"{name:>16}" for name in LISTS[suite])


def check(suite: Suite, folder: Path, *, deep: bool = False) -> Iterator[Report]:
    """Look at each task or data set in turn; the first report comes as soon as it is ready.

    Args:
        suite: which benchmark.
        folder: holds a folder for each of its tasks or data sets.
        deep: decode every image.

    Raises:
        MissingFileError: none of these folders is there; before the first report.
    """
    if not any((folder / name).is_dir() for name in FOLDERS[suite]):
        raise MissingFileError(
            "folder",
            f"nothing of {suite} in '{folder}'",
            f"folders {some_of(FOLDERS[suite])}",
            f"check the path; docs/{PAGES[suite]} says where the data comes from",
        )
    look = {"vtab": _vtab_task, "fgvc": _fgvc_set}[suite]
    for name in FOLDERS[suite]:
        if (folder / name).is_dir():
            yield look(folder / name, deep)
        else:
            yield Report(name, {}, ["no such folder"])


def require_complete(suite: Suite, folder: Path, reports: Sequence[Report]) -> str:
    """The closing line where everything is there.

    Raises: InputError naming what is not complete.
    """
    bad = [report.name for report in reports if report.problems]
    if bad:
        raise InputError(
            "data",
            f"{len(bad)} of {len(reports)} {NOUNS[suite]} incomplete in '{folder}': {some_of(bad)}",
            "all complete",
            f"restore what is listed above; docs/{PAGES[suite]} says where it comes from",
        )
    return f"all {len(reports)} {NOUNS[suite]} are complete"


def _vtab_task(folder: Path, deep: bool) -> Report:
    counts, problems = {}, []
    for split in vtab.LISTS:
        try:
            rows = vtab.read_list(folder, split, vtab.TASK_OF_FOLDER[folder.name])
        except InputError as error:
            problems.append(_told(error))
            continue
        counts[split] = len(rows)
        problems += _image_problems([folder / image for image, _ in rows], f"{split}.txt", deep)
    return Report(folder.name, counts, problems)


def _fgvc_set(folder: Path, deep: bool) -> Report:
    rows: dict[str, dict[str, int | str]] = {}
    problems = []
    for split in fgvc.SPLITS:
        try:
            rows[split] = fgvc.read_split(folder, split)
        except InputError as error:
            problems.append(_told(error))
    if "train" in rows:  # the other lists' ids and the place of the images hang on it
        try:
            fgvc.class_ids(folder, rows, fgvc.SET_OF_FOLDER[folder.name])
        except InputError as error:
            problems.append(_told(error))
    names = [image for listed in rows.values() for image in listed]
    root = fgvc.image_root(folder, names)
    for split, listed in rows.items():
        problems += _image_problems([root / image for image in listed], f"{split}.json", deep)
    counts = {split: len(listed) for split, listed in rows.items()}
    return Report(folder.name, counts, problems)


def _told(error: InputError) -> str:
    """The error without the option that a training would name."""
    return str(error).removeprefix("data.source: got ")


def _image_problems(paths: list[Path], listed_in: str, deep: bool) -> list[str]:
    """At most a line on missing images and one on unreadable ones."""
    missing = vtab.missing_of(paths)
    problems = []
    if missing:
        problems.append(_problem(missing, listed_in, "missing"))
    if deep:
        there = sorted(set(paths) - set(map(Path, missing)))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            bad = sorted(told for told in threads.map(_undecodable, there) if told)
        if bad:
            problems.append(_problem(bad, listed_in, "unreadable"))
    return problems


def _problem(images: list[str], listed_in: str, what: str) -> str:
    return f"{len(images)} image{'s' * (len(images) > 1)} of {listed_in} {what}: {some_of(images)}"


def _undecodable(path: Path) -> str:
    """Path and reason; empty for a good image."""
    try:
        decode_image(path)
    except UnreadableImage as error:
        return f"{error.name} ({error.reason})"
    return ""
