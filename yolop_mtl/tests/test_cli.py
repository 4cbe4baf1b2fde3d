"""The commands as a user meets them: help, and wrong input as one line that says what to do."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from yolop_mtl.cli import COMMANDS, main
from yolop_mtl.recipes import RECIPES

ONE_LINE = re.compile(r"error: [^\n]+?: got [^\n]+?, expected [^\n]+; [^\n]+\n")


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert ONE_LINE.fullmatch(error), error
    return error


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(told.count(f"\n  {name} ") == 2 for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([name, "--help"])
    told = capsys.readouterr().out
    assert "usage: yolop-mtl " in told
    if name == "train":
        assert all(re.search(rf"\n  {recipe} ", told) for recipe in RECIPES)


def test_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "yolop_mtl", "nothing"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert ONE_LINE.fullmatch(done.stderr)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete(name: str) -> None:
    recipe = RECIPES[name]
    assert (recipe.recipe, bool(recipe.about)) == (name, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tarin"], r"command: got 'tarin', expected a known command; did you mean 'train'"),
        (["train", "synthetics"], r"did you mean 'synthetic'\?"),
        (["train", "synthetic", "--model.preset", "big"], r"--model\.preset: got "),
        (["train", "synthetic", "--optim.lr", "0"], r"optim\.lr: got 0\.0, expected more than 0"),
        (["train", "synthetic", "--data.img-size", "180", "320"], r"data\.img_size: got \(180, 3"),
        (["train", "synthetic", "--optim.freez", "neck"], r"--optim\.freez: got an unknown opt"),
        (["train", "bdd100k", "--data.root", "nowhere"], r"data\.root: got 'nowhere' without imag"),
        (["train", "bdd100k", "--data.source", "coco", "--data.root", "nowhere"], r"nowhere"),
        (["train", "--resume", "nowhere"], r"nowhere/config\.json: got no such file"),
        (["val", "nowhere"], r"nowhere/model\.json: got no such file"),
        (["val", "x", "--iou", "2"], r"iou: got 2\.0, expected 0 or more and at most 1"),
    ],
)
def test_wrong_words_are_one_line(
    tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--runs-dir", str(tmp_path)] if argv[0] == "train" and len(argv) > 2 else []
    if "--resume" in argv:
        more = []
    assert re.search(message, failure([*argv, *more], capsys))
    assert not any(tmp_path.iterdir())


@pytest.fixture
def broken(tmp_path: Path, driving_scenes: Path) -> Path:
    """A copy of the scenes, to break."""
    shutil.copytree(driving_scenes, tmp_path / "scenes")
    return tmp_path / "scenes"


def spoil(root: Path, what: str) -> None:
    image = root / "images/train/train-000002.jpg"
    boxes = root / "labels/det_20/det_train.json"
    lane = root / "ll_seg_annotations/train/train-000001.png"
    area = root / "da_seg_annotations/train"
    if what == "image gone":
        image.unlink()
    elif what == "image cut off":
        image.write_bytes(image.read_bytes()[:2000])
    elif what == "boxes cut off":
        boxes.write_text(boxes.read_text()[:300])
    elif what == "boxes inverted":
        boxes.write_text(re.sub(r'"x1": [\d.]+', '"x1": 9999', boxes.read_text()))
    elif what == "category":
        boxes.write_text(boxes.read_text().replace('"category": "car"', '"category": "cra"'))
    elif what == "mask of another size":
        with Image.open(lane) as mask:
            mask.resize((80, 60)).save(lane)
    elif what == "mask inverted":
        for path in (root / "ll_seg_annotations/train").iterdir():
            with Image.open(path) as mask:
                ImageOps.invert(mask).save(path)
    elif what == "nothing labelled":
        for path in (boxes, root / "labels/det_20/det_val.json"):
            path.unlink()
        shutil.rmtree(area)
        shutil.rmtree(root / "ll_seg_annotations")
    elif what == "lanes not labelled":
        shutil.rmtree(root / "ll_seg_annotations/train")
    elif what == "no image":
        for path in (root / "images/val").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("image gone", r"labels of 1 images that are not there, first 'train-000002'"),
        ("image cut off", r"train-000002\.jpg: got a damaged or unreadable file"),
        ("boxes cut off", r"det_train\.json: got no JSON at line \d+, column \d+"),
        ("boxes inverted", r"det_train\.json \(train-00000\d\): box: got .*expected x1 < x2"),
        ("category", r"category: got 'cra', expected a known one; did you mean 'car'"),
        ("mask of another size", r"train-000001\.png: got 60 x 80 pixels, expected 120 x 160"),
        ("mask inverted", r"% foreground in \d+ lane masks, expected 0% to 10%; take the form"),
        ("nothing labelled", r"no label for detection, drivable, lane, expected labelled images"),
        ("lanes not labelled", r"'train': got no image labelled for lane, expected one or more"),
        ("no image", r"images/val: got no image, expected one or more"),
    ],
)
def test_broken_data_are_one_line(
    what: str, message: str, broken: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(broken, what)
    runs = broken.parent / "runs"
    argv = ["train", "synthetic", "--runs-dir", str(runs), "--name", "x", *quick]
    error = failure([*argv, "--data.root", str(broken), "--augment.mosaic", "0"], capsys)
    assert re.search(message, error), error


def test_a_folder_of_other_scenes_is_left_alone(
    driving_scenes: Path, tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in driving_scenes.rglob("*"))
    argv = ["train", "synthetic", "--runs-dir", str(tmp_path), *quick]
    error = failure([*argv, "--data.num-scenes", "7", "3"], capsys)
    assert re.search(r"data\.root: got .* with num_train 6, expected 7; remove that folder", error)
    assert sorted(path.name for path in driving_scenes.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.batch-size", "9"], r"data: got 6 images, expected 9 or more for a batch"),
        (["--model.weights", "nowhere.pt"], r"nowhere\.pt: got no such file"),
        (["--fitness.drivable-mIoU", "0", "--model.tasks", "drivable"], r"fitness: got mAP50_95, "),
        (["--name", "a/b"], r"--name: got a/b, expected a plain name; use --runs-dir"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    quick: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["train", "synthetic", "--runs-dir", str(tmp_path), *quick, *options]
    assert re.search(message, failure(argv, capsys))
