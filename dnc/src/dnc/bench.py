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
from shared_utils.errors import InputError

STATUS = Path("/proc/self/status")  # Linux
LEAST_REPEATS = 5
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

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("batch_size", 0), ("repeats", LEAST_REPEATS)):
            if getattr(self, name) < least:
                raise InputError(name, getattr(self, name), f"{least} or more", "raise it")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large what is measured is: networks, what is clustered, what is fitted."""

    encoder: str = "resnet50"
    img_size: int = 224
    num_classes: int = 1000
    num_samples: int = 65_536
    num_centroids: int = 4
    fit_samples: int = 50_000
    fit_dim: int = 512
    fit_classes: int = 100


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


def clustering_sides(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """`loop` and `segmented`: the plan of random similarities (N, K), all classes."""
    generator = torch.Generator().manual_seed(0)
    shape = sizes.num_samples, sizes.num_centroids
    similarity = (torch.rand(shape, generator=generator) * 2 - 1).to(device)
    labels = torch.randint(sizes.num_classes, shape[:1], generator=generator).to(device)
    return {
        "loop": lambda: loop_sinkhorn(similarity, labels, sizes.num_classes),
        "segmented": lambda: sinkhorn(similarity, labels, sizes.num_classes),
    }


def build(kind: Kind, sizes: Sizes, device: torch.device) -> nn.ModuleDict:
    """The encoder under one head, weights random (time does not depend on them)."""
    torch.manual_seed(0)
    encoder = build_encoder(sizes.encoder, img_size=sizes.img_size)
    head: nn.Module
    if kind == "softmax":
        head = SoftmaxHead(sizes.num_classes, encoder.embed_dim)
    else:
        head = NearestCentroidHead(sizes.num_classes, encoder.embed_dim, sizes.num_centroids)
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


def inference(model: nn.ModuleDict, images: Tensor) -> Callable[[], Tensor]:
    """Logits in eval mode; the model is put back into the mode of training."""

    def step() -> Tensor:
        model.eval()
        with torch.no_grad():
            logits: Tensor = model["head"](model["encoder"](images))
        model.train()
        return logits

    return step


def fit_sides(sizes: Sizes) -> dict[str, Callable[[], Tensor]]:
    """`fit`, sub-centroids (C, K, D) of features in batches, and `means`, one (C, D) of all."""
    generator = torch.Generator().manual_seed(0)
    count, dim, num_classes = sizes.fit_samples, sizes.fit_dim, sizes.fit_classes
    features = torch.randn(count, dim, generator=generator)
    labels = torch.randint(num_classes, (count,), generator=generator)

    def fit() -> Tensor:
        fitter = CentroidFitter(num_classes, dim, sizes.num_centroids)
        for part, own in zip(features.split(1000), labels.split(1000), strict=True):
            fitter.add(part, own)
        return fitter.finish()[0]

    def means() -> Tensor:
        sums = torch.zeros(num_classes, dim).index_add(0, labels, F.normalize(features, dim=1))
        return sums / labels.bincount(minlength=num_classes)[:, None]

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


def peak_memory(kind: Kind, sizes: Sizes, batch_size: int, device: torch.device) -> int:
    """Peak bytes of three train steps.

    On a CPU each side runs in a process of its own, as memory that was once held is not given back.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _three_steps(kind, sizes, batch_size, device)
        return torch.cuda.max_memory_allocated()
    return peak_of_process("dnc.bench", kind, json.dumps(asdict(sizes)), str(batch_size))


