"""Scenes of handwritten digits on photographs, generated and written once in ADE20K's folder form.

Digits (scikit-learn's 8x8 handwritten ones) at random sizes, places and bright colours on darkened
crops of scikit-learn's two sample photographs; nothing is fetched. A digit is in training,
validation or test scenes and in no others; so is a part of a photograph, but that validation and
test share theirs.

Label images hold 0 where nothing counts (the blurred rim of a digit), 1 for the background and
2 to 11 for the digits 0 to 9: with `reduce_zero_label` these are classes 0 to 10 and the rim is
ignored. `boxes/training.json` and its like hold the same digits as boxes in COCO's form.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from shared_utils.checkpoint import reading, write_text
from shared_utils.errors import InputError

CLASSES = ("background", *"0123456789")
PALETTE = (
    (90, 90, 90), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
    (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212),
)  # fmt: skip
FOLDERS = {"train": "training", "val": "validation", "test": "test"}  # ADE20K's names
DIM, BRIGHT = 0.6, (160, 255)  # of photographs, and of each channel of a digit's colour
INK, RIM = 0.5, 0.15  # opacity from which a pixel is a digit, and from which it is not background
TRAIN_SHARE = 2 / 3  # of the digits, and of the width of the photographs; validation has half of
# the other digits
CARD = "scenes.json"
FORM = 2  # of the folder: 1 had neither validation scenes nor boxes
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """What is generated.

    Attributes:
        num_train: training scenes.
        num_val: validation scenes.
        num_test: test scenes.
        size: side of a scene, pixels.
        digits: fewest and most digits of a scene.
        sides: smallest and largest side of a digit, pixels.
        seed: of every random choice.
    """

    num_train: int = 600
    num_val: int = 60
    num_test: int = 120
    size: int = 128
    digits: tuple[int, int] = (2, 4)
    sides: tuple[int, int] = (40, 72)
    seed: int = 0


def write_scenes(root: Path, scenes: Scenes) -> None:
    """Generate the scenes below `root`, whole or not at all; nothing where they are there already.

    Raises: InputError where `root` holds something else.
    """
    card = json.loads(json.dumps(asdict(scenes) | {"form": FORM}))
    if root.exists():
        with reading(root / CARD, f"the {CARD} of generated scenes"):
            found = json.loads((root / CARD).read_text())
        if found != card:
            odd = next(key for key in card if found.get(key) != card[key])
            raise InputError(
                "data_root",
                f"{root} with {odd} {found.get(odd)}",
                f"{card[odd]}",
                "remove that folder, or name another one",
            )
        return
    made = root.with_name(f".{root.name}.{os.getpid()}")
    shutil.rmtree(made, ignore_errors=True)
    photographs = [np.asarray(photograph) for photograph in load_sample_images().images]
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(scenes.seed).permutation(len(labels))
    first = round(TRAIN_SHARE * len(order))
    second = (first + len(order)) // 2
    digits = {"train": order[:first], "val": order[first:second], "test": order[second:]}
    counts = {"train": scenes.num_train, "val": scenes.num_val, "test": scenes.num_test}
    (made / "boxes").mkdir(parents=True)
    for number, (split, folder) in enumerate(FOLDERS.items()):
        pictures, annotations = (made / part / folder for part in ("images", "annotations"))
        pictures.mkdir(parents=True)
        annotations.mkdir(parents=True)
        own = digits[split]
        cut = [_part(photograph, split) for photograph in photographs]
        made_scenes = []
        for i in range(counts[split]):
            random = np.random.default_rng([scenes.seed, number, i])
            scene = compose(random, images[own], labels[own], cut, scenes)
            Image.fromarray(scene.image).save(pictures / f"{i:05d}.jpg", quality=95)
            Image.fromarray(scene.annotation).save(annotations / f"{i:05d}.png")
            made_scenes.append(scene)
        write_text(json.dumps(coco_form(made_scenes)), made / "boxes" / f"{folder}.json")
    write_text(json.dumps(card) + "\n", made / CARD)
    try:
        os.rename(made, root)
    except OSError:  # another process was faster
        shutil.rmtree(made)
        if not (root / CARD).is_file():
            raise


class Composed(NamedTuple):
    """A scene: image (size, size, 3), label image (size, size), boxes (T, 4) xyxy, digits (T,)."""

    image: Bytes
    annotation: Bytes
    boxes: NDArray[np.int64]
    digits: NDArray[np.int64]


def compose(
    random: Generator,
    images: NDArray[Any],
    labels: NDArray[Any],
    photographs: Sequence[Bytes],
    scenes: Scenes,
) -> Composed:
    """One scene.

    Args:
        random: makes every choice.
        images: (N, 64) digits, 0 to 16.
        labels: (N,) 0 to 9.
        photographs: (H, W, 3) each, larger than a scene.
        scenes: sizes and counts.

    Returns: labels as in the module's text; boxes in pixels, around the ink as it was drawn, though
        a later digit may cover a tenth of it.
    """
    size = scenes.size
    photograph = photographs[int(random.integers(len(photographs)))]
    y, x = (int(random.integers(whole - size + 1)) for whole in photograph.shape[:2])
    scene = DIM * photograph[y : y + size, x : x + size].astype(np.float64)
    if random.random() < 0.5:
        scene = scene[:, ::-1]
    annotation = np.ones((size, size), np.uint8)
    taken: list[tuple[int, int, int]] = []
    found: list[tuple[int, ...]] = []
    for _ in range(int(random.integers(scenes.digits[0], scenes.digits[1] + 1))):
        side = int(random.integers(scenes.sides[0], scenes.sides[1] + 1))
        place = _free_place(random, size, side, taken)
        if place is None:
            continue
        taken.append((*place, side))
        which = int(random.integers(len(labels)))
        here = (slice(place[0], place[0] + side), slice(place[1], place[1] + side))
        opacity = _enlarged(images[which], side)
        colour = random.uniform(*BRIGHT, 3)
        scene[here] += opacity[..., None] * (colour - scene[here])
        annotation[here][opacity >= RIM] = 0
        annotation[here][opacity >= INK] = labels[which] + 2
        rows, columns = (np.flatnonzero((opacity >= INK).any(axis)) for axis in (1, 0))
        corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        found.append((*(c + place[1 - i % 2] for i, c in enumerate(corners)), labels[which]))
    boxes = np.array(found, np.int64).reshape(-1, 5)
    return Composed(scene.round().astype(np.uint8), annotation, boxes[:, :4], boxes[:, 4])


def coco_form(scenes: Sequence[Composed]) -> dict[str, list[dict[str, Any]]]:
    """The boxes of scenes as COCO's JSON has them; categories 0 to 9 are the digits."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, scene in enumerate(scenes):
        height, width = scene.image.shape[:2]
        name = f"{i:05d}.jpg"
        images.append({"id": i, "file_name": name, "height": height, "width": width})
        for box, digit in zip(scene.boxes.tolist(), scene.digits.tolist(), strict=True):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": digit,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES[1:])]
    return {"images": images, "annotations": annotations, "categories": categories}


