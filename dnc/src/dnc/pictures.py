"""Pictures of a run folder: confusion matrix, and the training images that sub-centroids are."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dnc.anchors import NONE, Anchors
from dnc.data import ImageSet

MOST_CLASSES = 40  # of a sheet that a person still looks through


def confusion(logits: Tensor, labels: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Counts of (true, predicted) class, rows normalised for the colour."""
    count = len(class_names)
    table = torch.zeros(count, count, dtype=torch.int64)
    table.index_put_((labels, logits.argmax(dim=1)), torch.ones_like(labels), accumulate=True)
    share = table / table.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(3 + 0.32 * count, 16)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if count <= MOST_CLASSES:
        ticks = range(count)
        axes.set_xticks(ticks, class_names, rotation=90)
        axes.set_yticks(ticks, class_names)
        for i, j in table.nonzero().tolist():
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, str(int(table[i, j])), ha="center", va="center", color=colour, size=7)
    figure.savefig(path, dpi=120)


def anchors(found: Anchors, images: ImageSet, class_names: Sequence[str], path: Path) -> None:
    """A row per class (the first ones, where there are many) with its K training images."""
    rows = min(len(class_names), MOST_CLASSES)
    columns = len(found.indices[0])
    wide = math.ceil(rows / 10)
    figure = Figure(figsize=(wide * (1.2 + columns), 0.4 + min(rows, 10)), layout="constrained")
    grid = figure.subplots(min(rows, 10), wide * columns, squeeze=False)
    for cell in grid.flat:
        cell.axis("off")
    for c in range(rows):
        for k, index in enumerate(found.indices[c]):
            axes: Any = grid[c % 10, c // 10 * columns + k]
            if index != NONE:
                axes.imshow(np.asarray(images.image(index)), interpolation="nearest")
                axes.set_title(f"{found.cosines[c][k]:.3f}", size=7, pad=2)
            if k == 0:
                name = class_names[c]
                axes.text(-0.15, 0.5, name, transform=axes.transAxes, ha="right", va="center")
    figure.savefig(path, dpi=120)
