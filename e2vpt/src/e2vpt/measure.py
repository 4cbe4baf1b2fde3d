"""How benchmarks measure: sides in turn, medians, rows of a table, what machine it was.

Sides run in turn (A B A B ...) after a warm-up, and medians are compared, so that a slow moment of
the machine falls on both.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import timm
import torch

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    value: float
    unit: str
    target: float | None
    direction: Literal["lower", "higher"]
    detail: str

    @property
    def verdict(self) -> Literal["", "met", "MISSED"]:
        """Whether the target is met; empty where there is none."""
        if self.target is None:
            return ""
        over = self.value - self.target if self.direction == "lower" else self.target - self.value
        return "met" if over <= 0 else "MISSED"


def race(
    sides: Mapping[Any, Callable[[], object]], repeats: int, device: torch.device
) -> dict[Any, float]:
    """Median seconds of each side, run in turn after two warm-up rounds."""

    def timed(step: Callable[[], object]) -> float:
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    for _ in range(2):
        for step in sides.values():
            timed(step)
    rounds = [{name: timed(step) for name, step in sides.items()} for _ in range(repeats)]
    return {name: statistics.median(r[name] for r in rounds) for name in sides}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": date.today().isoformat(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
