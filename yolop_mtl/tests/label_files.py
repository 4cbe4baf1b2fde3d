"""One scene in BDD100K's label files of 2018 and of 2020."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BOXES = {
    "car": [100.5, 300.0, 220.0, 380.0],
    "truck": [400.0, 250.0, 620.0, 420.0],
    "person": [50.0, 320.0, 70.0, 380.0],
    "bus": [1200.0, 300.0, 1290.0, 400.0],  # beyond the right edge
}
ROAD = [[100.0, 700.0], [600.0, 400.0], [700.0, 400.0], [1200.0, 700.0]]
SIDE = [[0.0, 700.0], [500.0, 400.0], [600.0, 400.0], [100.0, 700.0]]
# Both edges of a painted line, one of them a curve.
LEFT = [[500.0, 700.0], [520.0, 600.0], [540.0, 500.0], [560.0, 400.0]]
RIGHT = [[530.0, 700.0], [548.0, 600.0], [564.0, 500.0], [575.0, 400.0]]
CONDITIONS = {"weather": "rainy", "scene": "city street", "timeofday": "night"}
NEW_NAMES = {"person": "pedestrian"}


def _sides(box: list[float]) -> dict[str, float]:
    return dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))


def scene_2018(name: str = "a") -> dict[str, Any]:
    def poly(points: list[list[float]], types: str) -> list[list[Any]]:
        return [[*point, kind] for point, kind in zip(points, types, strict=True)]

    style = {"direction": "parallel", "style": "solid"}
    objects: list[dict[str, Any]] = [
        {"category": category, "id": number, "attributes": {}, "box2d": _sides(box)}
        for number, (category, box) in enumerate(BOXES.items())
    ]
    objects += [
        {"category": "area/drivable", "id": 10, "attributes": {}, "poly2d": poly(ROAD, "LLLL")},
        {"category": "area/alternative", "id": 11, "attributes": {}, "poly2d": poly(SIDE, "LLLL")},
        {"category": "lane/single white", "attributes": style, "poly2d": poly(LEFT, "LCCC")},
        {"category": "lane/single white", "attributes": style, "poly2d": poly(RIGHT, "LLLL")},
    ]
    frames = [{"timestamp": 10000, "objects": objects}]
    return {"name": name, "frames": frames, "attributes": dict(CONDITIONS)}


def scene_2020(name: str = "a") -> dict[str, Any]:
    def poly(points: list[list[float]], types: str, closed: bool) -> list[dict[str, Any]]:
        return [{"vertices": points, "types": types, "closed": closed}]

    style = {"laneDirection": "parallel", "laneStyle": "solid"}
    labels: list[dict[str, Any]] = [
        {"id": str(number), "category": NEW_NAMES.get(category, category), "box2d": _sides(box)}
        for number, (category, box) in enumerate(BOXES.items())
    ]
    for points, kind in ((ROAD, "direct"), (SIDE, "alternative")):
        labels.append(
            {
                "category": "drivable area",
                "attributes": {"areaType": kind},
                "poly2d": poly(points, "LLLL", True),
            }
        )
    for points, types in ((LEFT, "LCCC"), (RIGHT, "LLLL")):
        labels.append(
            {"category": "single white", "attributes": style, "poly2d": poly(points, types, False)}
        )
    return {"name": f"{name}.jpg", "attributes": dict(CONDITIONS), "labels": labels}


def write_json(data: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_image(path: Path, values: object = 0, size: tuple[int, int] = (72, 128)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.broadcast_to(np.asarray(values, dtype=np.uint8), size)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)
    return path
