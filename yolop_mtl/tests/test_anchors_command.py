"""The command `anchors`: sizes in the letterboxed image, their axes, and what it prints."""

import json
from pathlib import Path

import numpy as np
import pytest

from yolop_mtl.anchors_command import AnchorsConfig, read_sizes, run_anchors
from yolop_mtl.config import DataConfig

from .label_files import write_image, write_json


def wide_data(root: Path, *, size: tuple[int, int] = (720, 1280)) -> DataConfig:
    """Boxes twice as wide as high, of all sizes, in a few images."""
    random = np.random.default_rng(0)
    frames = []
    for number in range(6):
        name = f"{number}.jpg"
        write_image(root / "images/train" / name, 90, size)
        labels = []
        for _ in range(30):
            height = float(random.uniform(10, 200))
            box = {"x1": 20.0, "y1": 30.0, "x2": 20 + 2 * height, "y2": 30 + height}
            labels.append({"category": "car", "box2d": box})
        labels.append({"category": "person", "box2d": {"x1": 0, "y1": 0, "x2": 5, "y2": 90}})
        frames.append({"name": name, "labels": labels})
    write_json(frames, root / "labels/det_20/det_train.json")
    return DataConfig(root=root, img_size=(384, 640))


def test_sizes_are_those_in_the_input(tmp_path: Path) -> None:
    sizes = read_sizes(wide_data(tmp_path))
    assert sizes.shape == (180, 2)
    assert np.allclose(sizes[:, 0], 2 * sizes[:, 1])
    assert 5 <= sizes[:, 1].min() < sizes[:, 1].max() <= 100  # half of the image's


def test_the_size_of_each_image_counts(tmp_path: Path) -> None:
    data = wide_data(tmp_path, size=(720, 1280))
    large = read_sizes(data)
    write_image(tmp_path / "images/train/0.jpg", 90, (1440, 2560))
    sizes = read_sizes(data)
    assert np.allclose(sizes[:30], large[:30] / 2)
    assert np.allclose(sizes[30:], large[30:])


def test_anchors_of_wide_boxes_are_wide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AnchorsConfig(data=wide_data(tmp_path), num_steps=50, json=tmp_path / "anchors.json")
    anchors = run_anchors(config)
    table = np.array(anchors)
    assert table.shape == (3, 3, 2)
    assert np.allclose(table[..., 0] / table[..., 1], 2, rtol=0.15)
    said = capsys.readouterr().out
    numbers = " ".join(f"{number:g}" for number in table.ravel().tolist())
    assert f"--model.anchors explicit --model.anchor-sizes {numbers}" in said
    assert "180 boxes of 180" in said
    written = json.loads((tmp_path / "anchors.json").read_text())
    assert (written["anchors"], written["img_size"]) == (anchors, [384, 640])
    assert written["recall"] == 1.0
    assert run_anchors(AnchorsConfig(data=config.data, num_steps=50)) == anchors


def test_boxes_of_ones_own_data(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/a.png", 90, (100, 200))
    images = [{"id": 1, "file_name": "a.png", "height": 100, "width": 200}]
    boxes = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10 + 9 * n, 5 + 4 * n]}
        for n in range(12)
    ]
    data = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "van"}]}
    write_json(data, tmp_path / "annotations/train.json")
    config = DataConfig(root=tmp_path, source="coco", classes="all", img_size=(320, 640))
    assert np.allclose(read_sizes(config)[:2], [[32, 16], [60.8, 28.8]])
    assert np.array(run_anchors(AnchorsConfig(data=config, num_steps=0))).shape == (3, 3, 2)


def test_wrong_input(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/a.jpg")
    with pytest.raises(
        ValueError, match=r"data\.root: got no image of 'train' in .* with labelled"
    ):
        run_anchors(AnchorsConfig(data=DataConfig(root=tmp_path)))
    write_json([{"name": "a.jpg", "labels": []}], tmp_path / "labels/det_20/det_train.json")
    with pytest.raises(
        ValueError, match=r"data\.classes: got 'vehicle', of which 'train' has no box"
    ):
        run_anchors(AnchorsConfig(data=DataConfig(root=tmp_path)))
    for fields, message in (
        ({"num_steps": -1}, "num_steps: got -1"),
        ({"min_size": -1.0}, "min_size: got -1.0"),
        ({"seed": -1}, "seed: got -1"),
        ({"json": tmp_path / "no/a.json"}, r"json: got '.*a\.json' in a folder that is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            AnchorsConfig(**fields)  # type: ignore[arg-type]
