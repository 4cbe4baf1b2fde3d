"""Files, videos, cameras and streams; what is broken among them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from av.error import InvalidDataError
from numpy.typing import NDArray
from PIL import Image

from shared_utils.errors import InputError, MissingFileError
from yolop_mtl import sources
from yolop_mtl.sources import Frame, LiveStream, open_source
from yolop_mtl.video import Facts

from .video_files import make_video, scene


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images b, a/c and a/d, a broken one, and what is no image."""
    (tmp_path / "a").mkdir()
    for number, name in enumerate(("b.jpg", "a/c.PNG", "a/d.webp", "a/e.jpeg")):
        Image.fromarray(scene(number)).save(tmp_path / name)
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "notes.txt").write_text("x")
    return tmp_path


def test_a_folder_gives_its_images_and_leaves_broken_ones_out(
    folder: Path, said: list[str]
) -> None:
    source = open_source(str(folder / "a"), say=said.append)
    found = list(source.frames())
    assert [frame.name for frame in found] == [Path("c.PNG"), Path("d.webp"), Path("e.jpeg")]
    assert [frame.path for frame in found] == [str(folder / "a" / x.name) for x in found]
    assert [frame.number for frame in found] == [0, 2, 3]
    assert {frame.seconds for frame in found} == {None}
    assert [round(frame.image.mean()) for frame in found] == [20, 30, 40]
    assert (source.total, source.broken, source.is_video, source.is_live) == (4, 1, False, False)
    assert len(said) == 1
    assert said[0].startswith(f"skipped {folder / 'a' / 'cut.jpg'}: got a damaged or unreadable")


def test_patterns_keep_folders_apart(folder: Path, said: list[str]) -> None:
    found = list(open_source(str(folder / "**" / "*.jp*g"), say=said.append).frames())
    assert [str(frame.name) for frame in found] == ["a/e.jpeg", "b.jpg"]
    with pytest.raises(MissingFileError, match=r"\*\.bmp: got no file of that pattern, expected"):
        open_source(str(folder / "*.bmp"), say=said.append)
    with pytest.raises(InputError, match=r"got .*notes\.txt among 5 files, expected images; name"):
        open_source(str(folder / "a" / "*"), say=said.append)


def test_one_image(folder: Path, said: list[str]) -> None:
    source = open_source(str(folder / "b.jpg"), say=said.append)
    assert [frame.name for frame in source.frames()] == [Path("b.jpg")]
    with pytest.raises(InputError, match=r"cut\.jpg: got a damaged or unreadable file"):
        open_source(str(folder / "a" / "cut.jpg"), say=said.append)
    with pytest.raises(
        MissingFileError, match=r"none\.jpg: got no such file, expected an image, a "
    ):
        open_source(str(folder / "none.jpg"), say=said.append)
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: got a folder without an image, expected one or"):
        open_source(str(folder / "empty"), say=said.append)
    with pytest.raises(InputError, match=r"notes\.txt: got (what cannot be opened|no video in it)"):
        open_source(str(folder / "a" / "notes.txt"), say=said.append)


def test_closing_ends_a_source(folder: Path, said: list[str]) -> None:
    source = open_source(str(folder / "a"), say=said.append)
    frames = source.frames()
    next(frames)
    source.close()
    assert list(frames) == []


def test_a_video_file(tmp_path: Path, said: list[str]) -> None:
    path = make_video(tmp_path / "drive.mov", 5, audio=True)
    source = open_source(str(path), say=said.append)
    found = list(source.frames())
    assert [frame.number for frame in found] == list(range(5))
    assert {frame.name for frame in found} == {Path("drive.mp4")}
    assert [frame.seconds for frame in found] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=1e-3)
    assert (source.total, source.rate, source.is_video) == (5, 10.0, True)
    assert source.remarks == ["its sound is not kept"]


