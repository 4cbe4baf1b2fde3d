"""VTAB-1k: its 19 tasks, their folder form, the published figures and both means.

Paper: Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation
Benchmark", arXiv 1910.04867 (tasks and groups). Folder form: the one that SSF, NOAH, RepAdapter and
others read, see docs/vtab-1k.md. All accuracies here are top-1 on the test images in percent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from e2vpt.readers import FileReader, Pool, Source, some_of
from shared_utils.errors import InputError, MissingFileError, near_miss

Group = Literal["natural", "specialized", "structured"]
PublishedBackbone = Literal["vit-b16-in21k", "swin-b-in22k"]
GROUPS: tuple[Group, ...] = ("natural", "specialized", "structured")
LISTS = {"train800": 800, "val200": 200, "train800val200": 1000, "test": 0}  # 0: any count


@dataclass(frozen=True)
class Task:
    """One of the 19 tasks."""

    folder: str
    title: str
    num_classes: int
    group: Group
    num_visual_prompts: int = 10
    """P of the released command list"""
    num_kv_prompts: int = 5
    """n of the released command list"""

    @property
    def recipe(self) -> str:
        """Its name in RECIPES."""
        return "vtab-" + self.folder.replace("_", "-")


# In the column order of the paper's table.
TASKS = (
    Task("cifar", "CIFAR-100", 100, "natural", 5, 5),
    Task("caltech101", "Caltech101", 102, "natural", 32, 5),
    Task("dtd", "DTD", 47, "natural"),
    Task("oxford_flowers102", "Flowers102", 102, "natural", 1, 1),
    Task("oxford_iiit_pet", "Pets", 37, "natural"),
    Task("svhn", "SVHN", 10, "natural"),
    Task("sun397", "Sun397", 397, "natural"),
    Task("patch_camelyon", "Patch Camelyon", 2, "specialized", 10, 10),
    Task("eurosat", "EuroSAT", 10, "specialized"),
    Task("resisc45", "Resisc45", 45, "specialized"),
    Task("diabetic_retinopathy", "Retinopathy", 5, "specialized"),
    Task("clevr_count", "Clevr/count", 8, "structured"),
    Task("clevr_dist", "Clevr/distance", 6, "structured"),
    Task("dmlab", "DMLab", 6, "structured"),
    Task("kitti", "KITTI/distance", 4, "structured"),
    Task("dsprites_loc", "dSprites/location", 16, "structured", 5, 5),
    Task("dsprites_ori", "dSprites/orientation", 16, "structured", 5, 5),
    Task("smallnorb_azi", "SmallNORB/azimuth", 18, "structured"),
    Task("smallnorb_ele", "SmallNORB/elevation", 9, "structured"),
)
TASK_OF_FOLDER = {task.folder: task for task in TASKS}


# ---- the folder form ------------------------------------------------------------------------


def is_vtab_task(folder: Path) -> bool:
    """Whether a list that only this form has is there; another one may be missing."""
    return any((folder / f"{name}.txt").is_file() for name in LISTS if name != "test")


def load_vtab_task(folder: Path, *, skip_missing: bool = False) -> Source:
    """List one task, nothing decoded: 800 training, 200 validation and the test images.

    The 1,000 images of the final training are those of train800val200.txt (`train_val`). The form
    has no class names, so labels are their names: "0", "1", ...; there are as many as the task has
    where the folder has a task's name, otherwise as many as the highest label says.

    Args:
        folder: holds train800.txt, val200.txt, train800val200.txt, test.txt and what they list.
        skip_missing: leave it to the later check to count listed images that are not there.

    Raises:
        MissingFileError: a list or listed images are not there.
        InputError: a line that is not `path label`, a label out of range, a wrong count.
    """
    name = folder.resolve().name
    task = TASK_OF_FOLDER.get(name)
    rows = {split: read_list(folder, split, task) for split in LISTS}
    pools, missing = {}, []
    for split, listed in rows.items():
        paths = [folder / path for path, _ in listed]
        missing += missing_of(paths)
        labels = [label for _, label in listed]
        pools[split] = Pool(FileReader(paths), list(range(len(paths))), labels)
    if missing and not skip_missing:
        raise MissingFileError(
            "data.source",
            f"{len(missing)} listed image{'s' * (len(missing) > 1)} not there: {some_of(missing)}",
            "every image of the four lists",
            "restore them or give --data.skip-bad",
        )
    num_classes = task.num_classes if task else 1 + max(max(p.labels) for p in pools.values())
    return Source(
        name,
        [str(label) for label in range(num_classes)],
        pools["train800"],
        pools["val200"],
        pools["test"],
        train_val=pools["train800val200"],
    )


def read_list(folder: Path, split: str, task: Task | None = None) -> list[tuple[str, int]]:
    """(relative path, label) of each line of `<split>.txt`; empty lines are passed over.

    Args:
        folder: the task's folder.
        split: train800, val200, train800val200 or test.
        task: its labels must be below its class count; without one any label is taken.

    Raises:
        MissingFileError, InputError: as `load_vtab_task`.
    """
    path = folder / f"{split}.txt"
    if not path.is_file():
        raise MissingFileError(
            "data.source",
            f"no '{path}'",
            f"{', '.join(f'{name}.txt' for name in LISTS)} in a folder of VTAB-1k",
            "restore the list",
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            "data.source", f"no readable list '{path}' ({error})", "UTF-8 text", "restore it"
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        image, _, label = line.rstrip().rpartition(" ")
        if not image.strip() or not (label.isascii() and label.isdigit()):
            raise InputError(
                "data.source",
                f"'{line[:80]}' in '{path}' line {number}",
                "a path, a space and a label of 0 or more",
                "correct the line",
            )
        if task is not None and int(label) >= task.num_classes:
            raise InputError(
                "data.source",
                f"label {label} in '{path}' line {number}",
                f"0 to {task.num_classes - 1}, as {task.folder} has {task.num_classes} classes",
                "restore the list, or rename the folder if it holds another task",
            )
        rows.append((image, int(label)))
    if not rows or (LISTS[split] and len(rows) != LISTS[split]):
        raise InputError(
            "data.source",
            f"{len(rows)} images in '{path}'",
            str(LISTS[split] or "some"),
            "restore the list",
        )
    return rows


def missing_of(paths: list[Path]) -> list[str]:
    """Those that are not files, each once."""
    return [str(path) for path in dict.fromkeys(paths) if not path.is_file()]


# ---- means ----------------------------------------------------------------------------------


def group_means(values: Mapping[str, float]) -> dict[Group, float]:
    """Mean of each group.

    Args:
        values: a figure per task, by folder name; all 19.

    Raises:
        InputError: naming tasks without a figure and names that are no task.
    """
    absent = [task.folder for task in TASKS if task.folder not in values]
    unknown = sorted(values.keys() - TASK_OF_FOLDER.keys())
    if absent or unknown:
        told = [f"no figure for {some_of(absent)}"] if absent else []
        told += [f"a figure for {some_of(unknown)}"] if unknown else []
        raise InputError(
            "VTAB-1k mean", " and ".join(told), "one for each of the 19 tasks", "complete them"
        )
    found = {}
    for group in GROUPS:
        of_group = [values[task.folder] for task in TASKS if task.group == group]
        found[group] = sum(of_group) / len(of_group)
    return found


def mean19(values: Mapping[str, float]) -> float:
    """Mean over the 19 tasks, each counted once. Arguments and errors as `group_means`."""
    group_means(values)
    return sum(values.values()) / len(TASKS)


def mean3(values: Mapping[str, float]) -> float:
    """Mean of the three group means, two to three points above `mean19` as a rule.

    Both are in the literature, so a figure without its name means little. Arguments and errors as
    `group_means`.
    """
    return sum(group_means(values).values()) / len(GROUPS)


# ---- published figures ----------------------------------------------------------------------

REPRINTED = "published, as reprinted in the VFPT paper (arXiv 2411.01327)"
REPRINTED_BOTH = "published in the VPT paper, as reprinted in the VFPT paper (arXiv 2411.01327)"
VPT = "published in the VPT paper"
RERUN = "published re-run, five seeds, in the VPT-or-FT paper (ICLR 2024)"


@dataclass(frozen=True)
class Published:
    """A row of a published table."""

    method: str
    backbone: PublishedBackbone
    groups: dict[Group, float]
    """as printed; rounding and slips of the print may differ from the tasks' own mean"""
    source: str
    top1: dict[str, float]
    """by task folder; empty where only the groups could be had"""
    tuned_percent: dict[str, float]
    """tuned parameters of all, in percent, by task folder; empty where they could not be had"""

    @property
    def mean19(self) -> float:
        """Mean over the tasks, from the groups where these are all there is."""
        values = self.top1 or {task.folder: self.groups[task.group] for task in TASKS}
        return mean19(values)

    @property
    def mean3(self) -> float:
        """Mean over the groups as printed."""
        return sum(self.groups.values()) / len(GROUPS)


