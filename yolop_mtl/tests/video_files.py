"""Small videos made on the spot."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

SIZE = (96, 160)


def scene(number: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """A frame whose brightness is its number: 10, 20, 30 ..."""
    return np.full((*size, 3), 10 + 10 * (number % 24), dtype=np.uint8)


def make_video(
    path: Path,
    count: int = 8,
    *,
    size: tuple[int, int] = SIZE,
    rate: int = 10,
    times: Sequence[float] | None = None,
    codec: str = "libx264",
    audio: bool = False,
) -> Path:
    """A video of `scene` 0, 1 ...; each is a key frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "1", "bf": "0"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        sound = container.add_stream("aac", rate=8000) if audio else None
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(scene(number, size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
            quiet.rate = 8000
            container.mux(sound.encode(quiet))
            container.mux(sound.encode(None))
    return path


def read_video(path: Path) -> tuple[list[NDArray[np.uint8]], list[float]]:
    """All frames as RGB, and their times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [frame.to_ndarray(format="rgb24") for frame in frames], [x.time for x in frames]
