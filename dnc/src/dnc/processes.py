"""Sums, maxima and minima over all processes; a process alone needs no process group."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Operation = Literal["sum", "max", "min"]

_is_alone = ContextVar("is_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself within the body, as if there were no others."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def world_size() -> int:
    """Number of processes that work together; 1 without a process group."""
    if _is_alone.get() or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def reduce(tensor: Tensor, operation: Operation) -> Tensor:
    """Put what all processes have together, in place; every process has to call it.

    Returns: the tensor given, equal in all processes.
    """
    if world_size() > 1:
        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        dist.all_reduce(tensor, operations[operation])
    return tensor
