"""Convolutions packed for oneDNN: the fastest way through the network on a CPU without compiling.

Weights are brought into oneDNN's own layout once instead of at every call, and SiLU is applied
while a convolution's results are still in the processor's registers. The operators are those that
torch.compile with freezing calls on a CPU; a compiled graph gains little beyond them.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from shared_utils.errors import InputError
from yolop_mtl.blocks import Conv, Deconv, RepConv
from yolop_mtl.model import MAX_STRIDE, YOLOPv2

Convolution = nn.Conv2d | nn.ConvTranspose2d


class PackedConv(nn.Module):
    """A convolution, transposed or not, and its activation in one call.

    Its weights are in no state dict: they are oneDNN's, of one machine.
    """

    def __init__(self, conv: Convolution, activation: str, size: tuple[int, ...]) -> None:
        """Pack.

        Args:
            conv: its weights are copied.
            activation: oneDNN's name, swish (which is SiLU) or none.
            size: (B, C, H, W) of the inputs for which the layout is chosen; others work as well.
        """
        super().__init__()
        geometry = (conv.padding, conv.stride, conv.dilation)
        places = [_numbers(value) for value in geometry]
        operators: Any = torch.ops.mkldnn
        weight = conv.weight.detach()
        if isinstance(conv, nn.ConvTranspose2d):
            places.insert(1, _numbers(conv.output_padding))
            reorder = operators._reorder_convolution_transpose_weight
            self.call = operators._convolution_transpose_pointwise.default
        else:
            reorder = operators._reorder_convolution_weight
            self.call = operators._convolution_pointwise.default
        self.weight = reorder(weight, *places, conv.groups, list(size))
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.dtype = weight.dtype
        self.rest = (*places, conv.groups, activation, [], "")

    def forward(self, x: Tensor) -> Tensor:
        """Of the type that the weights were packed in."""
        return cast(Tensor, self.call(x, self.weight, self.bias, *self.rest))


def _numbers(value: object) -> list[int]:
    return list(cast(tuple[int, ...], value))


def is_available() -> bool:
    """Whether this build of torch has the operators."""
    operators: Any = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(operators, name)
        for name in (
            "_convolution_pointwise",
            "_convolution_transpose_pointwise",
            "_reorder_convolution_weight",
            "_reorder_convolution_transpose_weight",
        )
    )


@torch.inference_mode()
def pack(
    model: YOLOPv2,
    img_size: tuple[int, int],
    *,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
) -> YOLOPv2:
    """Pack the convolutions of a folded network, in place; it is good for inference alone then.

    Outputs are those of before, up to rounding. Inputs are of any floating type and any size; the
    network is fastest at the size it is packed for.

    Args:
        model: after `fuse`, in eval mode, on the CPU.
        img_size: (H, W) of the inputs to be fast for.
        batch_size: of these inputs.
        dtype: of weights, arithmetic and outputs, float32 or bfloat16; None: that of the weights.
            Anchors keep theirs.

    Returns: the same network.

    Raises: InputError where it is not folded or not on the CPU, or torch lacks the operators.
    """
    if not is_available():
        got, do = f"torch {torch.__version__} without oneDNN", "install another build of torch"
        raise InputError("pack", got, "one with it", do)
    some = next(model.parameters())
    if some.device.type != "cpu":
        raise InputError("model", f"one on {some.device}", "one on the CPU", "move it there")
    parts: dict[str, tuple[Convolution, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv | Deconv | RepConv):
            is_folded = module.conv is not None and getattr(module, "norm", None) is None
            if model.training or not is_folded:
                do = "call yolop_mtl.fuse(model.eval()) first"
                raise InputError("model", f"{name} with its norm", "a folded network", do)
            has_act = not isinstance(module, Conv) or module.act
            parts[name] = (cast(Convolution, module.conv), "swish" if has_act else "none")
    inner = tuple(f"{name}.conv" for name in parts)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and name not in inner:
            parts[name] = (module, "none")
    if dtype is not None and dtype != some.dtype:
        head = model.detection
        anchors = None if head is None else head.anchors
        model.to(dtype)
        if head is not None and anchors is not None:
            head.anchors = anchors
    sizes = _input_sizes(model, {name: conv for name, (conv, _) in parts.items()})
    height, width = (side // MAX_STRIDE for side in img_size)
    for name, (conv, activation) in parts.items():
        parent, _, own = name.rpartition(".")
        channels, rows, columns = sizes[name]
        size = (batch_size, channels, rows * height, columns * width)
        setattr(model.get_submodule(parent), own, PackedConv(conv, activation, size))
    model.register_forward_pre_hook(_prepare)
    return model


def _input_sizes(model: YOLOPv2, convs: dict[str, Convolution]) -> dict[str, tuple[int, int, int]]:
    """(C, H, W) of the inputs of convolutions, by name, for the smallest image of all."""
    found: dict[str, tuple[int, int, int]] = {}
    hooks = []
    for name, conv in convs.items():

        def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            _, channels, height, width = inputs[0].shape
            found[name] = (channels, height, width)

        hooks.append(conv.register_forward_pre_hook(note))
    try:
        model(torch.zeros(1, 3, MAX_STRIDE, MAX_STRIDE, dtype=next(model.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _prepare(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Images as the first convolution wants them."""
    stem = cast(PackedConv, cast(YOLOPv2, module).backbone.stem[0])
    return (inputs[0].to(stem.dtype, memory_format=torch.channels_last),)
