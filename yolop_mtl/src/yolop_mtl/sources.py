"""Where the images to predict come from: files, a video, a camera, a stream.

Every source gives frames one after another. A broken one among many is left out and counted. A
camera or a stream that breaks off is opened again, waiting longer after each vain attempt.
"""

import glob
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, Protocol

import cv2
from av.error import FFmpegError

from shared_utils.errors import InputError, MissingFileError
from yolop_mtl.geometry import Pixels
from yolop_mtl.samples import read_image
from yolop_mtl.video import USUAL_RATE, Facts, VideoReader, without_password

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds before a stream is opened again
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
Say = Callable[[str], None]


class Frame(NamedTuple):
    """An image and where it comes from.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        path: of its file, or the source's name.
        name: of what is made of it, relative to the folder of results, with a suffix.
        number: in its source, from 0; broken ones of a folder count.
        seconds: since the first frame; None for image files.
    """

    image: Pixels
    path: str
    name: Path
    number: int
    seconds: float | None


class Source(ABC):
    """Frames, one pass.

    Attributes:
        is_video: whether its frames follow one another in time.
        is_live: whether it goes on without waiting for anybody.
        total: frames, None where that is not known.
        rate: frames per second of a video.
        broken: frames that were left out.
        remarks: what is to be said at the end.
    """

    is_video = False
    is_live = False
    total: int | None = None
    rate = USUAL_RATE

    def __init__(self, say: Say) -> None:
        """Nothing is read yet; `say` tells the user a line."""
        self.say = say
        self.broken = 0
        self.remarks: list[str] = []
        self._closed = Event()

    @abstractmethod
    def frames(self) -> Iterator[Frame]:
        """The frames. Raises: InputError where there is none at all."""

    def close(self) -> None:
        """Give no further frames; called from another thread too."""
        self._closed.set()


class ImageFiles(Source):
    """Image files; a broken one is an error where it is the only one."""

    def __init__(self, paths: Sequence[Path], say: Say) -> None:
        """One or more paths; results keep their folders, seen from the one that holds them all.

        Raises: InputError for one path that cannot be read.
        """
        super().__init__(say)
        self._only = read_image(paths[0]) if len(paths) == 1 else None
        self.total = len(paths)
        self._paths = paths
        self._root = Path(os.path.commonpath([path.parent for path in paths]))

    def frames(self) -> Iterator[Frame]:
        """One of each file, in the order given."""
        for number, path in enumerate(self._paths):
            if self._closed.is_set():
                return
            try:
                image = read_image(path) if self._only is None else self._only
            except InputError as error:
                self.broken += 1
                self.say(f"skipped {str(error).partition(', expected')[0]}")
                continue
            yield Frame(image, str(path), path.relative_to(self._root), number, None)


class VideoFile(Source):
    """A video file, or another address of one that has an end."""

    is_video = True

    def __init__(self, address: str, name: Path, say: Say, reader: VideoReader) -> None:
        """Take over an opened video."""
        super().__init__(say)
        self._address, self._name, self._reader = address, name, reader
        self.total, self.rate = reader.facts.total, reader.facts.rate
        self.remarks += _about_audio(reader.facts)

    def frames(self) -> Iterator[Frame]:
        """All that can be decoded; where the file breaks off, they end."""
        number = -1
        try:
            for number, (image, seconds) in enumerate(self._reader):
                yield Frame(image, self._address, self._name, number, seconds)
                if self._closed.is_set():
                    break
        except FFmpegError as error:
            self.broken += 1
            self.remarks.append(f"the video breaks off after {number + 1} frames: {error.strerror}")
        finally:
            self.broken += self._reader.broken
            self._reader.close()
        if number < 0:
            do = "check it, e.g. by playing it"
            raise InputError(self._address, "no frame that can be decoded", "a video", do)


class Connection(Protocol):
    """An opened camera or stream: images and seconds since its first one."""

    facts: Facts
    broken: int

    def __iter__(self) -> Iterator[tuple[Pixels, float]]: ...

    def close(self) -> None:
        """Let go of it."""


