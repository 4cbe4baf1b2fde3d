"""`e2vpt data check`: what it lists of small trees, and how it ends."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from e2vpt import fgvc, vtab
from e2vpt.cli import main

LINES = {"train800": 800, "val200": 200, "train800val200": 1000, "test": 7}


def write_vtab(root: Path) -> Path:
    """All 19 tasks, full lists over one image each."""
    for task in vtab.TASKS:
        for split, count in LINES.items():
            images = root / task.folder / "images" / split
            images.mkdir(parents=True)
            Image.new("L", (2, 2)).save(images / "000000.png")
            lines = [f"images/{split}/000000.png {k % task.num_classes}" for k in range(count)]
            (root / task.folder / f"{split}.txt").write_text("\n".join(lines))
    return root


def write_fgvc(root: Path) -> Path:
    """All five sets, each id's one image in every list."""
    for found in fgvc.SETS:
        images = root / found.folder / found.image_root
        images.mkdir(parents=True)
        names = [f"{key}.png" for key in range(1, found.num_classes + 1)]
        for name in names:
            Image.new("L", (2, 2)).save(images / name)
        for split in fgvc.SPLITS:
            listed = {name: key for key, name in enumerate(names, 1)}
            (root / found.folder / f"{split}.json").write_text(json.dumps(listed))
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both benchmarks complete, not to be changed."""
    root = tmp_path_factory.mktemp("data")
    write_vtab(root / "vtab")
    write_fgvc(root / "fgvc")
    return root


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


def check(
    suite: str, root: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, list[str], str]:
    """Exit status, lines on stdout, stderr."""
    capsys.readouterr()
    status = main(["data", "check", suite, str(root / suite), *options])
    told = capsys.readouterr()
    return status, told.out.splitlines(), told.err


@pytest.mark.parametrize("options", [[], ["--deep"]])
@pytest.mark.parametrize(
    ("suite", "header", "row", "end"),
    [
        ("vtab", "train800 val200 train800val200 test", "dtd 800 200 1000 7 complete",
         "all 19 tasks are complete"),
        ("fgvc", "train val test", "nabirds 555 555 555 complete",
         "all 5 data sets are complete"),
    ],
)  # fmt: skip
def test_complete(
    whole: Path,
    suite: str,
    header: str,
    row: str,
    end: str,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = check(suite, whole, capsys, *options)
    assert (status, err) == (0, "")
    assert len(out) == {"vtab": 19, "fgvc": 5}[suite] + 2
    assert " ".join(out[0].split()) == header
    assert row in {" ".join(line.split()) for line in out}
    assert out[-1] == end


@pytest.mark.parametrize("suite", ["vtab", "fgvc"])
def test_nothing_there_is_one_line(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"vtab": "cifar", "fgvc": "cub"}[suite]
    for folder in (tmp_path, tmp_path / suite):
        folder.mkdir(exist_ok=True)
        status, out, err = check(suite, tmp_path, capsys)
        assert (status, out) == (2, [])
        assert re.fullmatch(
            rf"error: folder: got nothing of {suite} in '.*{suite}', expected folders {first}, "
            rf".*; check the path; docs/[\w-]+\.md says where the data comes from\n",
            err,
        )


def test_what_a_benchmark_lacks_is_listed(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = own / "vtab"
    shutil.rmtree(root / "svhn")
    (root / "dtd" / "test.txt").unlink()
    (root / "cifar" / "images" / "test" / "000000.png").unlink()
    val = root / "kitti" / "val200.txt"
    val.write_text("\n".join(val.read_text().splitlines()[:150]))
    lines = (root / "eurosat" / "train800.txt").read_text().splitlines()
    lines[2] = "images/train800/000000.png 10"
    (root / "eurosat" / "train800.txt").write_text("\n".join(lines))
    status, out, err = check("vtab", own, capsys)
    assert status == 2
    rows = {line.split()[0]: line.split()[1:] for line in out[1:] if not line.startswith(" ")}
    assert len(rows) == 19
    assert rows["svhn"] == ["-", "-", "-", "-", "incomplete"]
    assert rows["dtd"] == ["800", "200", "1000", "-", "incomplete"]
    assert rows["cifar"] == ["800", "200", "1000", "7", "incomplete"]
    assert rows["kitti"] == ["800", "-", "1000", "7", "incomplete"]
    assert rows["eurosat"] == ["-", "200", "1000", "7", "incomplete"]
    assert sum(row[-1] == "complete" for row in rows.values()) == 14
    below = {out[i - 1].split()[0]: out[i].strip() for i in range(2, len(out)) if out[i][0] == " "}
    gone = root / "cifar" / "images" / "test" / "000000.png"
    assert below["svhn"] == "no such folder"
    assert below["cifar"] == f"1 image of test.txt missing: {gone}"
    assert below["dtd"].startswith(f"no '{root / 'dtd' / 'test.txt'}', expected train800.txt, ")
    assert below["kitti"].startswith(f"150 images in '{val}', expected 200")
    assert "train800.txt' line 3, expected 0 to 9, as eurosat has 10 classes" in below["eurosat"]
    assert err.count("\n") == 1
    assert err.startswith(
        f"error: data: got 5 of 19 tasks incomplete in '{root}': cifar, dtd, svhn, eurosat, kitti, "
        "expected all complete; "
    )


def test_what_a_data_set_lacks_is_listed(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = own / "fgvc"
    (root / "cub" / "images" / "7.png").unlink()
    (root / "dogs" / "val.json").write_text("{")
    (root / "cars" / "train.json").write_text('{"1.png": 1}')
    status, out, err = check("fgvc", own, capsys)
    assert status == 2
    text = "\n".join(out)
    for split in fgvc.SPLITS:  # the image is in all three lists
        assert f"    1 image of {split}.json missing: {root / 'cub' / 'images' / '7.png'}" in text
    assert f"    no readable JSON '{root / 'dogs' / 'val.json'}' (" in text
    assert "    class id 2 of '2.png' in " in text
    assert "3 of 5 data sets incomplete" in err


def test_deep_finds_what_does_not_decode(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = own / "fgvc" / "flowers" / "3.png"
    Image.effect_noise((50, 50), 90).save(bad)
    bad.write_bytes(bad.read_bytes()[:1000])
    worse = own / "fgvc" / "flowers" / "4.png"
    worse.unlink()
    status, out, _ = check("fgvc", own, capsys)
    assert (status, "unreadable" in "".join(out)) == (2, False)
    status, out, _ = check("fgvc", own, capsys, "--deep")
    told = [line.strip() for line in out if "val.json" in line]
    assert status == 2
    assert told[0] == f"1 image of val.json missing: {worse}"
    assert told[1].startswith(f"1 image of val.json unreadable: {bad} (")


def test_help_is_that_of_check(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["data"], ["data", "-h"], ["data", "check", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        assert "e2vpt data check" in capsys.readouterr().out
