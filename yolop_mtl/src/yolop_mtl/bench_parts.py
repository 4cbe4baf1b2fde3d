"""Rows of the benchmark: what is around the network, in prediction and in training."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from yolop_mtl import bdd100k
from yolop_mtl.augment_config import AugmentConfig
from yolop_mtl.bench_scene import Street, make_street
from yolop_mtl.config import DataConfig
from yolop_mtl.config import Precision as FabricPrecision
from yolop_mtl.measure import Precision, Row, Times, race
from yolop_mtl.model import TASKS, YOLOPv2
from yolop_mtl.predictor import Predictor
from yolop_mtl.progress import say
from yolop_mtl.records import VEHICLE_CLASS, Classes
from yolop_mtl.synth import SynthConfig, draw_scene, generate
from yolop_mtl.throughput import loader_throughput

POST_SHARE, WHOLE_RATIO = 0.10, 1.5  # of the network's time, at most
LOADER_RATE, SCENE_RATE = 20.0, 20.0  # a second of a core, at least
NATIVE = (720, 1280)  # (H, W) of camera images
TRAIN_SIZE = (640, 640)
JPEG_QUALITY = 90
NAMES: dict[Precision, FabricPrecision] = {
    "fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed",
}  # fmt: skip


class Prediction:
    """`Predictor` on a camera image, cut into parts; what follows the network gets a real street.

    Attributes:
        predictor: with the network that is measured.
        street: scene and the outputs that a trained network would give.
    """

    def __init__(
        self,
        model: YOLOPv2,
        img_size: tuple[int, int],
        precision: Precision,
        device: torch.device,
        *,
        batch_size: int = 1,
        native: tuple[int, int] = NATIVE,
    ) -> None:
        """Make a network ready, which is changed, and draw the street."""
        head = cast(Any, model.detection)
        self.street = make_street(head.anchors, head.num_classes, img_size, native)
        self.predictor = Predictor(
            model, class_names=tuple(f"class {n}" for n in range(head.num_classes)),
            img_size=img_size, device=device, precision=NAMES[precision],
        )  # fmt: skip
        self.images = [self.street.scene.image] * batch_size
        self.batch, self.letterboxes = self.predictor.prepare(self.images)
        self.raw = _repeated(self.street, batch_size, device)

    def network(self) -> Any:
        """The forward pass, from bytes on the CPU."""
        return self.predictor.forward(self.batch)

    def finish(self) -> Any:
        """Boxes, suppression, masks in native pixels."""
        return self.predictor.finish(self.raw, self.letterboxes, self.images)

    def whole(self, path: Path) -> NDArray[np.uint8]:
        """All of it for one file: decode, letterbox, network, suppression, masks, overlay."""
        from yolop_mtl.pixels import to_rgb

        pixels = to_rgb(path)
        batch, letterboxes = self.predictor.prepare([pixels])
        self.predictor.forward(batch)
        (result,) = self.predictor.finish(self.raw, letterboxes, [pixels])
        return result.plot()


def _repeated(street: Street, count: int, device: torch.device) -> dict[str, Any]:
    def repeat(x: Tensor) -> Tensor:
        return x.expand(count, *x.shape[1:]).contiguous().to(device)

    masks = {name: repeat(street.raw[name]) for name in ("drivable", "lane")}
    return {"detection": [repeat(x) for x in street.raw["detection"]], **masks}


def predict_rows(
    model: YOLOPv2,
    preset: str,
    img_size: tuple[int, int],
    precision: Precision,
    *,
    repeats: int,
    device: torch.device,
    has_targets: bool,
) -> list[Row]:
    """What post-processing and the whole of prediction take, in the network's time.

    Args:
        model: unfused, is changed.
        preset: its name.
        img_size: (H, W) of its input.
        precision: of the network.
        repeats: timed rounds.
        device: to run on.
        has_targets: whether the rows are to reach something.
    """
    parts = Prediction(model, img_size, precision, device)
    height, width = img_size
    what = f"{preset}, {precision}, {height} x {width}"
    say(f"{what}: prediction in parts")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "street.jpg"
        Image.fromarray(parts.street.scene.image).save(path, quality=JPEG_QUALITY)
        times = race(
            {
                "network": parts.network,
                "postprocessing": parts.finish,
                "predict": lambda: parts.whole(path),
            },
            repeats,
            device,
        )
    scene = parts.street
    after = f"{scene.num_fired} boxes above 0.3 for {len(scene.scene.categories)} vehicles, "
    after += f"masks at {NATIVE[1]} x {NATIVE[0]}"
    network = times["network"].median
    return [
        Row(
            f"{what}: post-processing / network",
            times["postprocessing"].median / network,
            "ratio",
            POST_SHARE if has_targets else None,
            "lower",
            f"{_ms(times['postprocessing'])} / {_ms(times['network'])}; {after}",
        ),
        Row(
            f"{what}: whole predict / network",
            times["predict"].median / network,
            "ratio",
            WHOLE_RATIO if has_targets else None,
            "lower",
            f"{_ms(times['predict'])} / {_ms(times['network'])}; decode a JPEG of {NATIVE[1]} x "
            f"{NATIVE[0]}, letterbox, network, {after}, overlay",
        ),
    ]


def _ms(times: Times) -> str:
    return f"{times.median * 1e3:.1f} ms"


def training_rows(
    *, num_scenes: int = 8, seconds: float = 10.0, size: tuple[int, int] = NATIVE,
    img_size: tuple[int, int] = TRAIN_SIZE,
) -> list[Row]:  # fmt: skip
    """Samples that a core prepares and scenes that it draws in a second.

    Args:
        num_scenes: generated and read.
        seconds: of processor time for each row, at least.
        size: (H, W) of the scenes.
        img_size: (H, W) of the training samples.
    """
    say("training samples and scenes")
    with TemporaryDirectory() as folder:
        root = Path(folder) / "scenes"
        generate(SynthConfig(out=root, num_train=num_scenes, num_val=0, size=size))
        classes = Classes(VEHICLE_CLASS, known=bdd100k.CATEGORIES)
        records = bdd100k.load_records(root, "train", classes, size=size)
        data = DataConfig(source="synthetic", root=root, img_size=img_size, scene_size=size)
        rate = loader_throughput(
            records, data, AugmentConfig(mosaic=1.0), tasks=TASKS, seconds=seconds
        )
    drawn = per_core_second(
        [lambda index=index: draw_scene(0, index, size) for index in range(num_scenes)],  # type: ignore[misc]
        seconds,
    )
    native = f"{size[1]} x {size[0]}"
    return [
        Row(
            "training samples per core-second, mosaic", rate, "1/s", LOADER_RATE, "higher",
            f"{img_size[0]} x {img_size[1]} from JPEGs of {native}, all tasks, one thread",
        ),
        Row(
            "generated scenes per core-second", drawn, "1/s", SCENE_RATE, "higher",
            f"{native} with labels and masks, one thread, not written",
        ),
    ]  # fmt: skip


def per_core_second(steps: Sequence[Callable[[], object]], seconds: float) -> float:
    """Steps per second of processor time on one thread; each is taken once before."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        for step in steps:
            step()
        count, start = 0, time.process_time()
        while (spent := time.process_time() - start) < seconds or not count:
            for step in steps:
                step()
            count += len(steps)
        return count / spent
    finally:
        cv2.setNumThreads(threads)
