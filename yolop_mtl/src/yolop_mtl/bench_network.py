"""Rows of the benchmark: the network alone, by preset, precision, engine, size and batch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from yolop_mtl.bench_parts import Prediction
from yolop_mtl.engines import ABOUT, Engine, UnavailableError, build_engine
from yolop_mtl.measure import (
    Precision,
    Row,
    Times,
    count_flops,
    matrix_peak,
    matrix_sides,
    race,
)
from yolop_mtl.model import YOLOPv2, build_model, fuse
from yolop_mtl.progress import say

# What a CPU is to reach at this size, one image at a time.
TARGET_SIZE, TARGET_BATCH = (384, 640), 1
PEAK_SHARE: Mapping[Precision, float] = {"fp32": 0.80, "bf16": 0.40}
AFTER = "post-processing"
SPEEDUP: Mapping[str, float] = {"small": 4.0, "nano": 12.0}  # in fp32, base's time over theirs


class Case(NamedTuple):
    """What one race is about."""

    precision: Precision
    img_size: tuple[int, int]
    batch_size: int

    def __str__(self) -> str:
        height, width = self.img_size
        return f"{self.precision}, {height} x {width}, batch {self.batch_size}"


class Entry(NamedTuple):
    """A network under an engine, and what was measured.

    Attributes:
        preset: of the network.
        engine: that ran it.
        times: of a batch.
        rate: operations a second.
        share: of the matrix peak.
        after: seconds of the post-processing of the same batch.
    """

    preset: str
    engine: Engine
    times: Times
    rate: float
    share: float
    after: float


class Found(NamedTuple):
    """Rows, their figures as plain data, and what could not be measured."""

    rows: list[Row]
    latencies: list[dict[str, Any]]
    skipped: list[dict[str, str]]


def network(preset: str) -> YOLOPv2:
    """A network with random weights for one class, in eval mode."""
    torch.manual_seed(0)
    return build_model(preset, num_classes=None if preset == "release" else 1).eval()


def network_rows(
    case: Case,
    presets: Sequence[str],
    engines: Sequence[Engine],
    *,
    repeats: int,
    device: torch.device,
    matrix_sizes: Sequence[int] | None = None,
) -> Found:
    """Race all engines and presets of a case, the matrix products among them.

    Args:
        case: precision, size and batch.
        presets: of networks.
        engines: to run them with.
        repeats: timed rounds.
        device: to run on.
        matrix_sizes: of the products; None: `measure`'s.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(case.batch_size, 3, *case.img_size, generator=generator).to(device)
    sides: dict[str, Any] = dict(matrix_sides(case.precision, device, matrix_sizes))
    # The same for every network of one class: outputs have the same shapes.
    sides[AFTER] = Prediction(
        network("nano"), case.img_size, case.precision, device, batch_size=case.batch_size
    ).finish
    skipped = []
    places: dict[str, tuple[str, Engine]] = {}
    flops: dict[str, int] = {}
    for preset in presets:
        model = network(preset)
        for engine in engines:
            name = f"{preset}, {case}, {engine}"
            say(f"{name}: preparing")
            try:
                sides[name] = build_engine(engine, model, images, case.precision)
            except UnavailableError as error:
                skipped.append({"name": name, "reason": str(error)})
                continue
            places[name] = (preset, engine)
        folded = fuse(model, completely=True).to("meta")
        flops[preset] = count_flops(folded, (case.batch_size, 3, *case.img_size))
    say(f"{case}: {len(sides)} sides in turn, {repeats} times")
    times = race(sides, repeats, device)
    peak = matrix_peak(times, case.precision)
    entries = []
    for name, (preset, engine) in places.items():
        rate = flops[preset] / times[name].median
        after = times[AFTER].median
        entries.append(Entry(preset, engine, times[name], rate, rate / peak, after))
    rows = [_latency_row(case, entry) for entry in entries]
    on_target = (case.img_size, case.batch_size) == (TARGET_SIZE, TARGET_BATCH)
    has_targets = on_target and device.type == "cpu"
    best = {
        preset: min((e for e in entries if e.preset == preset), key=lambda e: e.times.median)
        for preset in presets
        if any(e.preset == preset for e in entries)
    }
    if "base" in best:
        target = PEAK_SHARE.get(case.precision) if has_targets else None
        rows.append(_share_row(case, [e for e in entries if e.preset == "base"], peak, target))
        is_asked = has_targets and case.precision == "fp32"
        for preset in ("small", "nano"):
            if preset in best:
                goal = SPEEDUP[preset] if is_asked else None
                rows.append(_speedup_row(case, best["base"], best[preset], goal))
    return Found(rows, [_plain(case, entry) for entry in entries], skipped)


def _latency_row(case: Case, entry: Entry) -> Row:
    rate = case.batch_size / entry.times.median
    told = (
        f"p90 {entry.times.p90 * 1e3:.1f} ms; {rate:.1f} images/s; {entry.rate / 1e9:.0f} GFLOP/s, "
    )
    total = entry.times.median + entry.after
    told += f"{entry.share:.2f} of the matrix peak; with post-processing {total * 1e3:.1f} ms, "
    told += f"{case.batch_size / total:.1f} images/s; {ABOUT[entry.engine]}"
    name = f"{entry.preset}, {case}, {entry.engine}"
    return Row(name, entry.times.median * 1e3, "ms", None, "lower", told)


def _share_row(case: Case, entries: Sequence[Entry], peak: float, target: float | None) -> Row:
    ordered = sorted(entries, key=lambda e: -e.share)
    told = ", ".join(f"{e.engine} {e.share:.2f}" for e in ordered)
    told += f"; peak {peak / 1e9:.0f} GFLOP/s, best of square matrix products in the same rounds"
    name = f"base, {case}: share of the matrix peak, best engine ({ordered[0].engine})"
    return Row(name, ordered[0].share, "fraction", target, "higher", told)


def _speedup_row(case: Case, base: Entry, other: Entry, target: float | None) -> Row:
    told = f"base {base.times.median * 1e3:.1f} ms ({base.engine}), {other.preset} "
    told += f"{other.times.median * 1e3:.1f} ms ({other.engine}), the best engine of each"
    name = f"{other.preset}, {case}: times faster than base"
    value = base.times.median / other.times.median
    return Row(name, value, "ratio", target, "higher", told)


def _plain(case: Case, entry: Entry) -> dict[str, Any]:
    return {
        "preset": entry.preset,
        "precision": case.precision,
        "engine": entry.engine,
        "img_size": list(case.img_size),
        "batch_size": case.batch_size,
        "median_ms": entry.times.median * 1e3,
        "p90_ms": entry.times.p90 * 1e3,
        "images_per_second": case.batch_size / entry.times.median,
        "with_postprocessing_ms": (entry.times.median + entry.after) * 1e3,
        "gflops": entry.rate / 1e9,
        "peak_share": entry.share,
    }
