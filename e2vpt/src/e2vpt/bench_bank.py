"""What it costs to serve many tasks from one backbone, mixed in one batch (see `PromptBank`).

64 tasks with 5 to 60 visual prompts, 5 key-value prompts and 10 to 100 classes. Of every second one
there is an image in the batch, the one of most prompts among them, so that its number of rows is
what the others are filled up to.
"""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from e2vpt.backbones import load_backbone
from e2vpt.bank import PromptBank
from e2vpt.fold import fold
from e2vpt.measure import Precision, Row, race
from e2vpt.model import PromptedModel, PromptSpec, parameter_report

NUM_TASKS, BATCH = 64, 32
PROMPTS, KV_PROMPTS, CLASSES = (5, 60), 5, (10, 100)  # ranges: fewest and most
MIXED, GPU_SPEEDUP = 1.10, 4.0  # targets


def _vit_base() -> nn.Module:
    return timm.create_model("vit_base_patch16_224", num_classes=0)


def _micro() -> nn.Module:
    return load_backbone("micro_vit").module


# Name, image side in pixels, backbone, and the target of a mixed batch's time.
PLACES: tuple[tuple[str, int, Callable[[], nn.Module], float | None], ...] = (
    ("ViT-B/16", 224, _vit_base, MIXED),
    ("micro ViT", 32, _micro, None),
)


@dataclass(frozen=True)
class Service:
    """A bank of all tasks, and those of the batch as models of their own.

    Attributes:
        bank: of all tasks.
        alone: by name, the folded models of the tasks in the batch, in the order of its images.
        stored_bytes: what all tasks hold in the bank.
        tuned_bytes: what was trained of them, prompts and heads, in the same data type.
    """

    bank: PromptBank
    alone: dict[str, PromptedModel]
    stored_bytes: int
    tuned_bytes: int

    @property
    def middle(self) -> str:
        """The task in the batch with the middle number of rows."""
        by_rows = sorted(self.alone, key=lambda name: self.alone[name].spec.num_visual_prompts)
        return by_rows[len(by_rows) // 2]


def task_specs() -> list[PromptSpec]:
    """The tasks, by number of prompts; the number of classes has nothing to do with it."""
    order = torch.randperm(NUM_TASKS, generator=torch.Generator().manual_seed(0)).tolist()

    def spread(ends: tuple[int, int], i: int) -> int:
        return ends[0] + round(i * (ends[1] - ends[0]) / (NUM_TASKS - 1))

    return [
        PromptSpec(
            num_classes=spread(CLASSES, order[i]),
            num_visual_prompts=spread(PROMPTS, i),
            num_kv_prompts=KV_PROMPTS,
        )
        for i in range(NUM_TASKS)
    ]


def build_service(backbone: nn.Module, device: torch.device) -> Service:
    """Put all tasks, not trained, onto a backbone."""
    torch.manual_seed(0)
    backbone = backbone.eval().to(device)
    bank = PromptBank(backbone)
    folded: dict[str, PromptedModel] = {}
    tuned = 0
    for i, spec in enumerate(task_specs()):
        model = PromptedModel(backbone, spec).eval()
        bank.add(f"task {i}", model)
        if i % 2:
            folded[f"task {i}"] = fold(model)
        tuned += int(parameter_report(model)["tuned"]) * model.head.weight.element_size()
    # Images of neighbours in the batch have numbers of rows that are far apart.
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1)).tolist()
    names = list(folded)
    alone = {names[i]: folded[names[i]] for i in order}
    stored = sum(bank.memory_bytes(name) for name in bank.tasks)
    return Service(bank, alone, stored, tuned)


def sides(
    service: Service, images: Tensor, precision: Precision
) -> dict[str, Callable[[], list[Tensor]]]:
    """Three ways to classify (B, 3, H, W) images: logits of each image.

    Keys: `mixed`, an image of each task in one batch; `one task`, all of them of the middle task,
    by its folded model; `one by one`, each by its own task's folded model.
    """
    names, middle = list(service.alone), service.alone[service.middle]

    def wrapped(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        @torch.no_grad()
        def step() -> list[Tensor]:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                return run()

        return step

    return {
        "mixed": wrapped(lambda: service.bank(images, tasks=names)),
        "one task": wrapped(lambda: list(middle(images))),
        "one by one": wrapped(
            lambda: [service.alone[name](images[i : i + 1])[0] for i, name in enumerate(names)]
        ),
    }


def bank_rows(repeats: int, precision: Precision, device: torch.device) -> list[Row]:
    """All rows of suite bank in one precision."""
    rows: list[Row] = []
    for name, side, backbone, target in PLACES:
        service = build_service(backbone(), device)
        images = torch.randn(BATCH, 3, side, side, device=device)
        seconds = race(sides(service, images, precision), repeats, device)
        mixed, alone = seconds["mixed"], seconds["one task"]
        singly = seconds["one by one"]
        what = f"{name}, {side} px, {BATCH} images of {BATCH} tasks, P 5 to 60 n5, {precision}"
        rows += [
            Row(
                f"{name}: mixed batch / batch of one task, {precision}",
                mixed / alone,
                "ratio",
                target,
                "lower",
                f"{mixed:.3f} s / {alone:.3f} s; {what}",
            ),
            Row(
                f"{name}: images per second mixed / one by one, {precision}",
                singly / mixed,
                "ratio",
                GPU_SPEEDUP if device.type == "cuda" else None,
                "higher",
                f"{BATCH / mixed:.1f} / {BATCH / singly:.1f} images/s; {what}",
            ),
        ]
        if precision == "fp32":  # tasks are kept in the backbone's data type
            held, tuned = service.stored_bytes, service.tuned_bytes
            rows.append(
                Row(
                    f"{name}: memory of a task / its prompts and head",
                    held / tuned,
                    "ratio",
                    None,
                    "lower",
                    f"{held / NUM_TASKS / 2**20:.2f} MiB / {tuned / NUM_TASKS / 2**20:.2f} MiB, "
                    f"mean of {NUM_TASKS} tasks; {name}, P 5 to 60 n5, 10 to 100 classes",
                )
            )
    return rows
