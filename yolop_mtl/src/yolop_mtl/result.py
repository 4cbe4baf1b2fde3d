"""What was found in an image, in its own pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolop_mtl.draw import overlay
from yolop_mtl.geometry import Pixels
from yolop_mtl.lane_lines import find_lane_lines


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """Boxes, areas and lanes of an image of (h, w) pixels; None for a task the network lacks.

    Attributes:
        image: (h, w, 3) uint8 RGB, as it was given.
        class_names: of boxes, by number.
        boxes_xyxy: (n, 4) float32 pixels inside of the image, best first; none without the task.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64 class numbers.
        drivable: (h, w) bool, or None.
        drivable_class: (h, w) uint8, or None: 0 background, 1 drivable, 2 alternative, which is
            there where the network was trained on three classes.
        lanes: (h, w) bool, or None.
        track_ids: (n,) int64 numbers that stay with a vehicle from frame to frame, 0 where it has
            none; None where nothing is tracked.
        bridge_dashes: whether `lane_lines` go on over the gaps between dashes.
    """

    image: Pixels
    class_names: Sequence[str]
    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    drivable: NDArray[np.bool_] | None = None
    drivable_class: NDArray[np.uint8] | None = None
    lanes: NDArray[np.bool_] | None = None
    track_ids: NDArray[np.int64] | None = None
    bridge_dashes: bool = False

    @cached_property
    def lane_lines(self) -> list[NDArray[np.float32]]:
        """Each lane line as (m, 2) float32 points x, y; made when first asked for."""
        if self.lanes is None:
            return []
        return find_lane_lines(self.lanes, bridge_dashes=self.bridge_dashes)

    @property
    def names(self) -> list[str]:
        """The class's name of each box."""
        return [self.class_names[number] for number in self.labels]

    def plot(self, *, draw_lines: bool = False) -> Pixels:
        """The image with all that was found drawn over it.

        Args:
            draw_lines: `lane_lines` too, over the lanes' pixels.

        Returns: (h, w, 3) uint8 RGB.
        """
        return overlay(
            self.image,
            drivable=self.drivable,
            lane=self.lanes,
            lane_lines=self.lane_lines if draw_lines else (),
            boxes_xyxy=self.boxes_xyxy,
            labels=self.labels,
            scores=self.scores,
            track_ids=self.track_ids,
            class_names=self.class_names,
            is_explained=True,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: boxes and lane lines in pixels to a hundredth, without the masks."""
        height, width = self.image.shape[:2]
        found: dict[str, Any] = {
            "height": height,
            "width": width,
            "boxes_xyxy": _rounded(self.boxes_xyxy, 2),
            "scores": _rounded(self.scores, 4),
            "labels": self.labels.tolist(),
            "names": self.names,
        }
        if self.track_ids is not None:
            found["track_ids"] = self.track_ids.tolist()
        if self.drivable is not None:
            found["drivable_share"] = round(float(self.drivable.mean()), 4)
        if self.lanes is not None:
            found["lane_lines"] = [_rounded(line, 2) for line in self.lane_lines]
        return found


def _rounded(values: NDArray[np.float32], digits: int) -> list[Any]:
    rounded: list[Any] = values.astype(np.float64).round(digits).tolist()
    return rounded
