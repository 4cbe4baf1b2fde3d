"""Seconds of the parts of a repeated work, by clocks that wait for the device."""

import time

import torch


class Clock:
    """Adds up what the parts of batches take.

    The first batch, which also pays for starting up, is left out as soon as there is a second one.
    """

    def __init__(self, device: torch.device | str) -> None:
        """Start; work queued on `device` is waited for at every reading."""
        self.device = torch.device(device)
        self._sums: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._images = self._batches = 0
        self._last = self._now()

    def lap(self, part: str) -> None:
        """What was done since the last reading belongs to `part`."""
        now = self._now()
        self._sums[part] = self._sums.get(part, 0.0) + now - self._last
        self._last = now

    def end_batch(self, num_images: int) -> None:
        """A batch is done; what comes until the next reading belongs to the next one."""
        self._batches += 1
        if self._batches == 2:
            self._sums = {part: self._sums[part] - self._first[part] for part in self._sums}
            self._images = 0
        self._images += num_images
        if self._batches == 1:
            self._first = dict(self._sums)

    @property
    def ms_per_image(self) -> dict[str, float]:
        """Milliseconds per image of each part; empty before the end of a batch."""
        if not self._images:
            return {}
        return {part: 1e3 * seconds / self._images for part, seconds in self._sums.items()}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
