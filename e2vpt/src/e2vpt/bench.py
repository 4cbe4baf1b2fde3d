"""Time and memory of prompt tuning: ratios, both sides in one process.

Here: training and inference on ViT-B/16 at 224; many tasks at once are in `bench_bank`. A missed
target is shown, never a failure.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from e2vpt import bench_bank
from e2vpt.measure import Precision, Row, machine, race
from e2vpt.model import PromptedModel, PromptSpec

STATUS = Path("/proc/self/status")  # Linux
BACKBONE, IMG_SIZE, NUM_CLASSES = "vit_base_patch16_224", 224, 100
Side = Literal[
    "full", "e2vpt", "token form", "dropout 0.1", "plain", "P50", "P50 token form", "P100"
]

SPECS: dict[Side, PromptSpec] = {
    "full": PromptSpec(
        num_classes=NUM_CLASSES, num_visual_prompts=0, num_kv_prompts=0, backbone_trains="full"
    ),
    "plain": PromptSpec(num_classes=NUM_CLASSES, num_visual_prompts=0, num_kv_prompts=0),
    "e2vpt": PromptSpec(num_classes=NUM_CLASSES, num_visual_prompts=50, prompt_dropout=0),
    "dropout 0.1": PromptSpec(num_classes=NUM_CLASSES, num_visual_prompts=50, prompt_dropout=0.1),
    "token form": PromptSpec(
        num_classes=NUM_CLASSES, num_visual_prompts=50, prompt_dropout=0, token_form=True
    ),
    "P50": PromptSpec(num_classes=NUM_CLASSES, num_visual_prompts=50),
    "P50 token form": PromptSpec(num_classes=NUM_CLASSES, num_visual_prompts=50, token_form=True),
    "P100": PromptSpec(num_classes=NUM_CLASSES, num_visual_prompts=100),
}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time and memory against full fine-tuning and the plain backbone; many tasks at once."""

    suite: Literal["all", "train", "bank"] = "all"
    """training and inference of one task, many tasks on one backbone, or both"""
    output: Path = Path("bench/e2vpt.json")
    """the JSON file to write"""
    batch_size: int = 16
    """images per step of suite train"""
    repeats: int = 7
    """timed rounds after the warm-up, at least 5"""


def build(side: Side, device: torch.device) -> PromptedModel:
    """ViT-B/16 with random weights (time does not depend on them) under one side's method."""
    torch.manual_seed(0)
    return PromptedModel(timm.create_model(BACKBONE), SPECS[side]).to(device)


