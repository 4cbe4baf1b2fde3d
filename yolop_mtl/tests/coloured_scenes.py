"""Scenes whose colours are their labels: red boxes, green area, blue lines, on black."""

from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from yolop_mtl.lanes import Area, draw_areas, draw_lines
from yolop_mtl.records import Record
from yolop_mtl.samples import Sample

SIZE = (720, 1280)


@cache
def scene(seed: int, size: tuple[int, int] = SIZE, *, num_boxes: int = 2) -> Sample:
    """Boxes above, an area lower left, lines 8 pixels wide lower right. Not to be changed."""
    rng = np.random.default_rng(seed)
    height, width = size
    image = np.zeros((*size, 3), dtype=np.uint8)
    boxes = []
    for number in range(num_boxes):
        # Each has its own part of the upper half, and a gap to the next.
        left = width * (number + rng.uniform(0.05, 0.3)) / num_boxes
        right = left + width * rng.uniform(0.3, 0.6) / num_boxes
        top, bottom = height * rng.uniform(0.05, 0.15), height * rng.uniform(0.25, 0.4)
        boxes.append([round(x) for x in (left, top, right, bottom)])
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2, 0] = 255
    x, y = width * rng.uniform(0.05, 0.15), height * rng.uniform(0.5, 0.6)
    points = np.array([[x, 0.95 * height], [1.5 * x, y], [0.4 * width, y], [0.5 * width, 700]])
    drivable = draw_areas([Area(points.clip(0, [width, height]), False)], size)
    ends = rng.uniform(0.6, 0.9, 3) * width
    lines = [
        np.array([[x, 0.55 * height], [x + rng.uniform(-50, 50), 0.95 * height]]) for x in ends
    ]
    lane = draw_lines(lines, size, width=8)
    image[..., 1], image[..., 2] = 255 * drivable, 255 * lane
    image[..., 1][lane > 0] = 0
    return Sample(
        image,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.arange(len(boxes), dtype=np.int64) % 2,
        drivable,
        lane,
    )


def empty(size: tuple[int, int] = SIZE) -> Sample:
    """A black image labelled with nothing in it."""
    return scene(0, size, num_boxes=0)._replace(
        image=np.zeros((*size, 3), dtype=np.uint8),
        drivable=np.zeros(size, dtype=np.uint8),
        lane=np.zeros(size, dtype=np.uint8),
    )


def unlabelled(sample: Sample) -> Sample:
    return Sample(sample.image)


def write(folder: Path, name: str, sample: Sample) -> Record:
    """The files of a scene; masks as YOLOP's."""
    files = {kind: folder / f"{name}_{kind}.png" for kind in ("image", "drivable", "lane")}
    Image.fromarray(sample.image).save(files["image"])
    Image.fromarray(sample.drivable * np.uint8(255)).save(files["drivable"])
    Image.fromarray(sample.lane * np.uint8(255)).save(files["lane"])
    return Record(
        files["image"], sample.boxes_xyxy, sample.labels, files["drivable"], files["lane"]
    )


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """IoU of masks; 1 where both are empty."""
    union = (first | second).sum()
    return 1.0 if not union else float((first & second).sum() / union)


def check_labels_are_colours(sample: Sample) -> None:
    """Masks equal the colours; each box hugs its red region and each region has its box."""
    red, green, blue = np.moveaxis(sample.image > 127, 2, 0)
    assert overlap(green, sample.drivable == 1) > 0.98
    assert overlap(blue, sample.lane == 1) > 0.9
    _, _, regions, _ = cv2.connectedComponentsWithStats(red.astype(np.uint8))
    found = [(x, y, x + w, y + h) for x, y, w, h, _ in regions[1:].tolist()]
    rest = list(found)
    for box in sample.boxes_xyxy:
        best = max(found, key=lambda region: box_overlap(box, region))
        # A box cut to few pixels is right to one of them; larger ones overlap.
        assert box_overlap(box, best) > 0.9 or np.abs(box - best).max() <= 1, (box, best)
        rest.remove(best)
    # Without a box are slivers only: cut off, or thin.
    assert all(min(x2 - x1, y2 - y1) < 16 for x1, y1, x2, y2 in rest), rest


def box_overlap(first: np.ndarray, second: tuple[int, ...]) -> float:
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    shared = sides.clip(0).prod()
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (first, second)]
    return float(shared / (sum(areas) - shared))
