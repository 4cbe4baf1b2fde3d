"""What several processes tell each other; a process alone needs no process group."""

import io
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that work together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place and equal in all; every process has to call it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(own: Any) -> list[Any]:
    """What every process gives, in the order of ranks; every process has to call it."""
    if world_size() == 1:
        return [own]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, own)
    return parts


def gather_states(own: dict[str, Any]) -> list[dict[str, Any]]:
    """`gather` for random states; NumPy's uint32 tensor does not survive the gathering's pickle."""
    if world_size() == 1:
        return [own]
    packed = io.BytesIO()
    torch.save(own, packed)
    parts = gather(packed.getvalue())
    return [torch.load(io.BytesIO(part), weights_only=True) for part in parts]
