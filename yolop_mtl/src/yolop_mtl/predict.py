"""`yolop-mtl predict`: draw what the network finds into images, a video, or what a camera sees."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import tyro
from torch import Tensor

from shared_utils.config import save_json
from shared_utils.errors import InputError, Interrupted
from shared_utils.run_log import open_run
from yolop_mtl.config import Precision, check_ranges
from yolop_mtl.geometry import Letterbox
from yolop_mtl.outputs import Outputs
from yolop_mtl.pipeline import Ahead, Behind
from yolop_mtl.predictor import Predictor, load
from yolop_mtl.progress import Meter, say
from yolop_mtl.sources import Frame, Source, open_source
from yolop_mtl.tracking import Tracker

DEPTH = 2  # batches that wait before the network, and behind it
QUIT_KEYS = (ord("q"), 27)  # 27 is Esc
WINDOW = "yolop-mtl"


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Find vehicles, drivable area and lanes in images, a video, or what a camera sees.

    Results go to runs/yolop_mtl/predict-TIME: pictures or a video with all drawn in, and
    results.jsonl with a line of boxes and lane lines for each image. Sound is not kept.
    """

    source: tyro.conf.Positional[str]
    """image, folder or 'pattern' of images, video, number of a camera, or address (rtsp://...)"""
    weights: str = ""
    """run folder or model.safetensors (default: the small network that comes with the package,
    trained on generated scenes only)"""
    conf: float = 0.3
    """boxes need a higher score"""
    iou: float = 0.45
    """of two boxes of one class that overlap more the better one stays"""
    lane_threshold: float = 0.5
    """lane pixels need a higher probability"""
    img_size: tuple[int, ...] = ()
    """height and width of the network's input in pixels, or its longer side alone, when the other
    one follows the images; multiples of 32 (default: as trained)"""
    batch_size: int = 1
    """images per pass through the network"""
    precision: Precision = "32-true"
    """32-true, bf16-mixed or 16-mixed (autocast)"""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1 ..."""
    compile: bool = False
    """compile the network first, which takes a minute and, on a CPU, a C++ compiler"""
    track: bool = False
    """number the vehicles from frame to frame (needs supervision and trackers)"""
    bridge_dashes: bool = False
    """let lane lines go on over the gaps between dashes, where no lane pixel is"""
    show: bool = False
    """show the pictures in a window as they are made; q or Esc ends"""
    overlay: bool = True
    """write pictures or a video with all drawn in"""
    save_masks: bool = False
    """write masks as PNG: masks/drivable (0 background, 1 drivable, 2 alternative), masks/lane
    (0 or 255)"""
    max_frames: int = 0
    """stop after so many images (0: never)"""
    retries: int = 5
    """attempts in a row to open a camera or stream again that broke off"""
    name: str = ""
    """folder name of the results (default: predict and the time)"""
    runs_dir: Path = Path("runs")
    """folder that holds the runs"""
    overwrite: bool = False
    """empty an existing folder of that name"""

    def __post_init__(self) -> None:
        """Check ranges."""
        shares = dict.fromkeys(("conf", "iou", "lane_threshold"), (0, 1))
        counts = {"batch_size": (1, 2**20), "max_frames": (0, 2**62), "retries": (0, 2**20)}
        check_ranges("", self, shares | counts)
        if len(self.img_size) > 2:
            do = "name height and width, or the longer side"
            raise InputError("img_size", f"{len(self.img_size)} numbers", "one or two", do)


class Job(NamedTuple):
    """A batch on its way.

    Attributes:
        frames: what it is made of.
        batch: (B, 3, H, W) uint8.
        letterboxes: how each image lies in it.
    """

    frames: list[Frame]
    batch: Tensor
    letterboxes: list[Letterbox]


def predict(cfg: PredictConfig) -> Path:
    """The folder of the results.

    Reading, network and writing run at the same time, the network in the calling thread.

    Raises: InputError where source, weights or options are not what they should be; Interrupted
        after Ctrl-C, when all that was done until then is whole.
    """
    if cfg.show:
        check_window()
    source = open_source(cfg.source, retries=cfg.retries, say=say)
    try:
        if cfg.track and not source.is_video and source.total == 1:
            raise InputError("track", "one image", "a video or several images", "leave it out")
        tracker = Tracker(rate=source.rate, conf=cfg.conf) if cfg.track else None
        predictor = load(
            cfg.weights or None,
            device=cfg.device,
            precision=cfg.precision,
            img_size=cfg.img_size or None,
            conf=cfg.conf,
            iou=cfg.iou,
            lane_threshold=cfg.lane_threshold,
            bridge_dashes=cfg.bridge_dashes,
            compile=cfg.compile,
        )
        wanted = cfg.runs_dir / "yolop_mtl" / cfg.name
        if cfg.name and not cfg.overwrite and wanted.exists() and any(wanted.iterdir()):
            got, do = f"{cfg.name}, which exists as {wanted}", "use --overwrite to replace it"
            raise InputError("--name", got, "a new name", do)
        folder = open_run(
            "yolop_mtl", "predict", runs_dir=cfg.runs_dir, name=cfg.name, overwrite=cfg.overwrite
        )
        save_json(cfg, folder / "config.json")
        outputs = Outputs(
            folder,
            predictor,
            is_video=source.is_video,
            rate=source.rate,
            tracker=tracker,
            draws=cfg.overlay,
            shows=cfg.show,
            saves_masks=cfg.save_masks,
        )
        try:
            _run(cfg, source, predictor, outputs)
        except KeyboardInterrupt:
            kept = f"the same command; {outputs.count} images are done and kept in {folder}"
            raise Interrupted(kept) from None
    finally:
        source.close()
    return folder


def _run(cfg: PredictConfig, source: Source, predictor: Predictor, outputs: Outputs) -> None:
    """All frames through the three stages; says at the end what was done."""
    total = source.total
    if cfg.max_frames:
        total = cfg.max_frames if total is None else min(total, cfg.max_frames)
    with ExitStack() as stack:
        meter = Meter("predict", total)
        stack.callback(meter.close)
        source.say = meter.say
        stack.callback(outputs.close)
        behind = Behind(outputs.write, depth=DEPTH)
        stack.callback(behind.close)
        ahead = Ahead(lambda: _jobs(cfg, source, predictor), depth=DEPTH, is_live=source.is_live)
        stack.callback(ahead.close)
        stack.callback(source.close)
        done = 0
        for job in ahead:
            raw = predictor.forward(job.batch)
            behind.put((job.frames, job.letterboxes, raw))
            done += len(job.frames)
            meter.tick(len(job.frames))
            if cfg.show and _is_quit(outputs):
                break
            if done == cfg.max_frames:
                break
    _report(source, outputs, meter, ahead.dropped * cfg.batch_size)


def _jobs(cfg: PredictConfig, source: Source, predictor: Predictor) -> Iterator[Job]:
    """Frames in batches, ready for the network; the last batch may be smaller."""
    frames = source.frames()
    if cfg.max_frames and not source.is_live:
        frames = islice(frames, cfg.max_frames)
    while batch := list(islice(frames, cfg.batch_size)):
        pixels, letterboxes = predictor.prepare([frame.image for frame in batch])
        yield Job(batch, pixels, letterboxes)


def check_window() -> None:
    """Raise InputError where nothing can be shown: no display, or an OpenCV without windows."""
    is_linux = sys.platform.startswith("linux")
    if is_linux and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise InputError("show", "no display", "one (DISPLAY)", "leave --show out")
    if not cv2.currentUIFramework():
        do = "replace opencv-python-headless by opencv-python, or leave --show out"
        raise InputError("show", "an OpenCV without windows", "one with windows", do)


def _is_quit(outputs: Outputs) -> bool:
    """Show the latest picture; whether the user wants to end."""
    picture = outputs.latest
    if picture is not None:
        cv2.imshow(WINDOW, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return cv2.waitKey(1) & 0xFF in QUIT_KEYS


def _report(source: Source, outputs: Outputs, meter: Meter, dropped: int) -> None:
    what = "frame" if source.is_video else "image"
    what += "s" * (outputs.count != 1)
    parts = [f"{outputs.count} {what}, {meter.rate:.1f} per second, in {outputs.folder}"]
    if source.broken:
        parts.append(f"{source.broken} broken ones left out")
    if dropped:
        parts.append(f"{dropped} left out because the network is slower than the source")
    say("; ".join([*parts, *source.remarks, *outputs.remarks]))
