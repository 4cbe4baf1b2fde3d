"""`yolop-mtl synth`: a data set of generated driving scenes, written in BDD100K's form.

Roads with bends, lanes and markings; cars, buses, trucks and trains; towns and open country; by
day, at dusk and at night, dry and in rain. Boxes, lanes and areas are exact. Lanes are 8 pixels
wide at 1280 x 720 in training and validation alike: that BDD100K's masks have 8 and 2 is its own.

Below the folder: `images/SPLIT/*.jpg`, `labels/det_20/det_SPLIT.json` with boxes and polygons in
the form of 2020, `da_seg_annotations/SPLIT/*.png` (255 the own lane, 127 others) and
`ll_seg_annotations/SPLIT/*.png` (255 lanes) as YOLOP names its downloads, and `synth.json`, which
says what the scenes were made from.
"""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shared_utils.checkpoint import reading
from shared_utils.config import to_dict
from shared_utils.errors import InputError
from yolop_mtl.progress import show_progress
from yolop_mtl.synth_scene import Scene, compose

__all__ = ["Scene", "SynthConfig", "draw_scene", "generate"]

SPLITS = ("train", "val")
CARD = "synth.json"
FORM = 1  # raised when the same seed gives other scenes than before
LEAST = (120, 160)  # (H, W) of the smallest scene in which something can be seen
DRIVABLE_VALUES = np.array([0, 255, 127], dtype=np.uint8)  # background, own lane, others


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """Generate driving scenes with exact boxes and masks, in BDD100K's form."""

    out: Path = Path("data/synthetic")
    """folder to write; it appears when all is done"""
    num_train: int = 512
    """training scenes"""
    num_val: int = 64
    """validation scenes"""
    size: tuple[int, int] = (720, 1280)
    """height and width of a scene in pixels"""
    seed: int = 0
    """of every random choice; scenes of the same seed, split and number are the same"""
    num_workers: int = 2
    """scenes drawn at the same time"""
    overwrite: bool = False
    """replace what was generated there before"""

    def __post_init__(self) -> None:
        """Check counts and sizes."""
        for name in ("num_train", "num_val", "seed"):
            if getattr(self, name) < 0:
                raise InputError(name, getattr(self, name), "0 or more", "correct it")
        if not self.num_train + self.num_val:
            raise InputError("num_train and num_val", "0", "1 or more together", "correct one")
        if self.num_workers < 1:
            raise InputError("num_workers", self.num_workers, "1 or more", "correct it")
        if any(side < least for side, least in zip(self.size, LEAST, strict=True)):
            got = f"{self.size[0]} x {self.size[1]}"
            raise InputError("size", got, f"{LEAST[0]} x {LEAST[1]} pixels or more", "enlarge it")


def draw_scene(
    seed: int, index: int, size: tuple[int, int] = (720, 1280), *, split: str = "train"
) -> Scene:
    """The scene of a number.

    Args:
        seed: of the data set.
        index: of the scene in its split, from 0.
        size: (H, W) pixels.
        split: train or val; the same numbers of both are different scenes.

    Returns: image and labels; the same for the same arguments.
    """
    return compose(_random(seed, index, split), size)


def _random(seed: int, index: int, split: str) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), index])


def generate(config: SynthConfig) -> None:
    """Write the data set, whole or not at all; nothing where it is there already.

    Raises: InputError where the folder holds something else, or other scenes and `overwrite` does
        not say so.
    """
    card = {"form": FORM} | {
        key: value
        for key, value in to_dict(config).items()
        if key in ("num_train", "num_val", "size", "seed")
    }
    if config.out.exists() and not _may_write(config, card):
        return
    made = config.out.with_name(f".{config.out.name}.{os.getpid()}")
    shutil.rmtree(made, ignore_errors=True)
    try:
        for split, count in zip(SPLITS, (config.num_train, config.num_val), strict=True):
            if count:
                _write_split(made, split, count, config)
        (made / CARD).write_text(json.dumps(card) + "\n", encoding="utf-8")
        if config.out.exists():
            shutil.rmtree(config.out)
        os.replace(made, config.out)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise InputError("out", error, "a folder that can be written", "choose another") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _may_write(config: SynthConfig, card: dict[str, Any]) -> bool:
    """Whether the folder that exists is to be replaced; False where it holds these very scenes."""
    with reading(config.out / CARD, f"the {CARD} of generated scenes; name another folder"):
        found = json.loads((config.out / CARD).read_text(encoding="utf-8"))
    if found == card:
        return config.overwrite
    if not config.overwrite:
        odd = next(key for key in card if found.get(key) != card[key])
        got = f"{config.out} with {odd} {found.get(odd)}"
        raise InputError("out", got, f"{card[odd]}", "say --overwrite, or name another folder")
    return True


def _write_split(root: Path, split: str, count: int, config: SynthConfig) -> None:
    folders = [
        root / part / split for part in ("images", "da_seg_annotations", "ll_seg_annotations")
    ]
    for folder in (*folders, root / "labels/det_20"):
        folder.mkdir(parents=True, exist_ok=True)

    def write(index: int) -> dict[str, Any]:
        random = _random(config.seed, index, split)
        scene = compose(random, config.size)
        name = f"{split}-{index:06d}"
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(82, 96))]
        bgr = np.asarray(cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR), dtype=np.uint8)
        _write_image(folders[0] / f"{name}.jpg", bgr, quality)
        values = np.asarray(cv2.LUT(scene.drivable, _table(DRIVABLE_VALUES)), dtype=np.uint8)
        for folder, mask in zip(folders[1:], (values, scene.lane * np.uint8(255)), strict=True):
            _write_image(folder / f"{name}.png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        return {"name": f"{name}.jpg", "attributes": scene.attributes, "labels": scene.labels}

    with ThreadPoolExecutor(config.num_workers) as pool:
        frames = list(show_progress(_in_order(pool, write, count), count, f"{split} scenes"))
    text = "[\n" + ",\n".join(json.dumps(frame) for frame in frames) + "\n]\n"
    (root / f"labels/det_20/det_{split}.json").write_text(text, encoding="utf-8")


def _in_order(pool: ThreadPoolExecutor, work: Any, count: int) -> Iterator[dict[str, Any]]:
    """Results by number; what has not begun is dropped when the reader stops."""
    futures = [pool.submit(work, index) for index in range(count)]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _table(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    table = np.zeros(256, dtype=np.uint8)
    table[: len(values)] = values
    return table


def _write_image(path: Path, pixels: NDArray[np.uint8], options: list[int]) -> None:
    # Encoded here and written by Python, which raises where the disk is full; OpenCV would not.
    _, encoded = cv2.imencode(path.suffix, pixels, options)
    path.write_bytes(encoded.tobytes())
