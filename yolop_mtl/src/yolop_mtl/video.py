"""Writing H.264 in MP4, and reading frames of any video, through PyAV."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from shared_utils.errors import InputError
from yolop_mtl.geometry import Pixels

TICKS = 90_000  # per second, fine enough for the times of any frame
USUAL_RATE = 30.0  # frames per second where a source does not say
OPEN_SECONDS, READ_SECONDS = 10.0, 10.0  # that an address may take to answer
QUALITY = {"crf": "21", "preset": "veryfast"}


class Facts(NamedTuple):
    """What a video says of itself.

    Attributes:
        rate: frames per second.
        total: frames, None where it has no end or does not say.
        has_audio: whether there is sound, which is not read.
    """

    rate: float
    total: int | None
    has_audio: bool


class VideoReader:
    """Frames of a video file or of an address, one pass.

    Attributes:
        facts: of the video.
        broken: frames and packets that could not be decoded and were left out.
    """

    def __init__(self, address: str) -> None:
        """Open it.

        Raises: InputError where it cannot be opened or holds no video.
        """
        options = {"rtsp_transport": "tcp"} if address.startswith("rtsp") else {}
        limits = (OPEN_SECONDS, READ_SECONDS)
        shown = without_password(address)
        expected, do = "a video", "check it, e.g. by playing it"
        try:
            self._container: Any = av.open(address, options=options, timeout=limits)
        except (FFmpegError, OSError, ValueError) as error:
            got = f"what cannot be opened ({_reason(error)})"
            raise InputError(shown, got, expected, do) from error
        if not self._container.streams.video:
            self._container.close()
            raise InputError(shown, "no video in it", expected, do)
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        rate = float(self._stream.average_rate or self._stream.guessed_rate or USUAL_RATE)
        total = int(self._stream.frames)
        if not total and self._container.duration:
            total = round(self._container.duration / av.time_base * rate)
        self.facts = Facts(rate, total or None, bool(self._container.streams.audio))
        self.broken = 0

    def __iter__(self) -> Iterator[tuple[Pixels, float]]:
        """(h, w, 3) uint8 RGB and seconds since the first frame; what is broken is left out.

        Raises: FFmpegError where the stream itself breaks off.
        """
        start: float | None = None
        count = 0
        for packet in self._container.demux(self._stream):
            try:
                frames = packet.decode()
            except FFmpegError:
                self.broken += 1
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self.broken += 1
                    continue
                time = count / self.facts.rate if frame.time is None else float(frame.time)
                start = time if start is None else start
                count += 1
                yield upright(frame), max(0.0, time - start)

    def close(self) -> None:
        """Let go of the file or the connection."""
        self._container.close()


def without_password(address: str) -> str:
    """An address as it may be shown: without the user's name and password."""
    return re.sub(r"//[^/@]*@", "//", address)


def upright(frame: Any) -> Pixels:
    """A decoded frame as (h, w, 3) uint8 RGB, turned as the camera was held."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counterclockwise
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


class VideoWriter:
    """An MP4 file that grows frame by frame and can be played once `close` was called.

    Attributes:
        path: of the file.
        scaled: frames that came in another size than the first one and were scaled to it.
    """

    def __init__(self, path: Path, *, size: tuple[int, int], rate: float) -> None:
        """Begin a file; an odd height or width gets a row or column more, which H.264 needs.

        Args:
            path: ends in .mp4; its folder is there.
            size: (H, W) of the frames.
            rate: frames per second, a hint for players: each frame has its own time.

        Raises: InputError where this PyAV cannot encode H.264.
        """
        self.path, self.scaled = path, 0
        self._size, self._last = size, -1
        self._container: Any = av.open(str(path), "w", options={"movflags": "faststart"})
        nearest = Fraction(rate).limit_denominator(1001)
        try:
            self._stream = self._container.add_stream("libx264", rate=nearest, options=QUALITY)
        except (FFmpegError, ValueError) as error:
            do = "install av from the package index, whose wheels have it"
            raise InputError("av", "one without libx264", "one with it", do) from error
        self._stream.height, self._stream.width = (side + side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, TICKS)

    def write(self, image: Pixels, seconds: float) -> None:
        """Append a frame.

        Args:
            image: (h, w, 3) uint8 RGB.
            seconds: when it is shown; one not after the frame before is shown right behind it.
        """
        height, width = self._size
        pixels: NDArray[Any] = image
        if image.shape[:2] != self._size:
            self.scaled += 1
            pixels = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        if height % 2 or width % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        self._last = max(self._last + 1, round(seconds * TICKS))
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is left; the file is whole then."""
        try:
            if self._last >= 0:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text).strip() or type(error).__name__
