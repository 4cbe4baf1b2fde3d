"""`yolop-mtl predict` from the words on the command line to the files."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from yolop_mtl import predict as command
from yolop_mtl.cli import main
from yolop_mtl.outputs import Outputs
from yolop_mtl.sources import Frame, Source

from .deployed import save_network
from .test_cli import ONE_LINE
from .video_files import SIZE, make_video, read_video, scene


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_network(tmp_path_factory.mktemp("network")))


@pytest.fixture
def run(network: str, tmp_path: Path) -> Any:
    """Runs the command on a source; gives exit status and folder."""

    def predict(source: object, *options: str) -> tuple[int, Path]:
        argv = ["predict", str(source), "--weights", network, "--device", "cpu", "--name", "x"]
        status = main([*argv, "--runs-dir", str(tmp_path / "runs"), *options])
        return status, tmp_path / "runs" / "yolop_mtl" / "x"

    return predict


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file())


class Fake(Source):
    """A live source of so many frames; then what `end` raises."""

    is_video = True
    is_live = False

    def __init__(self, count: int, end: BaseException | None = None) -> None:
        super().__init__(print)
        self.count, self.end = count, end
        self.is_closed = False

    def frames(self) -> Iterator[Frame]:
        for number in range(self.count):
            yield Frame(scene(number), "fake", Path("fake.mp4"), number, number / 30)
        if self.end is not None:
            raise self.end

    def close(self) -> None:
        super().close()
        self.is_closed = True


def test_one_image(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    status, folder = run(tmp_path / "street.png", "--save-masks", "--conf", "0.001")
    assert status == 0
    assert files(folder) == [
        "config.json", "masks/drivable/street.png", "masks/lane/street.png",
        "results.jsonl", "street.png",
    ]  # fmt: skip
    (line,) = lines(folder)
    assert line["path"] == str(tmp_path / "street.png")
    assert (line["frame"], line["height"], line["width"]) == (0, 90, 150)
    assert len(line["boxes_xyxy"]) == len(line["scores"]) == len(line["names"]) > 0
    assert set(line["names"]) <= {"car", "truck"}
    with Image.open(folder / "street.png") as drawn:
        assert np.asarray(drawn).shape == pixels.shape
        assert (np.asarray(drawn) != pixels).any()
    with Image.open(folder / "masks/drivable/street.png") as mask:
        assert (mask.mode, mask.size) == ("L", (150, 90))
        assert set(np.unique(np.asarray(mask))) <= {0, 1}
        assert np.asarray(mask).mean() == pytest.approx(line["drivable_share"], abs=1e-4)
    with Image.open(folder / "masks/lane/street.png") as mask:
        assert set(np.unique(np.asarray(mask))) <= {0, 255}
    told = capsys.readouterr()
    assert re.search(rf"1 image, [\d.]+ per second, in {folder}\n", told.out)
    assert told.err == ""


def test_a_folder_with_a_broken_image(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(("a.jpg", "b.jpg", "c.webp", "c.jpg")):
        Image.fromarray(scene(number, (60 + 10 * number, 80))).save(images / name)
    whole = (images / "b.jpg").read_bytes()
    (images / "b.jpg").write_bytes(whole[: len(whole) // 2])
    status, folder = run(images, "--batch-size", "2", "--img-size", "64")
    assert status == 0
    assert files(folder) == ["a.jpg", "c-2.jpg", "c.jpg", "config.json", "results.jsonl"]
    assert [(Path(x["path"]).name, x["frame"], x["height"]) for x in lines(folder)] == [
        ("a.jpg", 0, 60), ("c.jpg", 2, 90), ("c.webp", 3, 80),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert re.search(r"skipped .*b\.jpg: got a damaged or unreadable file", out)
    assert "; 1 broken ones left out" in out


def test_a_video_keeps_its_times(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = [0.0, 0.1, 0.25, 0.3, 0.9, 1.0, 1.5]
    make_video(tmp_path / "drive.mkv", 7, times=times, audio=True)
    status, folder = run(tmp_path / "drive.mkv", "--save-masks", "--batch-size", "3")
    assert status == 0
    images, found = read_video(folder / "drive.mp4")
    assert len(images) == 7
    assert images[0].shape == (*SIZE, 3)
    assert found == pytest.approx(times, abs=2e-3)
    assert [line["seconds"] for line in lines(folder)] == pytest.approx(times, abs=2e-3)
    assert [line["frame"] for line in lines(folder)] == list(range(7))
    assert len(files(folder)) == 3 + 2 * 7
    assert "masks/lane/000006.png" in files(folder)
    assert "7 frames, " in (out := capsys.readouterr().out)
    assert "; its sound is not kept" in out


def test_max_frames_and_no_overlay(run: Any, tmp_path: Path) -> None:
    path = make_video(tmp_path / "drive.mp4", 9)
    status, folder = run(path, "--max-frames", "5", "--batch-size", "2", "--no-overlay")
    assert (status, files(folder)) == (0, ["config.json", "results.jsonl"])
    assert len(lines(folder)) == 5


def test_tracks_are_in_the_results(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("trackers")
    path = make_video(tmp_path / "drive.mp4", 5)
    status, folder = run(path, "--track", "--conf", "0.001")
    assert status == 0
    for line in lines(folder):
        assert len(line["track_ids"]) == len(line["scores"])


@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_an_interruption_leaves_a_playable_video(
    run: Any,
    batch_size: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Fake(12, KeyboardInterrupt())
    monkeypatch.setattr(command, "open_source", lambda *args, **options: source)
    status, folder = run("fake", "--batch-size", batch_size)
    assert status == 130
    assert len(read_video(folder / "fake.mp4")[0]) == 12
    assert [line["frame"] for line in lines(folder)] == list(range(12))
    assert source.is_closed
    error = capsys.readouterr().err
    assert f"12 images are done and kept in {folder}" in error
    assert error.startswith("\ninterrupted, state saved; go on with: the same command; ")


def test_an_error_of_a_thread_reaches_the_user(
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = threading.active_count()
    path = make_video(tmp_path / "drive.mp4", 9)

    def fails(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Outputs, "_write", fails)
    assert run(path)[0] == 2
    assert capsys.readouterr().err == (
        "error: disk: got a full one, expected room; free some and try again\n"
    )
    monkeypatch.undo()
    monkeypatch.setattr(command, "open_source", lambda *a, **b: Fake(3, RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run("fake", "--overwrite")
    assert threading.active_count() == threads


def test_a_live_source_drops_what_nobody_has_time_for(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Fake(60)
    source.is_live = True
    monkeypatch.setattr(command, "open_source", lambda *args, **options: source)
    gate = threading.Event()
    real = command.Predictor.forward
    frames = source.frames

    def told() -> Iterator[Frame]:
        yield from frames()
        gate.set()

    def slow(predictor: Any, batch: Any) -> Any:
        gate.wait(20)
        return real(predictor, batch)

    source.frames = told  # type: ignore[method-assign]
    monkeypatch.setattr(command.Predictor, "forward", slow)
    status, folder = run("camera")
    assert status == 0
    done = [line["frame"] for line in lines(folder)]
    assert done[-2:] == [58, 59]
    assert len(done) <= 4
    out = capsys.readouterr().out
    assert f"; {60 - len(done)} left out because the network is slower than the source" in out


def test_a_window(
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_video(tmp_path / "drive.mp4", 9)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert run(path, "--show")[0] == 2
    assert "show: got no display, expected one (DISPLAY); leave --show" in capsys.readouterr().err
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "currentUIFramework", lambda: "")
    assert run(path, "--show")[0] == 2
    assert "show: got an OpenCV without windows, expected one" in capsys.readouterr().err
    monkeypatch.setattr(cv2, "currentUIFramework", lambda: "QT6")
    shown: list[tuple[int, ...]] = []
    keys = iter([-1, -1, -1, ord("q")])
    monkeypatch.setattr(cv2, "imshow", lambda name, pixels: shown.append(pixels.shape))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: next(keys))
    status, folder = run(path, "--show", "--no-overlay")
    assert status == 0
    assert len(lines(folder)) == 4
    assert set(shown) == {(*SIZE, 3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--conf", "2"], r"conf: got 2\.0, expected 0 or more and at most 1"),
        (["--batch-size", "0"], r"batch_size: got 0, expected 1 or more"),
        (["--img-size", "1", "2", "3"], r"img_size: got 3 numbers, expected one or two; name"),
        (["--img-size", "100"], r"img_size: got 100, expected a multiple of 32"),
        (["--track"], r"track: got one image, expected a video or several images; leave it out"),
        (
            ["--device", "tpu"],
            r"device: got 'tpu'.*expected what this machine has; use auto",
        ),
        (["--weights", "nowhere"], r"nowhere/model\.json: got no such file"),
        (["--name", "a/b"], r"--name: got a/b, expected a plain name"),
    ],
)
def test_options_that_cannot_be(
    run: Any,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.fromarray(scene(1)).save(tmp_path / "a.jpg")
    status, folder = run(tmp_path / "a.jpg", *options)
    error = capsys.readouterr().err
    assert status == 2
    assert ONE_LINE.fullmatch(error), error
    assert re.search(message, error), error
    assert not folder.exists()


def test_results_are_not_overwritten_by_accident(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(scene(1)).save(tmp_path / "a.jpg")
    Image.fromarray(scene(1)).save(tmp_path / "b.jpg")
    assert run(tmp_path / "a.jpg")[0] == 0
    assert run(tmp_path / "b.jpg")[0] == 2
    error = capsys.readouterr().err
    assert re.search(r"--name: got x, which exists as .*, expected a new name; use --overwr", error)
    status, folder = run(tmp_path / "b.jpg", "--overwrite")
    assert (status, files(folder)) == (0, ["b.jpg", "config.json", "results.jsonl"])
    assert run(tmp_path / "none.jpg", "--overwrite")[0] == 2
    assert files(folder) == ["b.jpg", "config.json", "results.jsonl"]
