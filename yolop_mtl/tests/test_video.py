"""Videos written and read: every frame, its time, and what breaks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from shared_utils.errors import InputError
from yolop_mtl import video
from yolop_mtl.video import VideoReader, VideoWriter, upright

from .video_files import make_video, read_video, scene


def numbers(images: list[np.ndarray]) -> list[int]:
    """Which scenes frames show."""
    return [round((float(image.mean()) - 10) / 10) for image in images]


def test_frames_come_in_order_with_their_times(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.15, 0.6, 0.7, 1.9]
    reader = VideoReader(str(make_video(tmp_path / "a.mp4", 6, times=times)))
    found = list(reader)
    reader.close()
    assert numbers([image for image, _ in found]) == list(range(6))
    assert [seconds for _, seconds in found] == pytest.approx(times, abs=1e-3)
    assert (found[0][0].shape, found[0][0].dtype) == ((96, 160, 3), np.uint8)
    assert (reader.broken, reader.facts.has_audio) == (0, False)
    sound = VideoReader(str(make_video(tmp_path / "b.mp4", 5, audio=True)))
    assert (sound.facts.rate, sound.facts.total, sound.facts.has_audio) == (10.0, 5, True)
    assert len(list(sound)) == 5


def test_broken_packets_are_counted_and_left_out(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", 10, codec="mjpeg")
    data = bytearray(path.read_bytes())
    starts = [i for i in range(len(data)) if data[i : i + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 10
    for number in (3, 6):
        size = starts[number + 1] - starts[number] - 8  # up to the next packet's own header
        data[starts[number] : starts[number] + size] = bytes(size)
    path.write_bytes(data)
    reader = VideoReader(str(path))
    found = numbers([image for image, _ in reader])
    assert found == [0, 1, 2, 4, 5, 7, 8, 9]
    assert reader.broken == 2


def test_what_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"not a video at all" * 100)
    message = r"a\.mp4: got what cannot be opened \(Invalid data.*\), expected a video; check it"
    with pytest.raises(InputError, match=message):
        VideoReader(str(path))
    with pytest.raises(InputError, match=r"got what cannot be opened \(No such file"):
        VideoReader(str(tmp_path / "none.mp4"))
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InputError, match=r"sound\.wav: got no video in it, expected a video"):
        VideoReader(str(tmp_path / "sound.wav"))


@pytest.mark.parametrize(("rotation", "corner"), [(0, 1), (90, 3), (-90, 5), (180, 7), (-180, 7)])
def test_frames_are_turned_as_the_camera_was_held(rotation: int, corner: int) -> None:
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1] = 1, 3, 5, 7
    frame: Any = SimpleNamespace(rotation=rotation, to_ndarray=lambda format: pixels)
    turned = upright(frame)
    assert turned.shape == ((6, 4, 3) if rotation % 180 else (4, 6, 3))
    assert turned[0, 0, 0] == corner
    assert turned.flags.c_contiguous


@pytest.mark.parametrize("size", [(96, 160), (95, 161), (1, 1)])
def test_a_written_video_has_every_frame_at_its_time(tmp_path: Path, size: tuple[int, int]) -> None:
    times = [0.0, 0.04, 0.5, 0.5, 0.4, 1.25]
    writer = VideoWriter(tmp_path / "a.mp4", size=size, rate=29.97)
    for number, seconds in enumerate(times):
        writer.write(scene(number, size), seconds)
    writer.close()
    images, found = read_video(tmp_path / "a.mp4")
    assert numbers(images) == list(range(6))
    assert images[0].shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert found == pytest.approx([0.0, 0.04, 0.5, 0.5, 0.5, 1.25], abs=1e-3)
    assert found == sorted(set(found))
    assert writer.scaled == 0


def test_frames_of_another_size_are_scaled(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", size=(96, 160), rate=10)
    for number, size in enumerate([(96, 160), (48, 80), (192, 320)]):
        writer.write(scene(number, size), number / 10)
    writer.close()
    images, _ = read_video(tmp_path / "a.mp4")
    assert numbers(images) == [0, 1, 2]
    assert (writer.scaled, images[1].shape) == (2, (96, 160, 3))


def test_without_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = video.av.open

    def opened(*args: Any, **options: Any) -> Any:
        container = real(*args, **options)

        def add_stream(name: str, **more: Any) -> Any:
            return container.add_stream(f"no-{name}", **more)

        return SimpleNamespace(add_stream=add_stream)

    monkeypatch.setattr(video.av, "open", opened)
    with pytest.raises(InputError, match=r"av: got one without libx264, expected one with it; ins"):
        VideoWriter(tmp_path / "a.mp4", size=(96, 160), rate=10)