class LiveStream(Source):
    """A camera or a stream, opened again when it breaks off."""

    is_video = True
    is_live = True

    def __init__(
        self, address: str, name: Path, say: Say, *, connect: Callable[[], Connection], retries: int
    ) -> None:
        """Open it.

        Args:
            address: to be said.
            name: of the results.
            say: tells the user a line.
            connect: opens it, now and again.
            retries: vain attempts to open it again, in a row, after which it is given up.

        Raises: InputError where it cannot be opened now.
        """
        super().__init__(say)
        self._address, self._name, self._connect = address, name, connect
        self._retries = retries
        self._connection = connect()
        self.rate = self._connection.facts.rate
        self.remarks += _about_audio(self._connection.facts)

    def frames(self) -> Iterator[Frame]:
        """Frames for as long as there are any; their times go on over interruptions."""
        begin, number, reopened = time.monotonic(), 0, 0
        connection: Connection | None = self._connection
        while connection is not None:
            offset = time.monotonic() - begin if reopened else 0.0
            reason = "it ended"
            try:
                for image, seconds in connection:
                    yield Frame(image, self._address, self._name, number, offset + seconds)
                    number += 1
                    if self._closed.is_set():
                        return
            except (FFmpegError, OSError) as error:
                reason = error.strerror or str(error)
            finally:
                self.broken += connection.broken
                connection.close()
            connection = self._again(reason)
            reopened += connection is not None
        if reopened:
            self.remarks.append(f"opened again {reopened} times")

    def _again(self, reason: str) -> Connection | None:
        """A new connection, or None where it is given up."""
        wait = FIRST_WAIT
        for attempt in range(1, self._retries + 1):
            self.say(f"{self._address} broke off ({reason}); attempt {attempt} in {wait:.0f} s")
            if self._closed.wait(wait):
                return None
            wait = min(2 * wait, LONGEST_WAIT)
            try:
                return self._connect()
            except InputError as error:
                reason = str(error).partition(": got ")[2].partition(", expected")[0]
        self.remarks.append(f"given up after {self._retries} attempts to open it again")
        return None


class Camera:
    """A camera of this machine, through OpenCV."""

    def __init__(self, index: int) -> None:
        """Open it. Raises: InputError where there is none."""
        self._capture: Any = cv2.VideoCapture(index)
        if not self._capture.isOpened():
            do = "check that it is plugged in and that no other program uses it"
            raise InputError(f"camera {index}", "none that opens", "a camera", do)
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.facts = Facts(rate if rate > 0 else USUAL_RATE, None, has_audio=False)
        self.broken = 0

    def __iter__(self) -> Iterator[tuple[Pixels, float]]:
        """(h, w, 3) uint8 RGB and seconds, by this machine's clock, until it fails."""
        begin: float | None = None
        while True:
            is_there, pixels = self._capture.read()
            if not is_there:
                return
            now = time.monotonic()
            begin = now if begin is None else begin
            yield cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), now - begin

    def close(self) -> None:
        """Let go of it."""
        self._capture.release()


def open_source(text: str, *, retries: int = 5, say: Say) -> Source:
    """What a word on the command line means.

    Args:
        text: an image, a folder of images, a pattern of images such as 'drive/*.jpg', a video, the
            number of a camera, or the address of a stream or a video, such as rtsp://...
        retries: of a camera or a stream that breaks off.
        say: tells the user a line.

    Raises: MissingFileError, InputError.
    """
    if text.isdecimal():
        index = int(text)
        name = Path(f"camera-{index}.mp4")
        connect: Callable[[], Connection] = lambda: Camera(index)  # noqa: E731
        return LiveStream(f"camera {text}", name, say, connect=connect, retries=retries)
    if ADDRESS.match(text):
        return _open_address(text, retries, say)
    path = Path(text)
    if path.is_dir():
        found = sorted(x for x in path.iterdir() if x.suffix.lower() in IMAGES)
        if not found:
            expected = f"one or more ({', '.join(IMAGES)})"
            do = "name another folder, or one of its videos"
            raise InputError(text, "a folder without an image", expected, do)
        return ImageFiles(found, say)
    if path.is_file():
        if path.suffix.lower() in IMAGES:
            return ImageFiles([path], say)
        reader = VideoReader(text)
        return VideoFile(text, Path(path.name).with_suffix(".mp4"), say, reader)
    if glob.has_magic(text):
        found = sorted(Path(x) for x in glob.glob(text, recursive=True) if Path(x).is_file())
        if not found:
            raise MissingFileError(text, "no file of that pattern", "one or more", "check it")
        if others := [x for x in found if x.suffix.lower() not in IMAGES]:
            do = "name images only, or one video"
            raise InputError(text, f"{others[0]} among {len(found)} files", "images", do)
        return ImageFiles(found, say)
    expected = "an image, a folder, a pattern, a video, a camera's number or an address"
    raise MissingFileError(text, "no such file", expected, "check the path")


def _open_address(address: str, retries: int, say: Say) -> Source:
    """A stream, or a video that has an end and is read as a file is."""
    shown = without_password(address)
    name = Path(re.sub(r"[^\w.-]+", "-", shown).strip("-.")[:100] + ".mp4")
    reader = VideoReader(address)
    if reader.facts.total is not None:
        return VideoFile(shown, name, say, reader)
    waiting = [reader]  # the first connection is that one

    def connect() -> Connection:
        return waiting.pop() if waiting else VideoReader(address)

    return LiveStream(shown, name, say, connect=connect, retries=retries)


def _about_audio(facts: Facts) -> list[str]:
    return ["its sound is not kept"] * facts.has_audio