def peak_of_process(module: str, *words: str) -> int:
    """Bytes that a module prints as its own peak, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


def _three_steps(kind: Kind, sizes: Sizes, batch_size: int, device: torch.device) -> None:
    step = train_step(build(kind, sizes, device), *random_batch(sizes, batch_size, device))
    for _ in range(3):
        step()


def random_batch(sizes: Sizes, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) of noise and labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, sizes.img_size, sizes.img_size, generator=generator)
    labels = torch.randint(sizes.num_classes, (batch_size,), generator=generator)
    return images.to(device), labels.to(device)


def ratio(
    name: str,
    sides: Mapping[Kind, Callable[[], object]],
    target: float,
    what: str,
    repeats: int,
    device: torch.device,
) -> Row:
    """The row of dnc's time over softmax's."""
    seconds = race(sides, repeats, device)
    ours, theirs = seconds["dnc"], seconds["softmax"]
    told = f"dnc {ours * 1e3:.1f} ms, softmax {theirs * 1e3:.1f} ms; {what}"
    return Row(name, ours / theirs, "ratio", target, "lower", told)


def clustering_row(sizes: Sizes, repeats: int, device: torch.device) -> Row:
    """How many times faster all classes at once are than a loop over them."""
    seconds = race(clustering_sides(sizes, device), repeats, device)
    told = f"segmented {seconds['segmented']:.3f} s, loop {seconds['loop']:.3f} s; "
    told += f"N {sizes.num_samples}, C {sizes.num_classes}, K {sizes.num_centroids}, fp32"
    speedup = seconds["loop"] / seconds["segmented"]
    return Row("balanced clustering: loop / ours", speedup, "ratio", 10, "higher", told)


def fit_row(sizes: Sizes, repeats: int) -> Row:
    """What a fit takes beyond twice the time of the class means."""
    seconds = race(fit_sides(sizes), repeats, torch.device("cpu"))
    over = seconds["fit"] - 2 * seconds["means"]
    told = f"fit {seconds['fit']:.2f} s, means {seconds['means']:.2f} s; {sizes.fit_samples:,} x "
    told += f"{sizes.fit_dim}, {sizes.fit_classes} classes, K {sizes.num_centroids}, fp32"
    return Row("fit: seconds over twice the class means", over, "s", 5, "lower", told)


def rows_of(
    cfg: BenchConfig, sizes: Sizes, device: torch.device
) -> tuple[list[Row], list[dict[str, str]]]:
    """All rows that this machine can measure, and the name and reason of those it cannot."""
    batch_size = cfg.batch_size or (256 if device.type == "cuda" else 16)
    skipped: list[dict[str, str]] = []
    if device.type != "cuda":
        skipped.append({"name": "all rows on a GPU", "reason": "no GPU that torch can use"})
    rows = [clustering_row(sizes, cfg.repeats, device)]
    images, labels = random_batch(sizes, batch_size, device)
    kinds: tuple[Kind, Kind] = ("dnc", "softmax")
    models = {kind: build(kind, sizes, device) for kind in kinds}
    what = f"{sizes.encoder}, {sizes.img_size} px, {sizes.num_classes} classes, "
    what += f"batch {batch_size}, fp32"
    steps = {kind: train_step(model, images, labels) for kind, model in models.items()}
    name = "train step: dnc / softmax"
    rows.append(ratio(name, steps, 1.05, f"{what}, queue of 64", cfg.repeats, device))
    calls = {kind: inference(model, images) for kind, model in models.items()}
    rows.append(ratio("inference: dnc / softmax", calls, 1.01, what, cfg.repeats, device))
    del models, steps, calls
    name = "peak memory of a train step: dnc more than softmax"
    if device.type == "cuda" or STATUS.is_file():
        peak = {kind: peak_memory(kind, sizes, batch_size, device) for kind in kinds}
        more = (peak["dnc"] - peak["softmax"]) / 2**30
        told = f"dnc {peak['dnc'] / 2**30:.2f} GiB, softmax {peak['softmax'] / 2**30:.2f} GiB; "
        rows.append(Row(name, more, "GiB", 0.5, "lower", told + what))
    else:
        skipped.append({"name": name, "reason": f"no {STATUS} to read it from"})
    rows.append(fit_row(sizes, cfg.repeats))
    if cfg.segmentation:
        from dnc.mmseg.bench import seg_rows

        rows += seg_rows(cfg.repeats, device)
    else:
        skipped.append({"name": "all rows on segmentation", "reason": "no --segmentation"})
    return rows, skipped


def bench(cfg: BenchConfig, sizes: Sizes | None = None) -> None:
    """Measure, print the table, write the JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, skipped = rows_of(cfg, sizes or Sizes(), device)
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
    sized = Sizes(**json.loads(asked[1]))
    print_peak(lambda: _three_steps(asked[0], sized, int(asked[2]), torch.device("cpu")))