@DATASETS.register_module()
class DigitScenes(BaseSegDataset):
    """The generated scenes as a data set of mmseg; made below `data_root` when first asked for."""

    METAINFO = {"classes": CLASSES, "palette": [list(colour) for colour in PALETTE]}  # noqa: RUF012

    def __init__(self, data_root: str, scenes: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Generate what is missing, then read.

        Args:
            data_root: folder of the scenes.
            scenes: fields of `Scenes` that differ from its defaults.
            **kwargs: of `BaseSegDataset`.
        """
        options: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in (scenes or {}).items()
        }
        write_scenes(Path(data_root), Scenes(**options))
        kwargs = {"img_suffix": ".jpg", "seg_map_suffix": ".png", **kwargs}
        super().__init__(data_root=data_root, **{"reduce_zero_label": True, **kwargs})


def _part(photograph: Bytes, split: str) -> Bytes:
    cut = round(TRAIN_SHARE * photograph.shape[1])
    return photograph[:, :cut] if split == "train" else photograph[:, cut:]


def _free_place(
    random: Generator, size: int, side: int, taken: Sequence[tuple[int, int, int]]
) -> tuple[int, int] | None:
    """Upper left corner of a square that covers no other by more than a tenth of itself."""
    for _ in range(30):
        y, x = (int(random.integers(size - side + 1)) for _ in range(2))
        overlaps = (
            max(0, min(y + side, v + other) - max(y, v))
            * max(0, min(x + side, u + other) - max(x, u))
            / min(side, other) ** 2
            for v, u, other in taken
        )
        if all(overlap <= 0.1 for overlap in overlaps):
            return y, x
    return None


def _enlarged(digit: NDArray[Any], side: int) -> NDArray[np.float64]:
    """(64,) 0 to 16 -> (side, side) opacity 0 to 1, with an empty margin of a tenth."""
    margin = np.pad(digit.reshape(8, 8), 1)
    small = Image.fromarray((margin * (255 / 16)).astype(np.uint8))
    large = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.float64)
    return np.clip(large / 160, 0, 1)
