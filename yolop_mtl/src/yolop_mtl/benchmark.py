"""`yolop-mtl benchmark`: honest speed of the network and of what is around it, on this machine.

Everything that is compared runs in one process, side by side in turn, the matrix products that make
the machine's peak among it. A missed target is shown, never a failure.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table

from shared_utils.checkpoint import write_text
from shared_utils.errors import InputError
from yolop_mtl.bench_network import TARGET_SIZE, Case, network, network_rows
from yolop_mtl.bench_parts import predict_rows, training_rows
from yolop_mtl.config import check_ranges
from yolop_mtl.engines import Engine
from yolop_mtl.measure import Precision, Row, machine
from yolop_mtl.model import MAX_STRIDE

WIDTH = 190  # characters where there is no terminal
LEAST_REPEATS = 5
# Columns of the table of latencies: title, key and form.
LATENCY = (
    ("median ms", "median_ms", ".1f"),
    ("p90 ms", "p90_ms", ".1f"),
    ("images/s", "images_per_second", ".1f"),
    ("ms with post-processing", "with_postprocessing_ms", ".1f"),
    ("GFLOP/s", "gflops", ".0f"),
    ("of the peak", "peak_share", ".2f"),
)
SIDES = 2  # numbers that make a size


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Latency and throughput by preset, precision, engine, size and batch; prediction; loading.

    Weights are random, since time does not depend on them; what follows the network gets outputs
    with as many boxes, as much road and lane as a street has.
    """

    presets: tuple[Literal["release", "base", "small", "nano"], ...] = ("base", "small", "nano")
    """networks to measure"""
    precisions: tuple[Precision, ...] = ()
    """fp32, bf16, fp16 (default: fp32 and bf16, on a GPU fp16 too)"""
    engines: tuple[Engine, ...] = get_args(Engine)
    """what runs the network: torch as trained (eager), folded (fused), with channels last, packed
    for oneDNN, compiled (needs a C++ compiler on a CPU), onnxruntime, openvino"""
    img_size: tuple[int, ...] = TARGET_SIZE
    """height and width of the input in pixels, multiples of 32; more pairs for more sizes"""
    batch_sizes: tuple[int, ...] = ()
    """images of a pass (default: 1; on a GPU 1 and 32)"""
    suite: Literal["all", "network", "predict", "training"] = "all"
    """the network alone, prediction with it, loading and scenes, or all of them"""
    repeats: int = 9
    """timed rounds after the warm-up, at least 5"""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """what to run on"""
    output: Path = Path("bench/drive.json")
    """the JSON file to write"""

    def __post_init__(self) -> None:
        """Check counts and sizes."""
        check_ranges("", self, {"repeats": (LEAST_REPEATS, math.inf)})
        if not self.img_size or len(self.img_size) % SIDES:
            do = "give height and width, perhaps several times"
            raise InputError("img_size", f"{len(self.img_size)} numbers", "pairs", do)
        if any(side < MAX_STRIDE or side % MAX_STRIDE for side in self.img_size):
            expected = f"multiples of {MAX_STRIDE}"
            raise InputError("img_size", self.img_size, expected, "correct it")
        if any(size < 1 for size in self.batch_sizes):
            raise InputError("batch_sizes", self.batch_sizes, "1 or more each", "correct it")
        for name in ("presets", "engines"):
            if not getattr(self, name):
                raise InputError(name, "none", "one or more", "name one")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the inputs."""
        return list(zip(self.img_size[::SIDES], self.img_size[1::SIDES], strict=True))


def benchmark(cfg: BenchmarkConfig, **small: Any) -> dict[str, Any]:
    """Measure, print the table, write the JSON.

    Args:
        cfg: what to measure.
        **small: `matrix_sizes` of the peak's products, and `num_scenes`, `seconds`, `size` of
            `training_rows`, for a quick look.

    Returns: what the JSON holds: `machine`, `rows`, `latencies`, `skipped`.

    Raises: InputError where there is no such device, or the file cannot be written.
    """
    device = _choose(cfg.accelerator)
    is_gpu = device.type == "cuda"
    try:
        cfg.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("output", error, "a file that can be written", "name another") from error
    precisions = cfg.precisions or (("fp32", "bf16", "fp16") if is_gpu else ("fp32", "bf16"))
    rows: list[Row] = []
    latencies: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    matrix_sizes = small.pop("matrix_sizes", None)
    if cfg.suite in ("all", "network"):
        for size in cfg.sizes:
            for batch_size in cfg.batch_sizes or ((1, 32) if is_gpu else (1,)):
                for precision in precisions:
                    found = network_rows(
                        Case(precision, size, batch_size), cfg.presets, cfg.engines,
                        repeats=cfg.repeats, device=device, matrix_sizes=matrix_sizes,
                    )  # fmt: skip
                    rows += found.rows
                    latencies += found.latencies
                    skipped += found.skipped
    if cfg.suite in ("all", "predict"):
        preset = "base" if "base" in cfg.presets else cfg.presets[0]
        for size in cfg.sizes:
            for precision in precisions:
                has_targets = preset == "base" and size == TARGET_SIZE and not is_gpu
                rows += predict_rows(
                    network(preset), preset, size, precision,
                    repeats=cfg.repeats, device=device, has_targets=has_targets,
                )  # fmt: skip
    if cfg.suite in ("all", "training"):
        rows += training_rows(**small)
    if not is_gpu:
        reason = "measured on the CPU" if torch.cuda.is_available() else "no GPU that torch can use"
        for name in ("base, fp16, batch 32", "base, fp16, batch 1", "CUDA graphs, all networks"):
            skipped.append({"name": f"{name}, on a GPU", "reason": reason})
    report = {
        "machine": machine(device),
        "rows": [asdict(row) for row in rows],
        "latencies": latencies,
        "skipped": skipped,
    }
    write_text(json.dumps(report, indent=2) + "\n", cfg.output)
    _show(report, rows)
    return report


def _choose(accelerator: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise InputError("accelerator", "gpu", "a GPU that torch can use", "leave it out")
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")


def _show(report: dict[str, Any], rows: Sequence[Row]) -> None:
    """Latencies in a table of their own, then what compares, then what was left out."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if report["latencies"]:
        table = Table("network", "engine", title=f"YOLOPv2, {report['machine']}")
        for title, _, _ in LATENCY:
            table.add_column(title, justify="right")
        before = None
        for of in report["latencies"]:
            size = " x ".join(map(str, of["img_size"]))
            name = f"{of['preset']}, {of['precision']}, {size}, batch {of['batch_size']}"
            if before not in (None, name):
                table.add_section()
            before = name
            numbers = (f"{of[key]:{form}}" for _, key, form in LATENCY)
            table.add_row(name, of["engine"], *numbers)
        console.print(table)
    table = Table("benchmark", "value", "unit", "target", "", "detail")
    for r in rows:
        if r.unit != "ms":
            sign = "<=" if r.direction == "lower" else ">="
            told = "" if r.target is None else f"{sign} {r.target}"
            table.add_row(r.name, f"{r.value:.3f}", r.unit, told, r.verdict, r.detail)
    if table.row_count:
        console.print(table)
    for row in report["skipped"]:
        console.print(f"skipped: {row['name']}: {row['reason']}", markup=False, highlight=False)
