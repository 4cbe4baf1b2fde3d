"""bfloat16 autocast on a CPU, which mmengine's own wrapper refuses, and channels-last weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS


def is_bf16_fast() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    is_amx, is_avx = (
        getattr(torch.cpu, name, lambda: False)
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return bool(is_amx() or is_avx())


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Forward passes of training in bfloat16 autocast; no loss scaling, which bfloat16 needs not.

    Attributes:
        is_bf16: whether autocast is on.
    """

    def __init__(self, *args: Any, only_if_fast: bool = False, **kwargs: Any) -> None:
        """Take `OptimWrapper`'s arguments; `only_if_fast`: float32 on CPUs without bfloat16."""
        super().__init__(*args, **kwargs)
        self.is_bf16 = torch.cuda.is_available() or not only_if_fast or is_bf16_fast()

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """The wrapper's context, and autocast."""
        device = next(model.parameters()).device.type
        with (
            super().optim_context(model),
            torch.autocast(device, torch.bfloat16, enabled=self.is_bf16),
        ):
            yield


def precision_of(wrapper: OptimWrapper) -> str:
    """What a training computed in: 32-true, 16-mixed or bf16-mixed."""
    if getattr(wrapper, "is_bf16", False):
        return "bf16-mixed"
    return "16-mixed" if isinstance(wrapper, AmpOptimWrapper) else "32-true"


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Lays convolution weights out channels-last; features follow, results stay the same.

    A ResNet's training step takes about three quarters of the time in bfloat16 on a CPU with AMX;
    GPUs with tensor cores want this form too.
    """

    def before_run(self, runner: Any) -> None:
        """Change the model in place; checkpoints do not show it."""
        runner.model.to(memory_format=torch.channels_last)