def _row(
    method: str,
    groups: str,
    top1: str = "",
    tuned: str = "",
    source: str = REPRINTED,
    backbone: PublishedBackbone = "vit-b16-in21k",
) -> Published:
    def by_task(figures: str) -> dict[str, float]:
        values = map(float, figures.replace("|", " ").split())
        return dict(zip(TASK_OF_FOLDER, values, strict=True)) if figures else {}

    means = dict(zip(GROUPS, map(float, groups.split()), strict=True))
    return Published(method, backbone, means, source, by_task(top1), by_task(tuned))


def _swin(
    method: str, groups: str, top1: str = "", tuned: str = "", source: str = REPRINTED_BOTH
) -> Published:
    return _row(method, groups, top1, tuned, source, backbone="swin-b-in22k")


# fmt: off
PUBLISHED = (
    _row("Full", "75.88 83.36 47.64",
         "68.9 87.7 64.3 97.2 86.9 87.4 38.8 | 79.7 95.7 84.2 73.9"
         " | 56.3 58.6 41.7 65.5 57.5 46.7 25.7 29.1"),
    _row("Linear", "68.93 77.16 26.84",
         "63.4 85.0 63.2 97.0 86.3 36.6 51.0 | 78.5 87.5 68.6 74.0"
         " | 34.3 30.6 33.2 55.4 12.5 20.0 9.6 19.2"),
    _row("Partial-1", "69.44 78.53 34.17",
         "66.8 85.9 62.5 97.3 85.5 37.6 50.6 | 78.6 89.8 72.5 73.3"
         " | 41.5 34.3 33.9 61.0 31.3 32.8 16.3 22.4"),
    _row("Bias", "73.30 78.25 44.09",
         "72.8 87.0 59.2 97.5 85.3 59.9 51.4 | 78.7 91.6 72.9 69.8"
         " | 61.5 55.6 32.4 55.9 66.6 40.0 15.7 25.1"),
    _row("Adapter-8", "70.67 77.80 33.09",
         "74.2 85.7 62.7 97.8 87.2 36.4 50.7 | 76.9 89.2 73.5 71.6"
         " | 45.2 41.8 31.1 56.4 30.4 24.6 13.2 22.0"),
    _row("VPT-Shallow", "76.81 79.66 46.98",
         "77.7 86.9 62.6 97.5 87.3 74.5 51.2 | 78.2 92.0 75.6 72.9"
         " | 50.5 58.6 40.5 67.1 68.7 36.1 20.2 34.1", source=REPRINTED_BOTH),
    _row("VPT-Deep", "78.48 82.43 54.98",
         "78.8 90.8 65.8 98.0 88.3 78.1 49.6 | 81.8 96.1 83.4 68.4"
         " | 68.5 60.0 46.5 72.8 73.6 47.9 32.9 37.8",
         ".20 .20 .15 .10 .04 .54 .41 | 1.06 1.07 .15 .02 | .54 2.11 1.07 .54 .12 .55 2.12 2.11",
         REPRINTED_BOTH),
    _row("E²VPT", "80.01 84.43 57.39",
         "78.6 89.4 67.8 98.2 88.5 85.3 52.3 | 82.5 96.8 84.8 73.6"
         " | 71.7 61.2 47.9 75.8 80.8 48.1 31.7 41.9",
         ".22 .19 .12 .11 .05 .24 .43 | .20 .29 .12 .07 | .34 .65 .44 .36 .10 .38 1.14 .66"),
    # The first author's own: what a tuned VPT-Deep reaches, so the fairer figure to compare with.
    _row("VPT-Deep, re-run", "79.53 82.65 56.09",
         "77.7 90.2 68.8 98.1 88.4 82.5 51.0 | 77.9 96.2 83.4 73.1"
         " | 68.2 58.2 45.3 77.7 78.4 48.4 31.2 41.3", source=RERUN),
    _swin("Full", "79.10 86.21 59.65"),
    _swin("Linear", "73.52 80.77 33.52"),
    _swin("Partial-1", "73.11 81.70 34.96"),
    _swin("MLP-3", "73.56 75.21 35.69"),
    _swin("Bias", "74.19 80.14 42.42"),
    _swin("VPT-Shallow", "79.85 82.45 37.75", source=VPT),
    # Other papers print 84.53 and 53.35 for its last two groups.
    _swin("VPT-Deep", "76.78 83.33 51.85",
          "79.6 90.8 78.0 99.5 91.4 46.4 51.7 | 80.1 96.2 85.0 72.0"
          " | 67.6 59.4 50.1 61.3 74.4 50.6 25.7 25.7", source=REPRINTED),
    _swin("E²VPT", "83.31 84.95 57.35",
          "82.9 92.4 78.5 99.6 91.4 82.2 56.2 | 83.8 97.2 84.8 74.0"
          " | 74.0 61.2 49.5 81.0 80.3 50.7 27.9 34.2",
          ".27 .15 .08 .15 .07 .44 .49 | .09 .04 .20 .03 | .70 .43 .14 .51 .17 .17 .16 .04",
          source=REPRINTED),
)
# fmt: on


