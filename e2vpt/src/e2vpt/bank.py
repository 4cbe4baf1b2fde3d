"""Serve many tasks from one frozen backbone, mixed in one batch.

Every task is a set of folded key and value rows (see `fold`) and a linear head. In a batch each
image attends to the rows of its own task; rows that its task does not have are masked.

Shapes: B batch, L layers, n rows of a task in one layer, H heads, d_h width of a head, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt import model_io
from e2vpt.backbones import fingerprint
from e2vpt.fold import fold
from e2vpt.model import PromptedModel, PromptSpec, remove
from shared_utils.errors import InputError, near_miss

MOST_CLASSES = 4096  # of heads in one product, so that what is thrown away costs little


@dataclass(frozen=True)
class _Task:
    """What one task keeps in memory.

    Attributes:
        rows: per layer (2, n, H, d_h): keys and values, in the order in which attention joins them
            to those of the tokens.
        weight: (C, D) of the head.
        bias: (C,).
        class_names: of the head's outputs, or None where they were not saved.
    """

    rows: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor
    class_names: list[str] | None

    @property
    def num_rows(self) -> int:
        """n; 0 for a linear probe."""
        return self.rows[0].shape[1] if self.rows else 0

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.weight)


class _BatchRows:
    """Stands in for `KeyValuePrompts`: the rows of every image's own task.

    They are gathered layer by layer, while attention asks for them: those of all layers would take
    B L n D numbers twice, more than the activations, and would have left the cache by then.

    Attributes:
        num_layers: L.
        mask: bool (B, n), False for rows that an image does not have; None where all have all.
    """

    def __init__(self, own: Sequence[_Task], device: torch.device) -> None:
        """Plan a batch from the task of each image; at least one has rows."""
        self.tasks = list({id(task): task for task in own if task.rows}.values())
        self.num_layers = len(self.tasks[0].rows)
        self.mask: Tensor | None = None
        self.index: Tensor | None = None  # (B n), into the rows of all tasks behind one of zeros
        self.batch = len(own)
        self.zero = self.tasks[0].rows[0].new_zeros(())
        # Rows that take autocast's type before they are handed out to the images cost half.
        self.dtype, kind = self.zero.dtype, device.type
        if self.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            self.dtype = torch.get_autocast_dtype(kind)
        if all(task is own[0] for task in own):
            return
        starts, end = {}, 1
        for task in self.tasks:
            starts[id(task)], end = end, end + task.num_rows
        start = torch.tensor([starts.get(id(task), 0) for task in own])[:, None]
        count = torch.tensor([task.num_rows for task in own])[:, None]
        place = torch.arange(int(count.max()))
        is_own = place < count
        # What a task lacks is the row of zeros: a finite number that the mask then drops.
        self.index = torch.where(is_own, start + place, 0).flatten().to(device)
        self.mask = None if bool(is_own.all()) else is_own.to(device)

    def __call__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (B, H, n, d_h), or (1, H, n, d_h) for all images."""
        parts = [task.rows[layer] for task in self.tasks]
        if self.index is None:
            rows = parts[0][:, None]
        else:
            zeros = self.zero.expand(2, 1, *parts[0].shape[2:])
            together = torch.cat([zeros, *parts], dim=1).to(self.dtype)
            rows = together.index_select(1, self.index).unflatten(1, (self.batch, -1))
        keys, values = rows.transpose(2, 3)
        return keys, values


