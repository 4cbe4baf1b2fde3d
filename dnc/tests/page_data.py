"""Explanations of made-up images, for the tests of the page."""

import io
from typing import Any

import numpy as np
from PIL import Image

from dnc.page import Anchor, Explanation

Classes = list[tuple[str, tuple[Anchor, ...]]]
TITLE, ABOUT = "Why these images", "Made up, three classes of two training images."


def png(seed: int = 0, width: int = 8, height: int = 8) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def anchor(class_index: int, centroid: int, cosine: float, **fields: Any) -> Anchor:
    """Training image 10 c + k of class `abc`[c]."""
    index = 10 * class_index + centroid
    given: dict[str, Any] = {
        "class_name": "abc"[class_index],
        "index": index,
        "path": f"train/{index}.png",
        "image": png(index),
    }
    return Anchor(class_index=class_index, centroid=centroid, cosine=cosine, **{**given, **fields})


def explain(
    cosines: list[list[float]], true_class: str | None = None, **fields: Any
) -> Explanation:
    """The explanation that follows from the cosines (C, K) to all anchors.

    Of `fields`, `class_name` and `path` hold for all anchors, the others for the explanation.
    """
    of_anchor = {k: v for k, v in fields.items() if k in ("class_name", "path")}
    rows = [
        sorted((anchor(c, k, s, **of_anchor) for k, s in enumerate(row)), key=lambda a: -a.cosine)
        for c, row in enumerate(cosines)
    ]
    rows.sort(key=lambda row: -row[0].cosine)
    own, rivals = rows[0], [row[0] for row in rows[1:]]
    given: dict[str, Any] = {
        "image": png(99),
        "source": "new/image.png",
        "probability": 0.87,
        "flips_without": tuple(a for a in own if a.cosine >= rivals[0].cosine),
        "flips_to": rivals[0].class_name,
    }
    given |= {k: v for k, v in fields.items() if k not in of_anchor}
    return Explanation(
        predicted=own[0],
        rivals=tuple(rivals),
        own=tuple(own),
        margin=own[0].cosine - rivals[0].cosine,
        true_class=true_class,
        **given,
    )


def all_classes(num_centroids: int = 2, **fields: Any) -> Classes:
    """The three classes with their anchors."""
    rows = [tuple(anchor(c, k, 0.0, **fields) for k in range(num_centroids)) for c in range(3)]
    return [(row[0].class_name, row) for row in rows]
