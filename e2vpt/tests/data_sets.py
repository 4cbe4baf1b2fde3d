"""Tiny data sets of every layout, and what `load_data` finds in them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from e2vpt.config import DataConfig
from e2vpt.data import DataSplits, ImageSet, load_data

COLORS = {"ant": (250, 0, 0), "bee": (0, 250, 0), "cat": (0, 0, 250)}
CHECKPOINT = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def load(source: Path | str, seed: int = 0, **options: object) -> DataSplits:
    cfg = DataConfig(source=str(source), **options)  # type: ignore[arg-type]
    return load_data(cfg, img_size=(8, 8), seed=seed, **CHECKPOINT)


def write_classes(folder: Path, per_class: int = 3, names: Sequence[str] = tuple(COLORS)) -> Path:
    """A folder per class; image i of a class has the grey level i added to its colour."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            color = tuple(min(255, value + i) for value in COLORS.get(name, (9, 9, 9)))
            Image.new("RGB", (8, 8), color).save(folder / name / f"{i:03d}.png")
    return folder


def write_csv(path: Path, rows: Sequence[Sequence[str]], header: str = "path,label") -> None:
    with path.open("w", newline="") as file:
        file.write(header + "\n")
        csv.writer(file).writerows(rows)


def write_packed(path: Path, labels: Sequence[int], classes: Sequence[str] = tuple(COLORS),
                 **changes: object) -> Path:  # fmt: skip
    """A packed file whose image i is grey of level i."""
    parts = []
    for i in range(len(labels)):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (i % 256,) * 3).save(file, "PNG")
        parts.append(file.getvalue())
    arrays = {
        "jpeg": np.frombuffer(b"".join(parts), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, parts)]),
        "label": np.array(labels, dtype=np.int16),
        "classes": np.array(classes),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return path


def color_of(images: ImageSet, index: int) -> tuple[int, ...]:
    return images.image(index).getpixel((0, 0))  # type: ignore[return-value]


def counts(found: DataSplits) -> tuple[int, int, int]:
    train, val, test = (len(s) if s else 0 for s in (found.train, found.val, found.test))
    return train, val, test


def paths(images: ImageSet | None) -> set[str]:
    return {images.path(i) for i in range(len(images))} if images else set()
