"""Weights of other programs by their place: the order of layers in files of YOLOv7 and YOLOP.

That order is a fact of the format; nothing of those programs' code is here. A file's tensors become
layers, and each layer is fitted to one of ours. Layers with their norm folded fit too: they get a
norm that changes nothing but adds the folded bias, so the network can be trained on.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from yolop_mtl.blocks import CSP, NORM_EPS, SPPCSPC, Conv, Deconv
from yolop_mtl.model import YOLOPv2

NORM = ("weight", "bias", "running_mean", "running_var")
TRUNK = ("backbone", "neck")
CSP_ORDER = ("main.0", "side", "main.3", "out", "main.1", "main.2")
Tensors = dict[str, Tensor]


class Kernel(NamedTuple):
    """A convolution of a file.

    Attributes:
        name: of its module.
        weight: 4-D.
        bias: its own, or that of a folded norm.
        norm: tensors as in `NORM`, of the norm right behind it.
        names: of all its tensors in the file.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    norm: tuple[Tensor, ...] | None
    names: list[str]

    def __str__(self) -> str:
        """What it is, for messages."""
        return _told(self.weight, self.bias is not None, self.norm is not None)


class Layers(NamedTuple):
    """A file's layers in its order; all but kernels by name of their module.

    Attributes:
        kernels: convolutions.
        norms: those that follow no single convolution, tensors as in `NORM`.
        linears: 2-D weights.
        vectors: implicit vectors (1, C, 1, 1).
        others: names of further tensors.
    """

    kernels: list[Kernel]
    norms: dict[str, tuple[Tensor, ...]]
    linears: dict[str, Tensor]
    vectors: dict[str, Tensor]
    others: list[str]


def read_layers(tensors: Mapping[str, Tensor]) -> Layers:
    """Sort a file's tensors, given in their order, into layers; numbers become float32."""
    modules: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        value = tensor.float() if tensor.is_floating_point() else tensor
        modules.setdefault(module, {})[part] = value
    found = Layers([], {}, {}, {}, [])
    norms = {name: parts for name, parts in modules.items() if parts.keys() >= set(NORM)}
    kernels = [name for name, parts in modules.items() if _rank(parts) == 4]
    paired: dict[str, str] = {}
    for name in norms:
        # A block of one convolution and one norm; where several share the block it stands alone.
        inside = [kernel for kernel in kernels if _parent(kernel) == _parent(name)]
        if len(inside) == 1:
            paired[inside[0]] = name
    for name, parts in modules.items():
        used = set()
        if _rank(parts) == 4:
            used = {"weight", "bias"} & parts.keys()
            names = [f"{name}.{part}" for part in parts if part in used]
            norm = None
            if name in paired:
                norm = tuple(norms[paired[name]][part] for part in NORM)
                names += [f"{paired[name]}.{part}" for part in NORM]
            found.kernels.append(Kernel(name, parts["weight"], parts.get("bias"), norm, names))
        elif _rank(parts) == 2:
            used = {"weight"}
            found.linears[name] = parts["weight"]
        elif name in norms:
            used = set(NORM)
            if name not in paired.values():
                found.norms[name] = tuple(parts[part] for part in NORM)
        else:
            vectors = [
                p
                for p, x in parts.items()
                if x.ndim == 4 and x.shape[:1] + x.shape[2:] == (1, 1, 1)
            ]
            used = set(vectors)
            found.vectors.update({f"{name}.{part}": parts[part] for part in vectors})
        found.others.extend(f"{name}.{part}" for part in parts if part not in used)
    return found


def trunk_order(model: YOLOPv2) -> list[str]:
    """Names of the trunk's convolutions in the order of such files: a pyramid's shortcut second."""
    names: list[str] = []
    for part in TRUNK:
        inner = {f"{part}.{name}": m for name, m in getattr(model, part).named_modules()}
        pyramids = [name for name, module in inner.items() if isinstance(module, SPPCSPC)]
        late = {
            name: [f"{name}.{x}" for x in ("before.1", "before.2", "after.0", "after.1", "out")]
            for name in pyramids
        }
        for name, module in inner.items():
            if not isinstance(module, Conv) or any(name in group for group in late.values()):
                continue
            names += [name, *late.get(name.removesuffix(".shortcut"), [])]
    return names


def release_order(model: YOLOPv2) -> list[str]:
    """Names of all convolutions in the order of the released file.

    Trunk, box head, drivable head, lane head; in a CSP block the four of its ends come before those
    of its middle.
    """
    names = trunk_order(model)
    names += [f"detection.{part}.{scale}" for part in ("convs", "outputs") for scale in range(3)]
    for head in ("drivable", "lane"):
        for name, module in getattr(model, head).named_children():
            if isinstance(module, CSP):
                names += [f"{head}.{name}.{part}" for part in CSP_ORDER]
            elif isinstance(module, Conv | Deconv):
                names.append(f"{head}.{name}")
    return names


def fit(model: nn.Module, name: str, kernel: Kernel) -> Tensors | None:
    """A file's convolution as tensors of one of ours, by name; None where it is another."""
    module = model.get_submodule(name)
    if tuple(_weight(module).shape) != tuple(kernel.weight.shape):
        return None
    if isinstance(module, nn.Conv2d):
        if kernel.norm is not None or (kernel.bias is None) != (module.bias is None):
            return None
        found = {"weight": kernel.weight}
        return _under(name, found if kernel.bias is None else found | {"bias": kernel.bias})
    if kernel.norm is None and kernel.bias is None:
        return None
    count = int(module.norm.num_features)  # type: ignore[union-attr,arg-type]
    zero, bias = torch.zeros(count), kernel.bias
    found = {"conv.weight": kernel.weight}
    if kernel.norm is not None:
        scale, shift, mean, var = kernel.norm
        if len(scale) != count:
            return None
        own_bias = zero if bias is None else bias
        norm = (scale, shift, mean - own_bias, var)
    else:
        norm = (torch.ones(count), zero if bias is None else bias, zero, zero + 1 - NORM_EPS)
    if module.conv.bias is not None:  # type: ignore[union-attr]
        found["conv.bias"] = zero
    return _under(name, found | {f"norm.{part}": x for part, x in zip(NORM, norm, strict=True)})


def wanted(model: nn.Module, name: str) -> str:
    """What `fit` would take for a convolution of ours, for messages."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Conv2d):
        return f"{_told(module.weight, module.bias is not None, False)} for {name}"
    return f"{_told(_weight(module), False, True)}, or a bias, for {name}"


def _weight(module: nn.Module) -> Tensor:
    conv = module.conv if isinstance(module, Conv | Deconv) else module
    return conv.weight  # type: ignore[return-value]


def _told(weight: Tensor, has_bias: bool, has_norm: bool) -> str:
    more = [what for what, has in (("a bias", has_bias), ("a norm", has_norm)) if has]
    return f"a kernel {tuple(weight.shape)} with {' and '.join(more) or 'no bias'}"


def _under(name: str, parts: Tensors) -> Tensors:
    return {f"{name}.{part}": x for part, x in parts.items()}


def _rank(parts: Tensors) -> int:
    return parts["weight"].ndim if "weight" in parts else 0


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
