"""Numbers that stay with a vehicle from frame to frame: ByteTrack on supervision's detections."""

from dataclasses import replace

import numpy as np

from shared_utils.errors import InputError
from yolop_mtl.result import Result

HIGH = 0.5  # score of boxes that tracks begin with and that are matched first
LOST_SECONDS = 1.0  # that a vehicle may be hidden


class Tracker:
    """Tracks of one video; results have to come in the order of its frames."""

    def __init__(self, *, rate: float, conf: float) -> None:
        """Begin without tracks.

        Args:
            rate: frames per second.
            conf: least score of the boxes to come.

        Raises: InputError where the libraries are not installed.
        """
        try:
            import supervision
            from trackers import ByteTrackTracker
        except ImportError as error:
            # With its dependencies trackers would replace the headless OpenCV, see pyproject.toml.
            do = "run: uv pip install supervision; uv pip install --no-deps trackers"
            expected = "supervision and trackers"
            raise InputError("track", f"no {error.name}", expected, do) from error
        self._detections = supervision.Detections
        self._tracker = ByteTrackTracker(
            frame_rate=rate,
            lost_track_buffer=max(1, round(LOST_SECONDS * rate)),
            track_activation_threshold=max(HIGH, conf),
            high_conf_det_threshold=max(HIGH, conf),
            minimum_consecutive_frames=2,
        )

    def update(self, result: Result) -> Result:
        """The result of the next frame, with `track_ids`: from 1, and 0 for boxes of no track."""
        count = len(result.scores)
        boxes = self._detections(
            xyxy=result.boxes_xyxy,
            confidence=result.scores,
            class_id=result.labels,
            data={"row": np.arange(count)},
        )
        tracked = self._tracker.update(boxes)
        ids = np.zeros(count, dtype=np.int64)
        if count:
            ids[np.asarray(tracked.data["row"])] = np.asarray(tracked.tracker_id) + 1
        return replace(result, track_ids=ids)
