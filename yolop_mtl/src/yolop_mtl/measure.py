"""How the benchmark measures: sides in turn, medians, a machine's matrix peak, rows of a table.

Sides run in turn (A B A B ...) after a warm-up, and medians are compared, so that a slow moment of
the machine falls on all of them.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
CPU_SIZES, GPU_SIZES = (1024, 1536, 2048), (4096, 8192)  # of the square matrices behind the peak
WARM_UPS = 2


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


class Times(NamedTuple):
    """Seconds of one side: the middle, and what nine of ten rounds stay below."""

    median: float
    p90: float


def race(
    sides: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Times]:
    """Seconds of each side, run in turn after two warm-up rounds."""

    def timed(step: Callable[[], object]) -> float:
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    for _ in range(WARM_UPS):
        for step in sides.values():
            timed(step)
    rounds = [{name: timed(step) for name, step in sides.items()} for _ in range(repeats)]
    return {
        name: Times(
            statistics.median(r[name] for r in rounds),
            float(np.quantile([r[name] for r in rounds], 0.9)),
        )
        for name in sides
    }


def matrix_sides(
    precision: Precision, device: torch.device, sizes: Sequence[int] | None = None
) -> dict[str, Callable[[], object]]:
    """Products of large square matrices, for `race`; `matrix_peak` reads their times."""
    sizes = sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)
    sides: dict[str, Callable[[], object]] = {}
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        one, other = (
            torch.randn(size, size, generator=generator).to(device, DTYPES[precision])
            for _ in range(2)
        )

        def multiply(one: torch.Tensor = one, other: torch.Tensor = other) -> torch.Tensor:
            return one @ other

        sides[f"matrix {precision} {size}"] = multiply
    return sides


def matrix_peak(times: Mapping[str, Times], precision: Precision) -> float:
    """The most operations a second that a product of `matrix_sides` reached, by its median."""
    start = f"matrix {precision} "
    rates = {
        name: 2 * int(name.removeprefix(start)) ** 3 / of.median
        for name, of in times.items()
        if name.startswith(start)
    }
    return max(rates.values())


def count_flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Operations of one pass, two for a multiplication with an addition, as torch counts them.

    A network on the meta device is counted without computing anything.
    """
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(shape, device=next(model.parameters()).device))
    return int(counter.get_total_flops())


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "date": date.today().isoformat(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
