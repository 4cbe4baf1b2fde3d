"""Figures apart for weather, scene and time of day, as the label files name them."""

from collections.abc import Sequence
from typing import NamedTuple

from yolop_mtl.evaluate import ImageResult, summarize
from yolop_mtl.records import Conditions, Record


class ConditionFigures(NamedTuple):
    """Figures of the images that were taken under one condition.

    Attributes:
        attribute: weather, scene or timeofday.
        value: what the label files say, such as `rainy`.
        num_images: those of the condition that were evaluated.
        metrics: as of `summarize`.
    """

    attribute: str
    value: str
    num_images: int
    metrics: dict[str, float]


def by_condition(
    images: Sequence[ImageResult], records: Sequence[Record], num_classes: int
) -> list[ConditionFigures]:
    """The figures of every condition that some image has, the most frequent ones first.

    Legacy figures are averages over batches of 32 of the condition's own images.

    Args:
        images: in the order of the split, of all processes.
        records: of the whole split, by the images' numbers.
        num_classes: of boxes.

    Returns: nothing where the label files name no condition.
    """
    found = []
    for attribute in Conditions._fields:
        groups: dict[str, list[ImageResult]] = {}
        for image in images:
            value = getattr(records[image.number].conditions, attribute)
            if value:
                groups.setdefault(value, []).append(image)
        for value in sorted(groups, key=lambda name: (-len(groups[name]), name)):
            part = groups[value]
            metrics = summarize(part, num_classes).metrics
            found.append(ConditionFigures(attribute, value, len(part), metrics))
    return found