def test_a_video_that_breaks_off(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(reader: Any) -> Iterator[Any]:
        yield scene(0), 0.0
        yield scene(1), 0.1
        raise InvalidDataError(1094995529, "Invalid data found", "x")

    monkeypatch.setattr(sources.VideoReader, "__iter__", broken)
    source = open_source(str(make_video(tmp_path / "a.mp4", 3)), say=said.append)
    assert len(list(source.frames())) == 2
    assert source.broken == 1
    assert source.remarks == ["the video breaks off after 2 frames: Invalid data found"]
    monkeypatch.setattr(sources.VideoReader, "__iter__", lambda reader: iter(()))
    empty = open_source(str(make_video(tmp_path / "b.mp4", 3)), say=said.append)
    with pytest.raises(InputError, match=r"b\.mp4: got no frame that can be decoded, expected a v"):
        list(empty.frames())


class FakeStream:
    """Gives so many frames, then an error or its end."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.facts = Facts(20.0, None, has_audio=False)
        self.count, self.error = count, error
        self.broken, self.is_closed = 1, False

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], float]]:
        for number in range(self.count):
            yield scene(number), number / 20
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.is_closed = True


def connector(*steps: FakeStream | Exception) -> Callable[[], FakeStream]:
    left = list(steps)

    def connect() -> FakeStream:
        step = left.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    return connect


def no_way(text: str) -> InputError:
    return InputError("rtsp://x", text, "a video", "check it")


def test_a_stream_is_opened_again(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    streams = [FakeStream(3, OSError(5, "no route")), FakeStream(2)]
    connect = connector(
        streams[0], no_way("no answer"), no_way("no answer"), streams[1],
        *[no_way("gone")] * 3,
    )  # fmt: skip
    source = LiveStream("rtsp://x", Path("x.mp4"), said.append, connect=connect, retries=3)
    monkeypatch.setattr(source._closed, "wait", lambda seconds: waited.append(seconds))
    found: list[Frame] = list(source.frames())
    assert [frame.number for frame in found] == list(range(5))
    times = [frame.seconds for frame in found]
    assert None not in times
    assert times[3] - times[2] > -0.2  # the clock goes on
    assert waited == [1, 2, 4, 1, 2, 4]
    assert said[0] == "rtsp://x broke off (no route); attempt 1 in 1 s"
    assert said[1] == "rtsp://x broke off (no answer); attempt 2 in 2 s"
    assert said[3] == "rtsp://x broke off (it ended); attempt 1 in 1 s"
    assert source.remarks == ["given up after 3 attempts to open it again", "opened again 1 times"]
    assert source.broken == 2
    assert all(stream.is_closed for stream in streams)
    assert (source.rate, source.total, source.is_live) == (20.0, None, True)


def test_a_stream_that_is_closed_is_not_opened_again(said: list[str]) -> None:
    source = LiveStream(
        "rtsp://x", Path("x.mp4"), said.append, connect=connector(FakeStream(4)), retries=3
    )
    frames = source.frames()
    next(frames)
    source.close()
    assert list(frames) == []
    again = LiveStream(
        "rtsp://x", Path("x.mp4"), said.append, connect=connector(FakeStream(1)), retries=3
    )
    found = again.frames()
    next(found)
    again._closed.set = lambda: None  # type: ignore[method-assign]
    again._closed.wait = lambda timeout=None: True  # type: ignore[method-assign]
    assert list(found) == []


def test_a_stream_that_cannot_be_opened_at_first(said: list[str]) -> None:
    with pytest.raises(InputError, match=r"rtsp://x: got no answer"):
        LiveStream(
            "rtsp://x", Path("x"), said.append, connect=connector(no_way("no answer")), retries=3
        )


def test_addresses(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def live(address: str) -> FakeStream:
        opened.append(address)
        return FakeStream(1)

    monkeypatch.setattr(sources, "VideoReader", live)
    source = open_source("rtsp://me:secret@cam.local:554/live?x=1", retries=0, say=said.append)
    found = list(source.frames())
    assert opened == ["rtsp://me:secret@cam.local:554/live?x=1"]
    assert found[0].name == Path("rtsp-cam.local-554-live-x-1.mp4")
    assert found[0].path == "rtsp://cam.local:554/live?x=1"
    assert "secret" not in " ".join([*said, *source.remarks])
    monkeypatch.undo()
    # What has an end is read as a file is, to its end.
    address = make_video(tmp_path / "a.mp4", 3).as_uri()
    source = open_source(address, say=said.append)
    assert (len(list(source.frames())), source.is_live, source.total) == (3, False, 3)
    message = r"nope://x: got what cannot be opened \(Protocol not found\)"
    with pytest.raises(InputError, match=message) as caught:
        open_source("nope://me:secret@x", say=said.append)
    assert "secret" not in str(caught.value)


def test_a_camera(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeCapture:
        def __init__(self, index: int) -> None:
            self.index, self.left, self.is_released = index, 3, False

        def isOpened(self) -> bool:
            return self.index == 2

        def get(self, what: int) -> float:
            return 0.0

        def read(self) -> tuple[bool, Any]:
            self.left -= 1
            pixels = np.zeros((4, 6, 3), np.uint8)
            pixels[..., 0] = 200  # blue, as OpenCV gives it
            return (self.left >= 0, pixels if self.left >= 0 else None)

        def release(self) -> None:
            self.is_released = True

    monkeypatch.setattr(sources.cv2, "VideoCapture", FakeCapture)
    source = open_source("2", retries=0, say=said.append)
    found = list(source.frames())
    assert len(found) == 3
    assert found[0].image[0, 0].tolist() == [0, 0, 200]
    assert (found[0].name, found[0].path) == (Path("camera-2.mp4"), "camera 2")
    assert source.rate == 30.0
    assert source.remarks == ["given up after 0 attempts to open it again"]
    with pytest.raises(InputError, match=r"camera 7: got none that opens, expected a camera"):
        open_source("7", say=said.append)
