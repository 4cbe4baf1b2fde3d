"""Pictures for people: confusion matrix, sheets of images with what the model says, prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from e2vpt.data import ImageSet

SHEET_IMAGES = 32  # images on a sheet
MAX_NAMED_CLASSES = 30  # a larger confusion matrix has no room for names
MIN_PLACES = 6  # on an axis of numbers, so that the bar of a single prompt is none
VISUAL, KV, REMOVED = "tab:blue", "tab:orange", "silver"
SCORE = "mean |∂loss / ∂mask|"
BESIDE_TITLE: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 0.98),
    "frameon": False,
    "fontsize": 8,
    "handlelength": 1.2,
}


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


def prompts(report: Mapping[str, Any], name: str, path: Path) -> None:
    """Draw what the prompts of a run are worth: attention they get, importance, segments.

    Layers, prompts and segments are numbered from 1.

    Args:
        report: the content of `prompts.json`, see `prompt_report`.
        name: of the run.
        path: the PNG to write.
    """
    attention, importance, pruned = (report[k] for k in ("attention", "importance", "pruned_by"))
    heights = [2.6] if importance is None else [2.6, 2.1, 2.3]  # inches
    height = sum(heights) + 0.7 * len(heights) + 0.3
    figure = Figure(figsize=(9, height))
    FigureCanvasAgg(figure)
    title = f"{name}: prompts on {report['images']} images ({report['split']})"
    figure.suptitle(title, y=1 - 0.1 / height, va="top", fontsize=11, parse_math=False)
    # Places by hand: matplotlib's own layout would draw everything twice.
    rows = figure.add_gridspec(
        len(heights),
        1,
        height_ratios=heights,
        left=0.12,
        right=0.87,
        bottom=0.45 / height,
        top=1 - 0.55 / height,
        hspace=0.7 * len(heights) / sum(heights),
    )
    _attention(figure.add_subplot(rows[0]), attention)
    if importance is not None:
        by_layer = pruned is not None and isinstance(pruned["tokens"][0], list)
        scores = importance["tokens"] if pruned is None else pruned["tokens"]
        _importance(figure.add_subplot(rows[1]), np.array(scores), pruned)
        kept = None if pruned is None or by_layer else np.array(pruned["kept"])
        _segments(figure.add_subplot(rows[2]), importance, kept, np.shape(scores)[-1])
    figure.savefig(path, dpi=110)


def _attention(axes: Axes, shares: Mapping[str, Sequence[float]]) -> None:
    """Stacked bars per layer, and beside them, pale, what an even spread would give."""
    kinds = [
        (label, 100 * np.array(shares[kind]), 100 * np.array(shares[f"uniform_{kind}"]), colour)
        for kind, label, colour in (("visual", "visual", VISUAL), ("kv", "key-value", KV))
        if any(shares[f"uniform_{kind}"])
    ]
    x = np.arange(1, len(shares["visual"]) + 1)
    below, below_even = np.zeros(len(x)), np.zeros(len(x))
    for label, share, even, colour in kinds:
        axes.bar(x - 0.12, share, 0.5, below, color=colour, label=f"{label} prompts")
        axes.bar(
            x + 0.27, even, 0.22, below_even, color=colour, alpha=0.35, label="if spread evenly"
        )
        below, below_even = below + share, below_even + even
    axes.set(xlabel="layer", ylabel="share of attention, %")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title("Attention to prompts", loc="left", fontsize=10)
    axes.legend(**BESIDE_TITLE, ncols=2 * len(kinds))
    _number(axes, len(x))


def _importance(axes: Axes, scores: np.ndarray, pruned: Mapping[str, Any] | None) -> None:
    """Bars of scores (P,), or a map of scores (L, P); what was pruned is grey."""
    title, label = "Importance of visual prompts", SCORE
    kept = np.ones(scores.shape, dtype=bool)
    if pruned is not None:
        title = "Importance by which visual prompts were pruned"
        if pruned["signed"]:
            label = "mean ∂loss / ∂mask"
        if pruned["random"]:
            title, label = "Random numbers by which visual prompts were pruned", "random number"
        kept[:] = False
        np.put_along_axis(kept, np.array(pruned["kept"]), True, axis=-1)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("visual prompt")
    legend = {VISUAL: "kept", REMOVED: "removed"}
    if pruned is not None:
        patches = [Patch(color=colour, label=label) for colour, label in legend.items()]
        axes.legend(handles=patches, **BESIDE_TITLE, ncols=2)
    if scores.ndim == 1:
        axes.bar(np.arange(1, len(scores) + 1), scores, color=np.where(kept, VISUAL, REMOVED))
        axes.set_ylabel(label)
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    else:
        _map(axes, scores, kept, label)
        axes.set_ylabel("layer")
    _number(axes, scores.shape[-1])


def _segments(
    axes: Axes, importance: Mapping[str, Any], kept: np.ndarray | None, num_prompts: int
) -> None:
    """A map of prompts and their segments; where prompts were pruned, at their old places."""
    scores = np.array(importance["segments"])  # (P, R), or (L, P, R)
    left = np.ones(scores.shape, dtype=bool)
    if importance["kept_segments"] is not None:
        left[:] = importance["kept_segments"]
    title = "Importance of their segments"
    if scores.ndim == 3:
        title += ", mean over layers, prompts as they are numbered in each"
        counts = left.sum(axis=0)
        scores, left = (scores * left).sum(axis=0) / np.maximum(counts, 1), counts > 0
    places = np.arange(len(scores))
    if kept is not None and len(kept) == len(scores):
        places = kept
    elif kept is None:
        num_prompts = len(scores)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlabel="visual prompt", ylabel="segment")
    if not left.all() or len(places) < num_prompts:
        patch = Patch(color=REMOVED, label="removed")
        axes.legend(handles=[patch], **BESIDE_TITLE)
    values, shown = (np.zeros((scores.shape[1], num_prompts)) for _ in range(2))
    values[:, places], shown[:, places] = scores.T, left.T
    _map(axes, values, shown > 0, SCORE)
    _number(axes, num_prompts)


def _map(axes: Axes, values: np.ndarray, shown: np.ndarray, label: str) -> None:
    """Cells (rows, columns) from 1 on, those that are not shown grey, with a colour bar."""
    rows, columns = values.shape
    place: dict[str, Any] = {
        "extent": (0.5, columns + 0.5, rows + 0.5, 0.5),
        "aspect": "auto",
        "interpolation": "nearest",
    }
    grey = ListedColormap([REMOVED])
    axes.imshow(np.ma.masked_array(np.zeros_like(values), shown), cmap=grey, **place)
    image = axes.imshow(
        np.ma.masked_array(values, ~shown), cmap="Blues", vmin=min(0.0, values.min()), **place
    )
    beside = axes.inset_axes((1.01, 0, 0.015, 1))
    axes.figure.colorbar(image, cax=beside, label=label, format="{x:.3g}")
    axes.set_yticks(_ticks(rows, 8))


def _number(axes: Axes, count: int) -> None:
    """An axis of `count` places, from 1 on."""
    axes.set_xlim(0.4, max(count, MIN_PLACES) + 0.6)
    axes.set_xticks(_ticks(count, 25))


def _ticks(count: int, most: int) -> list[int]:
    """Numbers 1 to `count`; where these are too many, every second, or 1 and multiples of 5, ..."""
    steps = (10**power * digit for power in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if count <= most * step)
    return list(range(1, count + 1, step)) if step < 5 else [1, *range(step, count + 1, step)]
