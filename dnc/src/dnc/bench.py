"""Time and memory against a softmax head and a loop over classes: ratios, both in one process.

Sides run in turn (A B A B ...) after a warm-up, and medians are compared, so that a slow moment of
the machine falls on both. A missed target is shown, never a failure.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from dnc.assignment import sinkhorn
from dnc.classifier import NearestCentroidHead
from dnc.encoders import build_encoder
from dnc.fitter import CentroidFitter
from dnc.heads import SoftmaxHead

STATUS = Path("/proc/self/status")  # Linux
NUM_CLASSES, IMG_SIZE = 1000, 224
Kind = Literal["dnc", "softmax"]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Clustering against a loop, and ResNet-50 under sub-centroids against softmax."""

    output: Path = Path("bench/dnc.json")
    """the JSON file to write"""
    batch_size: int = 0
    """images per step (0: 16 on a CPU, 256 on a GPU)"""
    repeats: int = 7
    """timed rounds after the warm-up, at least 5"""
    segmentation: bool = False
    """FCN and UPerNet at 512 pixels too: many minutes on a CPU"""


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
    def verdict(self) -> str:
        """Whether the target is met; empty where there is none."""
        if self.target is None:
            return ""
        over = self.value - self.target if self.direction == "lower" else self.target - self.value
        return "met" if over <= 0 else "MISSED"


def loop_sinkhorn(
    similarity: Tensor, labels: Tensor, num_classes: int, epsilon: float = 0.05, num_iters: int = 3
) -> Tensor:
    """The same plan class by class: what `dnc.sinkhorn` is measured against."""
    plan = torch.zeros_like(similarity)
    for c in range(num_classes):
        own = (labels == c).nonzero()[:, 0]
        if not len(own):
            continue
        log_plan = similarity[own] / epsilon
        for _ in range(num_iters):
            log_plan = log_plan - log_plan.logsumexp(dim=0, keepdim=True)
            log_plan = log_plan + torch.tensor(len(own) / similarity.shape[1]).log()
            log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True)
        plan[own] = log_plan.exp()
    return plan


