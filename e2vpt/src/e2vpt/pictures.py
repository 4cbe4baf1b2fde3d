"""Pictures for people: confusion matrix and sheets of images with what the model says of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from e2vpt.data import ImageSet

SHEET_IMAGES = 32  # images on a sheet
MAX_NAMED_CLASSES = 30  # a larger confusion matrix has no room for names


def confusion(logits: Tensor, labels: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix: rows are true classes, columns predicted ones, cells are counts.

    Args:
        logits: (N, C) float.
        labels: (N,) int64.
        class_names: C names.
        path: the PNG to write.
    """
    c = len(class_names)
    counts = torch.bincount(labels * c + logits.argmax(1), minlength=c * c).view(c, c).numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(max(4.0, 0.45 * c + 2), 14.0)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    if c <= MAX_NAMED_CLASSES:
        rotation = 45 if max(map(len, class_names)) > 3 else 0
        # Names come from the user's folders: no mathtext in them, nor in the captions below.
        axes.set_xticks(range(c), class_names, rotation=rotation, ha="right", parse_math=False)
        axes.set_yticks(range(c), class_names, parse_math=False)
        for row, column in np.argwhere(counts):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
            )
    figure.savefig(path, dpi=110)


def predictions(images: ImageSet, logits: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draw a sheet of a labelled split: its wrong predictions first, the surest of them first.

    Args:
        images: the split.
        logits: (N, C) float, in its order.
        class_names: C names.
        path: the PNG to write.
    """
    probability, predicted = logits.softmax(1).max(1)
    labels = torch.tensor(images.labels)
    wrong = predicted != labels
    order = (wrong.float() + probability).argsort(descending=True)[:SHEET_IMAGES].tolist()
    captions = []
    for i in order:
        caption = f"{class_names[int(predicted[i])]} {float(probability[i]):.2f}"
        captions.append(caption + (f"\ntrue: {class_names[int(labels[i])]}" if wrong[i] else ""))
    title = f"{int(wrong.sum())} of {len(labels)} wrong; wrong ones (red) first"
    sheet([images.image(i) for i in order], captions, path, title, [bool(wrong[i]) for i in order])


def sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    path: Path,
    title: str,
    marked: Sequence[bool] | None = None,
) -> None:
    """Draw images in a grid of eight columns with a caption below each; marked ones in red."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.85 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(image, interpolation="nearest" if max(image.size) < 100 else "antialiased")
        axes.set_axis_off()
        colour = "crimson" if marked is not None and marked[i] else "black"
        axes.set_title(caption, fontsize=8, color=colour, y=-0.06, va="top", parse_math=False)
    figure.savefig(path, dpi=110)
