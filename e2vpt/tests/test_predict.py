"""Images by file, folder and pattern to a table and a sheet; odd images, odd names, bad files."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from e2vpt import pictures
from e2vpt.cli import main
from e2vpt.images import decode_image
from e2vpt.predict import Predictor, find_images, predict
from shared_utils.errors import InputError, MissingFileError


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 14)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def top(run: Path, image: Image.Image) -> list[tuple[str, float]]:
    """The model's first three choices, computed one image at a time."""
    predictor = Predictor(run)
    with torch.no_grad():
        logits = predictor.model(predictor.preprocessing(image)[None])[0].double()
    shares = torch.exp(logits) / torch.exp(logits).sum()
    order = sorted(range(10), key=lambda i: -float(shares[i]))[:3]
    return [(predictor.class_names[i], float(shares[i])) for i in order]


def choices(row: dict[str, str]) -> list[tuple[str, float]]:
    return [(row[f"class{i}"], float(row[f"probability{i}"])) for i in (1, 2, 3)]


def assert_agrees(run: Path, row: dict[str, str], image: Image.Image) -> None:
    for (name, share), (own_name, own_share) in zip(choices(row), top(run, image), strict=True):
        assert name == own_name
        assert share == pytest.approx(own_share, abs=2e-6)


def test_the_table_holds_the_models_probabilities(
    tmp_path: Path, digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [picture(tmp_path / "in" / f"{i}.png", i, (10 + 3 * i, 30)) for i in range(5)]
    argv = ["predict", str(digits_run), *map(str, files), "--output", str(tmp_path / "out")]
    assert main([*argv, "--batch-size", "2"]) == 0
    assert capsys.readouterr().out.startswith("5 images: ")
    rows = table(tmp_path / "out")
    assert list(rows[0]) == [
        "path", "class1", "probability1", "class2", "probability2", "class3", "probability3",
    ]  # fmt: skip
    assert [row["path"] for row in rows] == [str(file) for file in files]
    for row, file in zip(rows, files, strict=True):
        assert_agrees(digits_run, row, Image.open(file))
    assert len({row["probability1"] for row in rows}) > 1


def test_the_sheet_shows_the_images(tmp_path: Path, digits_run: Path) -> None:
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    red.save(tmp_path / "red.png")
    predict(digits_run, [str(tmp_path / "red.png")], tmp_path)
    with Image.open(tmp_path / "predictions.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(axis=1).mean() > 0.1
    dark = (pixels < 100).all(axis=1).sum()
    assert dark > 100  # its caption and the title


def test_at_most_so_many_images_on_the_sheet(
    tmp_path: Path, digits_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        picture(tmp_path / "in" / f"{i}.png", i)
    monkeypatch.setattr(pictures, "SHEET_IMAGES", 3)
    shown = []
    real = pictures.sheet
    monkeypatch.setattr(pictures, "sheet", lambda *a: (shown.append((len(a[0]), a[3])), real(*a)))
    assert predict(digits_run, [str(tmp_path / "in")], tmp_path)[0] == 4
    assert shown == [(3, "3 of 4 images")]


# ---- what is given --------------------------------------------------------------------------


def test_files_folders_and_patterns_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["b.png", "a.JPG", "deep/er/c.png", "deep/d.gif", "[x].png", "deep/er/.hidden.png"]
    for i, name in enumerate(names):
        picture(tmp_path / name, i)
    (tmp_path / "deep" / "notes.txt").write_text("no image")
    (tmp_path / "deep" / "table.pdf").write_text("no image")
    (tmp_path / "deep" / "folder.png").mkdir()

    def found(*given: str) -> list[str]:
        return [str(path) for path in find_images(given)]

    assert found("b.png", "a.JPG") == ["b.png", "a.JPG"]
    assert found("deep") == ["deep/d.gif", "deep/er/c.png"]
    assert found("*.png") == ["[x].png", "b.png"]
    assert found("**/c.*") == ["deep/er/c.png"]
    assert found("[x].png") == ["[x].png"]  # a file first, a pattern second
    assert found("deep", "b.png", "deep/er/*.png", "./b.png") == [
        "deep/d.gif", "deep/er/c.png", "b.png",
    ]  # fmt: skip
    assert found("deep/notes.txt") == ["deep/notes.txt"]  # what is named is tried


@pytest.mark.parametrize("given", ["absent.png", "*.png", "empty", "texts"])
def test_nothing_matched(
    tmp_path: Path,
    digits_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    picture(tmp_path / "good.jpg")
    assert main(["predict", str(digits_run), "good.jpg", given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: images: got '{given}', which matches no image, expected files")
    assert error.count("\n") == 1
    assert not (tmp_path / "predictions").exists()
    with pytest.raises(MissingFileError):
        find_images([given])


# ---- odd images -----------------------------------------------------------------------------


def odd_images(folder: Path) -> dict[str, Image.Image]:
    """Files of every kind, and what a person sees in each, in RGB."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    grey = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
    seen: dict[str, Image.Image] = {}

    grey.save(folder / "grey.png")
    seen["grey.png"] = grey.convert("RGB")

    clear = colour.convert("RGBA")
    alpha = np.zeros((16, 16), dtype=np.uint8)
    alpha[:, :8] = 255
    clear.putalpha(Image.fromarray(alpha))
    clear.save(folder / "rgba.png")
    half = np.array(colour)
    half[:, 8:] = 255
    seen["rgba.png"] = Image.fromarray(half)

    deep = np.asarray(grey).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "16bit.png")
    seen["16bit.png"] = grey.convert("RGB")

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    colour.save(folder / "exif.png", exif=exif)
    seen["exif.png"] = colour.transpose(Image.Transpose.ROTATE_270)

    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    seen["moving.gif"] = frames[0]

    picture(folder / "wide.png", 5, (90, 7))
    seen["wide.png"] = Image.open(folder / "wide.png").convert("RGB")
    picture(folder / "dot.bmp", 6, (1, 1))
    seen["dot.bmp"] = Image.open(folder / "dot.bmp").convert("RGB")
    return seen


def test_modes_and_sizes(tmp_path: Path, digits_run: Path) -> None:
    (tmp_path / "in").mkdir()
    seen = odd_images(tmp_path / "in")
    assert predict(digits_run, [str(tmp_path / "in")], tmp_path / "out") == (len(seen), [])
    rows = {Path(row["path"]).name: row for row in table(tmp_path / "out")}
    assert rows.keys() == seen.keys()
    for name, image in seen.items():
        assert_agrees(digits_run, rows[name], image)
    answers = {tuple(row.values())[2] for row in rows.values()}
    assert len(answers) >= 5  # the model does tell them apart


def test_prediction_sees_what_training_saw(digits_run: Path, tmp_path: Path) -> None:
    """The preprocessing of model.json is that of the run's own loader."""
    from e2vpt.config import TrainConfig
    from e2vpt.data import load_data
    from shared_utils.config import load_json

    cfg = load_json(TrainConfig, digits_run / "config.json")
    prep = Predictor(digits_run).preprocessing
    splits = load_data(cfg.data, img_size=(32, 32), mean=prep.mean, std=prep.std, seed=0)
    assert splits.test is not None
    splits.test.image(3).save(tmp_path / "digit.png")
    assert torch.equal(prep(decode_image(tmp_path / "digit.png")), splits.test[3][0])


# ---- odd names and bad files ----------------------------------------------------------------


def test_names_with_spaces_and_signs(tmp_path: Path, digits_run: Path) -> None:
    names = ["a b.png", 'ünï, "cödé".png', "$x_{$.png", "$\\frac$.png", "猫.png"]
    for i, name in enumerate(names):
        picture(tmp_path / "in" / name, i)
    assert predict(digits_run, [str(tmp_path / "in")], tmp_path / "out")[0] == len(names)
    assert {Path(row["path"]).name for row in table(tmp_path / "out")} == set(names)


def test_class_names_that_look_like_formulas(tmp_path: Path) -> None:
    names = ["$\\frac$", "$5 and $6", "a_b^{"]
    images = [Image.new("RGB", (8, 8))] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a font without a sign
        pictures.sheet(images, names, tmp_path / "sheet.png", "title")
        pictures.confusion(torch.eye(3), torch.arange(3), names, tmp_path / "confusion.png")
    for name in ("sheet.png", "confusion.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100


def test_the_confusion_matrix_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are true classes: one cat taken for a dog, two dogs for what they are."""
    from matplotlib.axes import Axes

    written = {}
    real = Axes.text

    def text(self: Axes, x: int, y: int, s: str, **options: object) -> object:
        written[(int(y), int(x))] = s
        return real(self, x, y, s, **options)

    monkeypatch.setattr(Axes, "text", text)
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    pictures.confusion(logits, torch.tensor([0, 1, 1]), ["cat", "dog"], tmp_path / "c.png")
    assert written == {(0, 1): "1", (1, 1): "2"}


def bad_and_good(folder: Path) -> Path:
    for i in range(3):
        picture(folder / f"{i}.png", i)
    cut = picture(folder / "cut.png", 9)
    cut.write_bytes(cut.read_bytes()[:90])
    (folder / "text.jpg").write_text("no image")
    return folder


def test_bad_files_stop_and_nothing_is_written(
    tmp_path: Path, digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bad_and_good(tmp_path / "in")
    argv = ["predict", str(digits_run), str(folder), "--output", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: images: got 2 unreadable: ")
    assert str(folder / "cut.png") in error
    assert str(folder / "text.jpg") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_files_can_be_left_out(
    tmp_path: Path, digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bad_and_good(tmp_path / "in")
    argv = ["predict", str(digits_run), str(folder), "--output", str(tmp_path / "out")]
    assert main([*argv, "--skip-bad", "--batch-size", "1"]) == 0
    told = capsys.readouterr().out
    assert f"left out, unreadable: {folder / 'cut.png'}\n" in told
    assert f"left out, unreadable: {folder / 'text.jpg'}\n" in told
    assert "3 images: " in told
    rows = table(tmp_path / "out")
    assert [Path(row["path"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    for row in rows:  # the right one to each
        assert_agrees(digits_run, row, Image.open(row["path"]))


def test_only_bad_files(tmp_path: Path, digits_run: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"^images: got no readable image, expected at least one"):
        predict(digits_run, [str(tmp_path / "text.jpg")], tmp_path / "out", skip_bad=True)


def test_output_that_is_a_file(tmp_path: Path, digits_run: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"^output: got the file '.*a\.png', expected a folder"):
        predict(digits_run, [str(tmp_path / "a.png")], tmp_path / "a.png")


def test_a_full_disk_keeps_the_old_table(tmp_path: Path, digits_run: Path, no_room: object) -> None:
    picture(tmp_path / "a.png")
    predict(digits_run, [str(tmp_path / "a.png")], tmp_path)
    old = (tmp_path / "predictions.csv").read_bytes()
    picture(tmp_path / "b.png")
    with no_room(), pytest.raises(InputError, match=r"predictions\.csv: got a full disk"):  # type: ignore[operator]
        predict(digits_run, [str(tmp_path)], tmp_path)
    assert (tmp_path / "predictions.csv").read_bytes() == old


def test_a_model_without_names_cannot_predict(tmp_path: Path) -> None:
    import e2vpt
    from e2vpt.micro_vit import build_micro_vit

    e2vpt.save(e2vpt.prompt(build_micro_vit(2, embed_dim=64, depth=1, num_heads=1), 2), tmp_path)
    with pytest.raises(InputError, match=r"model\.json: got no preprocessing or class names"):
        predict(tmp_path, ["x.png"], tmp_path / "out")
