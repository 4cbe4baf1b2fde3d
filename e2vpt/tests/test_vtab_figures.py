"""VTAB-1k's tasks, both means, and the figures that were published."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from e2vpt import fgvc, vtab
from shared_utils.errors import InputError


def test_tasks_groups_and_classes() -> None:
    assert len(vtab.TASKS) == len(vtab.TASK_OF_FOLDER) == 19
    groups = [task.group for task in vtab.TASKS]
    assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8
    classes = [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    assert [task.num_classes for task in vtab.TASKS] == classes


def test_means_by_hand() -> None:
    by_group = {"natural": 10.0, "specialized": 20.0, "structured": 60.0}
    values = {task.folder: by_group[task.group] for task in vtab.TASKS}
    assert vtab.group_means(values) == by_group
    assert vtab.mean3(values) == pytest.approx(30)
    assert vtab.mean19(values) == pytest.approx((7 * 10 + 4 * 20 + 8 * 60) / 19)


@pytest.mark.parametrize("mean", [vtab.mean19, vtab.mean3])
def test_means_want_all_tasks_and_no_others(mean: Callable[[dict[str, float]], float]) -> None:
    values = dict.fromkeys(vtab.TASK_OF_FOLDER, 1.0)
    some = {name: 1.0 for name in values if name not in ("svhn", "dtd")}
    with pytest.raises(InputError, match=r"^VTAB-1k mean: got no figure for dtd, svhn, expected"):
        mean(some)
    with pytest.raises(InputError, match=r"got no figure for dtd, svhn and a figure for mnist, "):
        mean({**some, "mnist": 1.0})


def test_published_means_of_the_papers_method() -> None:
    row = vtab.published()
    assert (row.method, round(row.mean19, 2), round(row.mean3, 2)) == ("E²VPT", 71.42, 73.94)
    assert (round(vtab.mean19(row.top1), 2), round(vtab.mean3(row.top1), 2)) == (71.42, 73.94)
    assert fmean(row.tuned_percent.values()) == pytest.approx(0.3216, abs=5e-5)
    with_fgvc = [*row.tuned_percent.values(), *fgvc.published().tuned_percent.values()]
    assert len(with_fgvc) == 24
    assert fmean(with_fgvc) == pytest.approx(0.3908, abs=5e-5)


def test_published_means_of_vpt_deep() -> None:
    row = vtab.published("VPT-Deep")
    assert (round(row.mean19, 2), round(row.mean3, 2)) == (69.43, 71.96)
    assert fmean(row.tuned_percent.values()) == pytest.approx(0.689, abs=1e-3)
    again = vtab.published("VPT-Deep, re-run")
    assert (round(again.mean19, 2), round(again.mean3, 2)) == (70.32, 72.76)


@pytest.mark.parametrize(
    ("method", "mean"),
    [("Full", 65.57), ("Linear", 52.94), ("Partial-1", 56.52), ("Bias", 62.05),
     ("Adapter-8", 56.35), ("VPT-Shallow", 64.85)],
)  # fmt: skip
def test_published_means_of_the_baselines(method: str, mean: float) -> None:
    assert vtab.published(method).mean19 == pytest.approx(mean, abs=0.011)


@pytest.mark.parametrize("row", vtab.PUBLISHED, ids=lambda row: f"{row.backbone}-{row.method}")
def test_every_row_agrees_with_the_groups_it_prints(row: vtab.Published) -> None:
    assert row.source.startswith("published")
    assert row.groups.keys() == set(vtab.GROUPS)
    if row.top1:
        means = vtab.group_means(row.top1)
        assert means == pytest.approx(row.groups, abs=0.02)  # two are printed .01 to .02 off
    assert row.mean3 > row.mean19


def test_methods_that_beat_full_tuning_are_as_many_as_published() -> None:
    ours, full = vtab.published().top1, vtab.published("Full").top1
    won = {group: 0 for group in vtab.GROUPS}
    for task in vtab.TASKS:
        won[task.group] += ours[task.folder] > full[task.folder]
    assert won == {"natural": 6, "specialized": 3, "structured": 8}


def test_a_method_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"method: got 'VPT-Dep', .*did you mean 'VPT-Deep'"):
        vtab.published("VPT-Dep")
    with pytest.raises(InputError, match=r"method: got 'LoRA', expected a row for swin-b-in22k"):
        vtab.published("LoRA", "swin-b-in22k")


def test_comparison_shows_both_means_beside_the_published_ones() -> None:
    scores = dict(vtab.published("Full").top1)
    text = vtab.comparison(scores)
    rows = {line[:26].strip(): line[26:].split() for line in text.splitlines()[1:-2]}
    assert rows["CIFAR-100"] == ["68.90", "78.60", "78.80"]
    assert rows["mean, structured"] == ["47.64", "57.39", "54.98"]
    assert rows["mean over 19 tasks"] == ["65.57", "71.42", "69.43"]
    assert rows["mean over 3 groups"][1:] == ["73.94", "71.96"]
    assert text.splitlines()[-2] == f"E²VPT: {vtab.REPRINTED}"
    del scores["svhn"]
    rows = {line[:26].strip(): line[26:].split() for line in vtab.comparison(scores).splitlines()}
    assert [rows[name][0] for name in ("SVHN", "mean, natural", "mean over 19 tasks")] == ["-"] * 3
    assert rows["mean, structured"][0] == "47.64"
    with pytest.raises(InputError, match=r"^task: got 'cifr', .*did you mean 'cifar'"):
        vtab.comparison({"cifr": 1.0})


def test_the_page_shows_the_figures_of_the_tables() -> None:
    page = Path(__file__).parents[1] / "docs" / "vtab-1k.md"
    lines = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    wide = {row[0].strip("`"): row for row in rows if len(row) == 13}
    methods = ["Full", "Linear", "VPT-Shallow", "VPT-Deep", "VPT-Deep, re-run", "E²VPT"]
    for task in vtab.TASKS:
        row = wide.pop(task.folder)
        assert row[1:4] == [task.title, str(task.num_classes), task.group]
        assert row[4] == f"{task.num_visual_prompts} / {task.num_kv_prompts}"
        assert [float(cell) for cell in row[5:11]] == [
            vtab.published(method).top1[task.folder] for method in methods
        ]
        assert [float(cell) for cell in row[11:]] == [
            vtab.published(method).tuned_percent[task.folder] for method in ("E²VPT", "VPT-Deep")
        ]
    assert wide == {}
