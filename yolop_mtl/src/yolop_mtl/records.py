"""What every reader of a data set gives: an image and where its labels are, checked.

An image may lack boxes or a mask; None says so, and is not the same as having none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_utils.errors import InputError, near_miss

# Names as in the 2020 files; older files call some of them otherwise.
RENAMED = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle"}
BDD_CLASSES = (
    "pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    "traffic light", "traffic sign",
)  # fmt: skip
BDD_DROPPED = ("other person", "other vehicle", "trailer")
VEHICLES = ("car", "bus", "truck", "train")
VEHICLE_CLASS: Mapping[str, tuple[str, ...]] = {"vehicle": VEHICLES}
ALL_BDD_CLASSES: Mapping[str, tuple[str, ...]] = {name: (name,) for name in BDD_CLASSES}


class Conditions(NamedTuple):
    """Under what an image was taken, in the label file's own words; "" where it does not say.

    BDD100K's words, `undefined` among them, are listed on its site.

    Attributes:
        weather: clear, rainy, ...
        scene: highway, city street, ...
        timeofday: daytime, night, dawn/dusk.
    """

    weather: str = ""
    scene: str = ""
    timeofday: str = ""


class Record(NamedTuple):
    """An image and its labels, in pixels of the image file.

    Attributes:
        image: file.
        boxes_xyxy: (T, 4) float32, inside the image; None where boxes are not labelled.
        labels: (T,) int64 class numbers; None with the boxes.
        drivable: mask file, or None.
        lane: mask file, or None.
        conditions: weather, scene and time of day.
    """

    image: Path
    boxes_xyxy: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None
    drivable: Path | None = None
    lane: Path | None = None
    conditions: Conditions = Conditions()


class Classes:
    """Class numbers of category names; several names may share a class.

    Attributes:
        names: of the classes, by number.
    """

    def __init__(self, members: Mapping[str, Sequence[str]], *, known: Sequence[str]) -> None:
        """Build.

        Args:
            members: per class the categories that belong to it.
            known: every category there may be; those of no class are dropped when read.

        Raises: InputError for no class, or a category unknown or in two classes.
        """
        if not members:
            raise InputError("classes", "none", "one or more", "name them")
        self.names = tuple(members)
        self._numbers: dict[str, int | None] = dict.fromkeys(known)
        for number, names in enumerate(members.values()):
            for name in names:
                if name not in self._numbers:
                    do = near_miss(name, self._numbers)
                    raise InputError("classes", f"'{name}'", "a known category", do)
                if self._numbers[name] is not None:
                    do = "name it once"
                    raise InputError("classes", f"'{name}' in two classes", "in one", do)
                self._numbers[name] = number

    def number(self, category: str, where: str) -> int | None:
        """The class of a category, None if dropped. Raises: InputError for an unknown one."""
        name = RENAMED.get(category, category) if category not in self._numbers else category
        if name not in self._numbers:
            do = near_miss(name, self._numbers)
            raise InputError(f"{where}: category", f"'{category}'", "a known one", do)
        return self._numbers[name]


def check_boxes(
    boxes_xyxy: Sequence[Sequence[float]], size: tuple[int, int] | None, where: str
) -> NDArray[np.float32]:
    """Boxes (T, 4), clipped to the image.

    Args:
        boxes_xyxy: pixels.
        size: (H, W) of the image; None leaves it unchecked.
        where: names the boxes' file in an error.

    Raises: InputError for a box that is inverted, has no area, or lies outside the image.
    """
    boxes = np.array(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    wrong = ~(np.isfinite(boxes).all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1))
    if wrong.any():
        box = boxes[wrong][0].tolist()
        do = "correct the label file"
        raise InputError(f"{where}: box", box, "x1 < x2 and y1 < y2, all finite", do)
    if size is not None:
        height, width = size
        limits = np.array([width, height, width, height], dtype=np.float64)
        clipped = boxes.clip(0, limits)
        outside = ~(clipped[:, :2] < clipped[:, 2:]).all(1)
        if outside.any():
            box, got = boxes[outside][0].tolist(), f"of {width} x {height} pixels"
            do = "correct the label file, or give the labels of this image"
            raise InputError(f"{where}: box", box, f"one that meets the image {got}", do)
        boxes = clipped
    return boxes.astype(np.float32)
