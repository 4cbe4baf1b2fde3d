"""What `yolop-mtl predict` writes: pictures or a video, masks, and a line of results each."""

import json
from pathlib import Path
from typing import Any

import cv2

from shared_utils.errors import InputError
from yolop_mtl.geometry import Letterbox, Pixels
from yolop_mtl.predictor import Predictor
from yolop_mtl.result import Result
from yolop_mtl.sources import Frame
from yolop_mtl.tracking import Tracker
from yolop_mtl.video import VideoWriter

RESULTS = "results.jsonl"
JPEG = [int(cv2.IMWRITE_JPEG_QUALITY), 92]
PNG = [int(cv2.IMWRITE_PNG_COMPRESSION), 3]  # half the time of the default, hardly larger
LANE = 255  # a lane pixel in a mask


class Outputs:
    """Files of one run; used from one thread, but for `count` and `latest`.

    Attributes:
        folder: that holds them.
        count: images that are done, lines in results.jsonl.
        latest: the last picture with all drawn in, (h, w, 3) uint8 RGB, where they are shown.
    """

    def __init__(
        self,
        folder: Path,
        predictor: Predictor,
        *,
        is_video: bool,
        rate: float,
        tracker: Tracker | None,
        draws: bool,
        shows: bool,
        saves_masks: bool,
    ) -> None:
        """Begin.

        Args:
            folder: is there.
            predictor: makes results of raw outputs.
            is_video: write one video instead of pictures.
            rate: frames per second of it.
            tracker: numbers vehicles, or None.
            draws: write pictures or the video.
            shows: keep the latest picture.
            saves_masks: write masks.
        """
        self.folder, self.count = folder, 0
        self.latest: Pixels | None = None
        self._predictor, self._tracker = predictor, tracker
        self._is_video, self._rate = is_video, rate
        self._draws, self._shows, self._saves_masks = draws, shows, saves_masks
        self._video: VideoWriter | None = None
        self._names: set[Path] = set()
        self._lines = (folder / RESULTS).open("w", encoding="utf-8")

    def write(self, job: tuple[list[Frame], list[Letterbox], dict[str, Any]]) -> None:
        """Results of a batch: its frames, how they lie in it, and the network's raw outputs."""
        frames, letterboxes, raw = job
        results = self._predictor.finish(raw, letterboxes, [frame.image for frame in frames])
        for frame, result in zip(frames, results, strict=True):
            if self._tracker is not None:
                result = self._tracker.update(result)
            self._write(frame, result)

    def _write(self, frame: Frame, result: Result) -> None:
        name = frame.name
        if self._is_video:
            name = Path(f"{frame.number:06d}.png")
        else:
            name = self._new(name)
        if self._draws or self._shows:
            picture = result.plot()
            self.latest = picture if self._shows else None
            if self._draws and self._is_video:
                self._append(frame, picture)
            elif self._draws:
                _save(self.folder / name, picture)
        if self._saves_masks:
            masks = (
                ("drivable", result.drivable_class),
                ("lane", None if result.lanes is None else result.lanes.view("uint8") * LANE),
            )
            for task, mask in masks:
                if mask is not None:
                    _save(self.folder / "masks" / task / name.with_suffix(".png"), mask)
        line: dict[str, Any] = {"path": frame.path, "frame": frame.number}
        if frame.seconds is not None:
            line["seconds"] = round(frame.seconds, 6)
        # A line at once: what an interruption leaves is whole.
        self._lines.write(json.dumps(line | result.to_dict()) + "\n")
        self._lines.flush()
        self.count += 1

    @property
    def remarks(self) -> list[str]:
        """What is to be said at the end."""
        scaled = 0 if self._video is None else self._video.scaled
        return [f"{scaled} frames of another size scaled to that of the first"] * bool(scaled)

    def close(self) -> None:
        """Finish the video and the lines."""
        self._lines.close()
        if self._video is not None:
            self._video.close()

    def _append(self, frame: Frame, picture: Pixels) -> None:
        if self._video is None:
            size = (picture.shape[0], picture.shape[1])
            self._video = VideoWriter(self.folder / frame.name, size=size, rate=self._rate)
        self._video.write(picture, frame.seconds or 0.0)

    def _new(self, name: Path) -> Path:
        """A picture's name: .jpg or .png as its source, and none that was given before."""
        suffix = ".png" if name.suffix.lower() == ".png" else ".jpg"
        wanted = chosen = name.with_suffix(suffix)
        number = 1
        while chosen in self._names:
            number += 1
            chosen = wanted.with_stem(f"{wanted.stem}-{number}")
        self._names.add(chosen)
        return chosen


def _save(path: Path, pixels: Pixels) -> None:
    """A picture (h, w, 3) RGB or a mask (h, w) as JPEG or PNG, by the path's suffix."""
    planes = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    is_done, data = cv2.imencode(path.suffix, planes, PNG if path.suffix == ".png" else JPEG)
    if not is_done:
        got = f"{pixels.shape[0]} x {pixels.shape[1]} pixels"
        do = "shrink the image, or use --no-overlay"
        raise InputError(str(path), got, "sides of at most 65500", do)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())