def published(method: str = "E²VPT", backbone: PublishedBackbone = "vit-b16-in21k") -> Published:
    """The row of a method on a backbone.

    Raises: InputError naming the methods there are.
    """
    rows = {row.method: row for row in PUBLISHED if row.backbone == backbone}
    if method not in rows:
        raise InputError("method", f"'{method}'", f"a row for {backbone}", near_miss(method, rows))
    return rows[method]


def comparison(
    scores: Mapping[str, float],
    methods: tuple[str, ...] = ("E²VPT", "VPT-Deep"),
    backbone: PublishedBackbone = "vit-b16-in21k",
) -> str:
    """A text table: own figures beside the published ones, and both means where all 19 are there.

    Args:
        scores: own top-1 in percent by task folder, for any of the tasks.
        methods: rows of the published table.
        backbone: of the published table.
    """
    unknown = sorted(scores.keys() - TASK_OF_FOLDER.keys())
    if unknown:
        raise InputError("task", f"'{unknown[0]}'", "a task", near_miss(unknown[0], TASK_OF_FOLDER))
    rows = [published(method, backbone) for method in methods]
    lines = ["".join([f"{'top-1 in %':<26}{'here':>8}", *(f"{row.method:>18}" for row in rows)])]

    def add(name: str, own: float | None, theirs: list[float | None]) -> None:
        cells = [f"{'-' if own is None else f'{own:.2f}':>8}"]
        cells += [f"{'-' if value is None else f'{value:.2f}':>18}" for value in theirs]
        lines.append(f"{name:<26}" + "".join(cells))

    for task in TASKS:
        add(task.title, scores.get(task.folder), [row.top1.get(task.folder) for row in rows])
    for group in GROUPS:
        own = [scores.get(task.folder) for task in TASKS if task.group == group]
        given = [value for value in own if value is not None]
        mean = sum(given) / len(given) if len(given) == len(own) else None
        add(f"mean, {group}", mean, [row.groups[group] for row in rows])
    full = len(scores) == len(TASKS)
    add("mean over 19 tasks", mean19(scores) if full else None, [row.mean19 for row in rows])
    add("mean over 3 groups", mean3(scores) if full else None, [row.mean3 for row in rows])
    return "\n".join([*lines, *(f"{row.method}: {row.source}" for row in rows)])