class PromptBank(nn.Module):
    """Many tasks on one backbone: `bank(images, tasks=[...])`, a task for each image.

    Equal to running each task alone. A task costs the memory of its rows and head
    (`memory_bytes`), whatever the number of tasks. It takes what `fold` takes.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """Take over a frozen backbone; `release` gives it back.

        Raises: InputError for a class of backbone or attention that is not known.
        """
        super().__init__()
        plain = PromptSpec(num_classes=1, num_visual_prompts=0, num_kv_prompts=0)
        self.host = PromptedModel(backbone, plain).eval()
        self._sha256 = fingerprint(backbone)
        self._tasks: dict[str, _Task] = {}

    @property
    def tasks(self) -> list[str]:
        """Their names, in the order they were added."""
        return list(self._tasks)

    @torch.no_grad()
    def add(self, name: str, source: Path | str | PromptedModel) -> None:
        """Add a task.

        Args:
            name: what `forward` calls it.
            source: a folder that `e2vpt.save` or `e2vpt train` wrote, or a model on this very
                backbone, which stays usable.

        Raises: InputError where the name is taken, the prompts were trained on another backbone,
            or the model cannot be folded.
        """
        if name in self._tasks:
            raise InputError(
                "name", f"'{name}', which is in the bank", "a new name", "drop the old one first"
            )
        names = None
        if isinstance(source, PromptedModel):
            model = source
            if model.backbone is not self.host.backbone:
                raise InputError(
                    "model",
                    "prompts on another backbone",
                    "the bank's own",
                    "save it, add the folder",
                )
        else:
            names = model_io.read_card(Path(source))["class_names"]
            model = model_io.load(source, self.host.backbone, sha256=self._sha256)
        folded = fold(model)
        rows: list[Tensor] = []
        if folded.kv is not None:
            if folded.kv.num_layers < self.host.geometry.num_layers or (
                len({key.shape[1] for key in folded.kv.key}) > 1
            ):
                raise InputError(
                    "model",
                    "a number of rows that differs between layers",
                    "the same in every layer",
                    "train with kv_deep",
                )
            layers = range(folded.kv.num_layers)
            rows = [torch.stack(folded.kv(i)).transpose(1, 2).contiguous() for i in layers]
        head = folded.head
        self._tasks[name] = _Task(
            tuple(rows), head.weight.detach().clone(), head.bias.detach().clone(), names
        )

    def drop(self, name: str) -> None:
        """Forget a task.  Raises: InputError where there is none of that name."""
        self._task(name)
        del self._tasks[name]

    def class_names(self, name: str) -> list[str] | None:
        """Of a task's outputs, where they were saved with it."""
        return self._task(name).class_names

    def memory_bytes(self, name: str) -> int:
        """What a task holds: its key and value rows and its head."""
        task = self._task(name)
        return sum(t.numel() * t.element_size() for t in (*task.rows, task.weight, task.bias))

    def release(self) -> nn.Module:
        """The untouched backbone back; the bank must not be used any more."""
        self._tasks.clear()
        return remove(self.host)

    def forward(self, images: Tensor, tasks: Sequence[str]) -> list[Tensor]:
        """Classify every image by its own task, in one forward pass.

        Args:
            images: (B, 3, H, W) float, normalised for the backbone.
            tasks: B names.

        Returns: B logits, each (C,) with its task's number of classes.

        Raises: InputError where a name is not known or the counts differ.
        """
        if len(tasks) != len(images):
            raise InputError("tasks", f"{len(tasks)} names", f"{len(images)}", "name one per image")
        own = [self._task(name) for name in tasks]
        rows = _BatchRows(own, images.device) if any(task.rows for task in own) else None
        return _logits(self.host.features_with(images, None, rows), own)

    def _task(self, name: str) -> _Task:
        if name not in self._tasks:
            raise InputError(
                "task", f"'{name}'", "a task in the bank", near_miss(name, self._tasks)
            )
        return self._tasks[name]

    def _apply(self, fn: Any, recurse: bool = True) -> "PromptBank":
        """Move the tasks together with the backbone (`to`, `cuda`, `half`)."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tasks = {
            name: _Task(
                tuple(fn(rows) for rows in task.rows),
                fn(task.weight),
                fn(task.bias),
                task.class_names,
            )
            for name, task in self._tasks.items()
        }
        return self


def _logits(features: Tensor, own: Sequence[_Task]) -> list[Tensor]:
    """Each image's features (B, D) through the head of its own task: B logits, each (C,).

    One product serves many heads, because each alone is too small to be worth its start; what of it
    belongs to other images' tasks is thrown away.
    """
    logits: dict[int, Tensor] = {}
    for group in _groups(own):
        start, starts = 0, {}
        for task in group:
            starts[id(task)], start = start, start + task.num_classes
        weight = torch.cat([task.weight for task in group])
        bias = torch.cat([task.bias for task in group])
        chosen = [i for i, task in enumerate(own) if id(task) in starts]
        some = features if len(chosen) == len(own) else features[chosen]
        for i, scores in zip(chosen, F.linear(some, weight, bias), strict=True):
            first = starts[id(own[i])]
            logits[i] = scores[first : first + own[i].num_classes]
    return [logits[i] for i in range(len(own))]


def _groups(own: Sequence[_Task]) -> list[list[_Task]]:
    """The tasks of a batch, so many together as have `MOST_CLASSES`, or a single one."""
    groups: list[list[_Task]] = []
    total = MOST_CLASSES
    for task in {id(task): task for task in own}.values():
        total += task.num_classes
        if total > MOST_CLASSES:
            groups.append([])
            total = task.num_classes
        groups[-1].append(task)
    return groups