def clustering_sides(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """`segmented` and `loop`, for 65,536 samples of 1000 classes with 4 sub-centroids."""
    generator = torch.Generator().manual_seed(0)
    similarity = (torch.rand(65536, 4, generator=generator) * 2 - 1).to(device)
    labels = torch.randint(NUM_CLASSES, (65536,), generator=generator).to(device)
    return {
        "segmented": lambda: sinkhorn(similarity, labels, NUM_CLASSES),
        "loop": lambda: loop_sinkhorn(similarity, labels, NUM_CLASSES),
    }


def build(kind: Kind, device: torch.device) -> nn.ModuleDict:
    """ResNet-50 under one head, weights random (time does not depend on them)."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet50", img_size=IMG_SIZE)
    head: nn.Module
    if kind == "softmax":
        head = SoftmaxHead(NUM_CLASSES, encoder.embed_dim)
    else:
        head = NearestCentroidHead(NUM_CLASSES, encoder.embed_dim)
    return nn.ModuleDict({"encoder": encoder, "head": head}).to(device)


def train_step(model: nn.ModuleDict, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A whole step: loss, backward, SGD, sub-centroids."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    head: Any = model["head"]

    def step() -> None:
        loss = sum(head.loss(model["encoder"](images), labels).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        head.update()

    return step


def inference(model: nn.ModuleDict, images: Tensor) -> Callable[[], None]:
    """Logits in eval mode."""

    def step() -> None:
        model.eval()
        with torch.no_grad():
            model["head"](model["encoder"](images))
        model.train()

    return step


def fit_sides() -> dict[str, Callable[[], Any]]:
    """`fit` and `means` of 50,000 features of width 512 in 100 classes."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50_000, 512, generator=generator)
    labels = torch.randint(100, (50_000,), generator=generator)

    def fit() -> Tensor:
        fitter = CentroidFitter(100, 512, 4)
        for part, own in zip(features.split(1000), labels.split(1000), strict=True):
            fitter.add(part, own)
        return fitter.finish()[0]

    def means() -> Tensor:
        sums = torch.zeros(100, 512).index_add(0, labels, F.normalize(features, dim=1))
        return sums / labels.bincount(minlength=100)[:, None]

    return {"fit": fit, "means": means}


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


def peak_memory(kind: Kind, batch_size: int, device: torch.device) -> int:
    """Peak bytes of three train steps.

    On a CPU each side runs in a process of its own, as memory that was once held is not given back.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _three_steps(kind, batch_size, device)
        return torch.cuda.max_memory_allocated()
    return peak_of_process("dnc.bench", kind, str(batch_size))


def peak_of_process(module: str, *words: str) -> int:
    """Bytes that a module prints as its own peak, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


def _three_steps(kind: Kind, batch_size: int, device: torch.device) -> None:
    step = train_step(build(kind, device), *_batch(batch_size, device))
    for _ in range(3):
        step()


def _batch(batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, IMG_SIZE, IMG_SIZE, generator=generator)
    labels = torch.randint(NUM_CLASSES, (batch_size,), generator=generator)
    return images.to(device), labels.to(device)


def rows_of(cfg: BenchConfig, device: torch.device) -> list[Row]:
    """All rows that this machine can measure."""
    batch_size = cfg.batch_size or (256 if device.type == "cuda" else 16)
    rows: list[Row] = []

    def ratio(
        name: str, sides: Mapping[Any, Callable[[], object]], target: float, what: str
    ) -> None:
        seconds = race(sides, cfg.repeats, device)
        (one, a), (other, b) = seconds.items()
        told = f"{one} {a * 1e3:.1f} ms, {other} {b * 1e3:.1f} ms; {what}"
        rows.append(Row(name, a / b, "ratio", target, "lower", told))

    sides = clustering_sides(device)
    seconds = race(sides, cfg.repeats, device)
    detail = f"{seconds['segmented']:.3f} s, {seconds['loop']:.3f} s; N 65536, C 1000, K 4, fp32"
    speedup = seconds["loop"] / seconds["segmented"]
    rows.append(Row("balanced clustering: loop / ours", speedup, "ratio", 10, "higher", detail))
    images, labels = _batch(batch_size, device)
    models: dict[Kind, nn.ModuleDict] = {kind: build(kind, device) for kind in ("dnc", "softmax")}
    what = f"ResNet-50, {IMG_SIZE} px, 1000 classes, batch {batch_size}, fp32"
    steps = {kind: train_step(model, images, labels) for kind, model in models.items()}
    ratio("train step: dnc / softmax", steps, 1.05, f"{what}, queue of 64")
    calls = {kind: inference(model, images) for kind, model in models.items()}
    ratio("inference: dnc / softmax", calls, 1.01, what)
    del models, steps, calls
    if device.type == "cuda" or STATUS.is_file():
        peak = {kind: peak_memory(kind, batch_size, device) for kind in ("dnc", "softmax")}
        more = (peak["dnc"] - peak["softmax"]) / 2**30
        told = f"{peak['dnc'] / 2**30:.2f} GiB, {peak['softmax'] / 2**30:.2f} GiB; {what}"
        name = "peak memory of a train step: dnc more than softmax"
        rows.append(Row(name, more, "GiB", 0.5, "lower", told))
    found = race(fit_sides(), cfg.repeats, torch.device("cpu"))
    over = found["fit"] - 2 * found["means"]
    told = f"{found['fit']:.2f} s, {found['means']:.2f} s; 50,000 x 512, 100 classes, K 4, fp32"
    rows.append(Row("fit: seconds over twice the class means", over, "s", 5, "lower", told))
    return rows


def bench(cfg: BenchConfig) -> None:
    """Measure, print the table, write the JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = rows_of(cfg, device)
    skipped = []
    if not cfg.segmentation:
        skipped.append({"name": "all rows on segmentation", "reason": "no --segmentation"})
    else:
        from dnc.mmseg.bench import seg_rows

        rows += seg_rows(cfg.repeats, device)
    if device.type != "cuda":
        skipped.append({"name": "all rows on a GPU", "reason": "no GPU that torch can use"})
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": date.today().isoformat(),
    }
    cfg.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "rows": [asdict(row) for row in rows], "skipped": skipped}
    cfg.output.write_text(json.dumps(report, indent=2) + "\n")
    table = Table("benchmark", "value", "target", "", "detail", title=f"DNC, {machine}")
    for r in rows:
        sign = "<=" if r.direction == "lower" else ">="
        told = "" if r.target is None else f"{sign} {r.target}"
        table.add_row(r.name, f"{r.value:.3f}", told, r.verdict, r.detail)
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def print_peak(steps: Callable[[], None]) -> None:
    """Print the bytes that this process grows by while it takes some steps."""
    before = _resident("VmRSS")
    steps()
    print(_resident("VmHWM") - before)


def _resident(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {name}")


if __name__ == "__main__":  # a side of `peak_memory`
    asked: Any = sys.argv[1:]
    print_peak(lambda: _three_steps(asked[0], int(asked[1]), torch.device("cpu")))
