"""Serve many tasks from one frozen backbone, mixed in one batch.

Every task is a set of folded key and value rows (see `fold`) and a linear head. In a batch each
image attends to the rows of its own task; rows that its task does not have are masked.

Shapes: B batch, L layers, n rows of a task in one layer, H heads, d_h width of a head, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
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


@dataclass(frozen=True)
class _Task:
    """What one task keeps in memory.

    Attributes:
        rows: per run of layers of one shape (layers, 2, H, n, d_h): keys and values.
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
        return self.rows[0].shape[3] if self.rows else 0


class _BatchRows:
    """Stands in for `KeyValuePrompts`: the rows of every image's own task."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], mask: Tensor | None) -> None:
        self.layers, self.mask = layers, mask
        self.num_layers = len(layers)

    def __call__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.layers[layer]


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
        # Layers of one geometry have rows of one shape and are handled together.
        self._runs = [len(list(run)) for _, run in groupby(self.host.geometry.layers)]

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
        rows = []
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
            pairs = [torch.stack(folded.kv(i)) for i in range(folded.kv.num_layers)]
            rows = [torch.stack(part) for part in _split(pairs, self._runs)]
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
        used = {name: self._task(name) for name in dict.fromkeys(tasks)}
        features = self.host.features_with(images, None, self._rows(tasks, used, images.device))
        logits: dict[int, Tensor] = {}
        for name, task in used.items():
            chosen = [i for i, own in enumerate(tasks) if own == name]
            scores = F.linear(features[chosen], task.weight, task.bias)
            logits.update(zip(chosen, scores, strict=True))
        return [logits[i] for i in range(len(tasks))]

    def _rows(
        self, tasks: Sequence[str], used: dict[str, _Task], device: torch.device
    ) -> _BatchRows | None:
        """Each image's rows, (B, H, n, d_h) for keys and values of every layer, n the most."""
        counts = {name: task.num_rows for name, task in used.items()}
        most = max(counts.values(), default=0)
        if not most:
            return None
        # One concatenation and one gathering for all layers of a shape. The first row of all is
        # zero and stands for those that a task lacks.
        start, offset = {}, 1
        for name in used:
            start[name], offset = offset, offset + counts[name]
        index = torch.zeros(len(tasks), most, dtype=torch.int64)
        for i, name in enumerate(tasks):
            index[i, : counts[name]] = torch.arange(start[name], start[name] + counts[name])
        mask = (index > 0).to(device)
        flat = index.flatten().to(device)
        layers: list[tuple[Tensor, Tensor]] = []
        for run in range(len(self._runs)):
            parts = [task.rows[run] for task in used.values() if task.rows]
            zero = parts[0].new_zeros(*parts[0].shape[:3], 1, parts[0].shape[4])
            together = torch.cat([zero, *parts], dim=3).index_select(3, flat)
            rows = together.unflatten(3, (len(tasks), most))  # (layers, 2, H, B, n, d_h)
            layers += [(r[0].transpose(0, 1), r[1].transpose(0, 1)) for r in rows]
        return _BatchRows(layers, None if bool(mask.all()) else mask)

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


def _split(items: list[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    parts, start = [], 0
    for length in lengths:
        parts.append(items[start : start + length])
        start += length
    return parts