def train_step(
    side: Side, batch_size: int, precision: Precision, device: torch.device
) -> Callable[[], None]:
    """A whole step: forward, backward, AdamW, zeroing gradients."""
    model = build(side, device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    images = torch.randn(batch_size, 3, IMG_SIZE, IMG_SIZE, device=device)
    labels = torch.randint(0, NUM_CLASSES, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference(
    side: Side, batch_size: int, precision: Precision, device: torch.device
) -> Callable[[], None]:
    """One batch of logits without gradients."""
    model = build(side, device).eval()
    images = torch.randn(batch_size, 3, IMG_SIZE, IMG_SIZE, device=device)

    @torch.no_grad()
    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            model(images)

    return step


def peak_memory(side: Side, batch_size: int, precision: Precision, device: torch.device) -> int:
    """Peak bytes of three train steps, model and optimiser included, imports excluded.

    On a CPU each side is measured in a process of its own, because an allocator keeps what it had;
    on Linux only.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step = train_step(side, batch_size, precision, device)
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated(device) - before
    out = subprocess.run(
        [sys.executable, "-m", "e2vpt.bench", side, str(batch_size), precision],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return int(out)


def _print_peak_memory(side: Side, batch_size: int, precision: Precision) -> None:
    torch.randn(8, 8) @ torch.randn(8, 8)  # the libraries' own start-up belongs to the imports
    before = _peak_resident()
    step = train_step(side, batch_size, precision, torch.device("cpu"))
    for _ in range(3):
        step()
    sys.stdout.write(str(_peak_resident() - before))


def _peak_resident() -> int:
    """Bytes. getrusage is no use here: it also counts the parent this process was forked from."""
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no VmHWM")


def train_rows(cfg: BenchConfig, precision: Precision, device: torch.device) -> list[Row]:
    """All rows of suite train in one precision."""
    what = f"ViT-B/16, {IMG_SIZE} px, batch {cfg.batch_size}, {precision}"
    sides: tuple[Side, ...] = ("full", "e2vpt", "token form", "dropout 0.1")
    train = race(
        {s: train_step(s, cfg.batch_size, precision, device) for s in sides}, cfg.repeats, device
    )
    sides = ("plain", "P50", "P50 token form", "P100")
    infer = race(
        {s: inference(s, cfg.batch_size, precision, device) for s in sides}, cfg.repeats, device
    )

    def row(
        name: str,
        side: Side,
        base: Side,
        table: Mapping[Any, float],
        target: float | None,
        note: str,
    ) -> Row:
        absolute = f"{table[side]:.3f} s / {table[base]:.3f} s"
        return Row(
            f"{name}, {precision}",
            table[side] / table[base],
            "ratio",
            target,
            "lower",
            f"{note}; {absolute}; {what}",
        )

    return [
        row("train step / full fine-tuning", "e2vpt", "full", train, 0.63, "P50 n5, AdamW both"),
        row("train step / token form", "e2vpt", "token form", train, 0.68, "P50 n5"),
        row("train step with dropout 0.1 / full", "dropout 0.1", "full", train, None, "P50 n5"),
        row("inference / plain backbone", "P100", "plain", infer, 1.02, "P100 n5"),
        row("inference, P50 / plain backbone", "P50", "plain", infer, None, "P50 n5"),
        row("inference, P50 token form / plain", "P50 token form", "plain", infer, None, "P50 n5"),
    ]


def memory_row(cfg: BenchConfig, precision: Precision, device: torch.device) -> Row:
    """Peak memory of a train step."""
    peak = {s: peak_memory(s, cfg.batch_size, precision, device) for s in ("full", "e2vpt")}
    return Row(
        f"peak memory of a train step / full, {precision}",
        peak["e2vpt"] / peak["full"],
        "ratio",
        0.75,
        "lower",
        f"P50 n5; {peak['e2vpt'] / 2**20:.0f} MiB / {peak['full'] / 2**20:.0f} MiB; "
        f"ViT-B/16, {IMG_SIZE} px, batch {cfg.batch_size}, {precision}",
    )


def bench(cfg: BenchConfig) -> None:
    """Measure, print the table, write the JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    skipped: list[dict[str, str]] = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    if cfg.suite != "bank":
        for precision in precisions:
            rows += train_rows(cfg, precision, device)
            if device.type == "cuda" or STATUS.is_file():
                rows.append(memory_row(cfg, precision, device))
    if cfg.suite != "train":
        for precision in precisions:
            rows += bench_bank.bank_rows(cfg.repeats, precision, device)
    if device.type != "cuda":
        skipped.append({"name": "all rows on a GPU", "reason": "no GPU that torch can use"})
        if cfg.suite != "bank" and not STATUS.is_file():
            skipped.append({"name": "peak memory", "reason": f"no {STATUS} to read it from"})
    cfg.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(device), "rows": [asdict(row) for row in rows], "skipped": skipped}
    cfg.output.write_text(json.dumps(report, indent=2) + "\n")
    table = Table("benchmark", "value", "target", "", "detail", title=f"E²VPT, {report['machine']}")
    for r in rows:
        sign = "<=" if r.direction == "lower" else ">="
        told = "" if r.target is None else f"{sign} {r.target}"
        table.add_row(r.name, f"{r.value:.3f}", told, r.verdict, r.detail)
    Console(width=None if sys.stdout.isatty() else 170).print(table)


if __name__ == "__main__":  # a side of `peak_memory`
    _print_peak_memory(sys.argv[1], int(sys.argv[2]), sys.argv[3])  # type: ignore[arg-type]
