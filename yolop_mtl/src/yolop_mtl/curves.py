"""Curves of an evaluation as PNG: precision over recall, figures over confidence and threshold."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from yolop_mtl.box_metrics import BoxCurves
from yolop_mtl.mask_metrics import DEFAULT, LaneCurve

# Line styles beside colours: legible in grey, too.
STYLES = (("#0072b2", "-"), ("#e69f00", "--"), ("#009e73", "-."), ("#cc79a7", ":"))
MOST_POINTS = 2000  # of a curve; more cannot be seen


def draw_box_curves(curves: BoxCurves, class_names: Sequence[str], path: Path) -> None:
    """Precision over recall of every class at IoU 0.5, and the figures over confidence.

    Args:
        curves: of `box_metrics`.
        class_names: by number.
        path: PNG file.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    drawn = [c for c in range(len(class_names)) if not np.isnan(curves.ap50[c])]
    for place, number in enumerate(drawn):
        color, style = STYLES[place % len(STYLES)]
        label = f"{class_names[number]}, AP50 {curves.ap50[number]:.3f}"
        left.plot(curves.recall, curves.precision[number], style, color=color, label=label)
    _frame(left, "recall", "precision", "boxes, IoU 0.5")
    step = max(1, len(curves.confidence) // MOST_POINTS)
    names = ("precision", "recall", "F1")
    for (color, style), name, row in zip(STYLES, names, curves.at_confidence, strict=False):
        right.plot(curves.confidence[::step], row[::step], style, color=color, label=name)
    best, f1 = curves.confidence[curves.best], curves.at_confidence[2, curves.best]
    right.plot(best, f1, "ko", label=f"F1 {f1:.3f} at {best:.3f}")
    _frame(right, "confidence", "", "all classes together")
    figure.savefig(path, dpi=120)


def draw_lane_curve(curve: LaneCurve, path: Path) -> None:
    """Lane figures over the threshold of probability, with the best one marked."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = (
        ("precision", curve.precision),
        ("recall", curve.recall),
        ("F1", curve.f1),
        ("IoU", curve.IoU),
    )
    for (color, style), (name, values) in zip(STYLES, rows, strict=True):
        axes.plot(curve.threshold, values, style, color=color, label=name)
    best = int(curve.IoU.argmax())
    label = f"IoU {curve.IoU[best]:.3f} at {curve.threshold[best]:.2f}"
    axes.plot(curve.threshold[best], curve.IoU[best], "ko", label=label)
    axes.axvline(curve.threshold[DEFAULT], color="0.6", linewidth=0.8)
    _frame(axes, "threshold", "", "lanes")
    figure.savefig(path, dpi=120)


def _frame(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set(xlabel=x, ylabel=y, title=title, xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
