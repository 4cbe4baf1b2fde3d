"""`yolop-mtl import-weights`: weights of other files as `model.safetensors` and `model.json`."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor, nn

from shared_utils.errors import InputError, MissingFileError
from yolop_mtl import model_io
from yolop_mtl.blocks import RepConv, Upconv
from yolop_mtl.config import DataConfig, ModelConfig
from yolop_mtl.export_graph import load_torchscript
from yolop_mtl.layer_order import (
    NORM,
    Kernel,
    fit,
    read_layers,
    release_order,
    trunk_order,
    wanted,
)
from yolop_mtl.model import PRESETS, TASKS, YOLOPv2, build_model
from yolop_mtl.pretrained import ANCHORS, read_tensors

Preset = Literal["release", "base", "small", "nano"]
RELEASED_CLASS = 3  # of the released network's 80 the only one that ever fires
TOLERANCE = 1e-4  # times the largest value of an output, where that is more than 1
EXAMPLE = (2, 3, 64, 96)
INTERFACE = "outputs [three maps, anchors], drivable, lane"
LINEARS, IMPLICIT = ("wide", "narrow"), ("adds", "muls")  # in the order of the file
OUTPUT = "detection.outputs.0.weight"
OWN = "backbone.stem.0.conv.weight"  # files of ours have it


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Turn a weights file into a folder that the other commands take.

    Files: the released network (TorchScript), the trunk of YOLOv7 as a state dict, checkpoints and
    state dicts of this program. Every tensor must have its place, or the file is refused.
    """

    file: tyro.conf.Positional[Path]
    """TorchScript, .safetensors, or a .pt or .ckpt that opens weights-only"""
    out: Path
    """folder to write model.safetensors and model.json to"""
    preset: Preset | None = None
    """the network that the file holds (default: release for TorchScript, base for others)"""
    trust_file: bool = False
    """load TorchScript: such a file carries code, which runs; say so only of files whose source you
    trust"""
    keep_class: int | None = None
    """of the file's classes keep this number alone (3 in the released network), as preset base: a
    box's score is then its objectness alone"""
    class_names: tuple[str, ...] = ()
    """names of the classes that are written (default: vehicle for one class and for the released
    network's 3, numbers for others)"""
    img_size: tuple[int, int] = (384, 640)
    """height and width of the network's input in pixels, for model.json"""

    def __post_init__(self) -> None:
        """Check the size."""
        DataConfig(img_size=self.img_size)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What came of it.

    Attributes:
        folder: what was written.
        told: what was loaded, in one line.
    """

    folder: Path
    told: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.folder}: {self.told}"


def import_weights(cfg: ImportConfig) -> Imported:
    """Read, check, write.

    Raises: MissingFileError; InputError where the file is none of those kinds, does not fit layer
        by layer, or its network gives other outputs than ours with its weights.
    """
    if not cfg.file.is_file():
        do = "check the path"
        raise MissingFileError(str(cfg.file), "no such file", "a file of weights", do)
    if (cfg.out / model_io.WEIGHTS).exists():
        do = "name another folder"
        raise InputError("out", f"'{cfg.out}', which has {model_io.WEIGHTS}", "a new folder", do)
    is_script = is_torchscript(cfg.file)
    preset = cfg.preset or ("release" if is_script else "base")
    if is_script:
        model, told = _released(cfg.file, preset, is_trusted=cfg.trust_file)
    else:
        tensors = read_tensors(cfg.file)
        model, told = (_own if OWN in tensors else _trunk)(cfg.file, preset, tensors)
    if cfg.keep_class is not None:
        _keep_class(model, cfg.keep_class)
        preset, told = "base" if preset == "release" else preset, f"{told}; one class kept"
    _save(model, cfg, preset)
    return Imported(folder=cfg.out, told=told)


def is_torchscript(path: Path) -> bool:
    """Whether a file carries code, as TorchScript and files of torch.export do."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


# ---- the released network ------------------------------------------------------------------------


def _released(path: Path, preset: str, *, is_trusted: bool) -> tuple[YOLOPv2, str]:
    """By order and shape from TorchScript; its outputs on noise must be ours."""
    if not is_trusted:
        raise InputError(
            str(path),
            "TorchScript, which carries code that runs when it is loaded",
            "--trust-file with it",
            "give it if you trust where the file comes from, else leave the file alone",
        )
    try:
        script = load_torchscript(path).eval().float()
        tensors = dict(script.state_dict())
        with torch.no_grad():
            images = torch.rand(EXAMPLE, generator=torch.Generator().manual_seed(0))
            outputs = script(images)
    except RuntimeError as error:
        got = f"TorchScript that does not run ({str(error).strip().splitlines()[-1]})"
        raise InputError(str(path), got, INTERFACE, "take the released file") from error
    maps, anchors, drivable, lane = _parts(path, outputs)
    model = build_by_order(path, preset, tensors, anchors)
    expected = {f"detection {scale}": x for scale, x in enumerate(maps)}
    expected |= {"drivable": drivable, "lane": lane}
    with torch.no_grad():
        raw = model(images)
    found = {f"detection {scale}": x for scale, x in enumerate(raw["detection"])}
    found |= {"drivable": raw["drivable"].sigmoid(), "lane": raw["lane"].sigmoid()}
    worst = 0.0
    for name, x in expected.items():
        if found[name].shape != x.shape:
            got, told = (f"shape {tuple(y.shape)}" for y in (x, found[name]))
            raise InputError(f"{path} {name}", got, told, "take the released file")
        difference = float((found[name] - x).abs().max() / x.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            got, told = f"a difference of {difference:.2g} on noise", f"at most {TOLERANCE:g}"
            do = "take the released file; every layer fits, but this one computes something else"
            raise InputError(f"{path} {name}", got, told, do)
        worst = max(worst, difference)
    count = len(read_layers(tensors).kernels)
    told = f"{count} convolutions loaded, outputs differ from the file's by at most {worst:.1g}"
    return model, told


def _parts(path: Path, outputs: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The released interface taken apart; anchors as (scales, anchors, 2)."""
    try:
        (maps, grids), drivable, lane = outputs
        tensors = [*maps, *grids, drivable, lane]
        if len(maps) != 3 or not all(isinstance(x, Tensor) for x in tensors):
            raise ValueError("other counts or types")
        anchors = torch.stack([grid.float().reshape(-1, 2) for grid in grids])
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"other outputs ({str(error).splitlines()[0]})"
        raise InputError(str(path), got, INTERFACE, "take the released file") from error
    return list(maps), anchors, drivable, lane


def build_by_order(
    path: Path, preset: str, tensors: Mapping[str, Tensor], anchors: Tensor
) -> YOLOPv2:
    """A network with the released file's tensors, each at its place.

    Args:
        path: of the file, for messages.
        preset: of the network; its classes are as many as the file has.
        tensors: of the file, in its order.
        anchors: (scales, anchors, 2) pixels.

    Raises: InputError naming the first layer that differs.
    """
    layers = read_layers(tensors)
    order = release_order(build_model(preset))
    num_classes = None
    place = order.index("detection.outputs.0")
    if PRESETS[preset].num_classes is None and place < len(layers.kernels):
        num_classes = max(1, len(layers.kernels[place].weight) // anchors.shape[1] - 5)
    model = build_model(preset, num_classes=num_classes, anchors=anchors.tolist())
    state = _fitted(path, model, order, layers.kernels)
    if len(layers.kernels) > len(order):
        extra = layers.kernels[len(order)]
        raise _differs(path, extra.name, str(extra), f"{len(order)} convolutions in all")
    norms = {
        f"{file}.{part}": x
        for file, norm in layers.norms.items()
        for part, x in zip(NORM, norm, strict=True)
    }
    own_norms = [name.removesuffix("side") + "norm" for name in order if name.endswith(".side")]
    own = [f"{name}.{part}" for name in own_norms for part in NORM]
    state |= _paired(path, model, norms, own)
    state |= _paired(path, model, layers.linears, [f"lane.attention.{x}.weight" for x in LINEARS])
    vectors = [f"detection.{kind}.{scale}.vector" for kind in IMPLICIT for scale in range(3)]
    if layers.vectors:
        flat = {name: x.flatten() for name, x in layers.vectors.items()}
        state |= _paired(path, model, flat, vectors)
    else:  # merged into the convolutions around them
        state |= {x: torch.full_like(model.state_dict()[x], ".muls." in x) for x in vectors}
    # What is left: counters of norms, which nothing reads here, and the file's own anchors.
    for name in layers.others:
        last = name.rpartition(".")[2]
        if last != "num_batches_tracked" and not last.startswith("anchor"):
            raise _differs(path, name, f"a tensor {tuple(tensors[name].shape)}", "no such tensor")
    model.load_state_dict(model.state_dict() | state)
    return model.eval()


def _paired(
    path: Path, model: YOLOPv2, found: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    """The file's tensors under our names. Raises: InputError naming the first that differ."""
    own = model.state_dict()
    for ours, (theirs, x) in zip(names, found.items(), strict=False):
        if own[ours].shape != x.shape:
            expected = f"{tuple(own[ours].shape)} for {ours}"
            raise _differs(path, theirs, f"a tensor {tuple(x.shape)}", expected)
    if len(found) != len(names):
        got, expected = (f"{len(x)} tensors like {next(iter(x), 'none')}" for x in (found, names))
        raise _differs(path, "", got, expected)
    return dict(zip(names, found.values(), strict=True))


def _fitted(
    path: Path, model: YOLOPv2, order: Sequence[str], kernels: Sequence[Kernel]
) -> dict[str, Tensor]:
    """All of `order` from the first kernels. Raises: InputError naming the first that differ."""
    state: dict[str, Tensor] = {}
    for place, name in enumerate(order):
        if place >= len(kernels):
            got = f"{len(kernels)} convolutions"
            raise _differs(path, "", got, f"{len(order)}, the next {wanted(model, name)}")
        fitted = fit(model, name, kernels[place])
        if fitted is None:
            expected = wanted(model, name)
            raise _differs(path, kernels[place].name, str(kernels[place]), expected)
        state |= fitted
    return state


def _differs(path: Path, name: str, got: str, expected: str) -> InputError:
    do = "name the network of the file with --preset, or take the original file"
    return InputError(f"{path} {name}".rstrip(), got, expected, do)


# ---- state dicts ---------------------------------------------------------------------------------


def _trunk(path: Path, preset: str, tensors: Mapping[str, Tensor]) -> tuple[YOLOPv2, str]:
    """All of the trunk by order and shape; heads are new."""
    model = build_model(preset)
    order = trunk_order(model)
    layers = read_layers(tensors)
    if not layers.kernels:
        got, expected = f"{len(tensors)} tensors and no convolution", "a network's state dict"
        raise _differs(path, "", got, expected)
    state = _fitted(path, model, order, layers.kernels)
    model.load_state_dict(model.state_dict() | state)
    rest = len(layers.kernels) - len(order)
    told = (
        f"the trunk's {len(order)} convolutions loaded, {rest} others left out; heads are new: "
        f"train them, with --model.weights {model_io.WEIGHTS} of this folder"
    )
    return model.eval(), told


def _own(path: Path, preset: str, tensors: Mapping[str, Tensor]) -> tuple[YOLOPv2, str]:
    """By name: a state dict of ours, whose shapes say which options the network has."""
    options: dict[str, Any] = {
        "tasks": [task for task in TASKS if any(name.startswith(f"{task}.") for name in tensors)],
        "use_attention": "lane.conv1.conv.weight" not in tensors
        or any(name.startswith("lane.attention.") for name in tensors),
        "use_repconv": any(name.startswith("detection.convs.0.branches.") for name in tensors),
        "lane_upsample": "nearest" if "lane.deconv1.conv.conv.weight" in tensors else "deconv",
    }
    if not options["tasks"]:
        raise _differs(path, "", "a trunk alone", "a network with a head")
    if "drivable.output.conv.weight" in tensors:
        options["num_drivable"] = len(tensors["drivable.output.conv.weight"])
    if {OUTPUT, ANCHORS} <= tensors.keys():
        count = tensors[ANCHORS].shape[1]
        options["num_classes"] = len(tensors[OUTPUT]) // count - 5
        options["anchors"] = tensors[ANCHORS].tolist()
    model = build_model(preset, **options)
    own = model.state_dict()
    for name in [*own, *tensors]:
        shapes = [tuple(x[name].shape) if name in x else "none" for x in (tensors, own)]
        if shapes[0] != shapes[1]:
            raise _differs(path, name, str(shapes[0]), str(shapes[1]))
    model.load_state_dict(tensors)
    return model.eval(), f"{len(tensors)} tensors loaded by name"


# ---- writing -------------------------------------------------------------------------------------


def _keep_class(model: YOLOPv2, keep: int) -> None:
    """Cut the box head's outputs to one of its classes, in place.

    Raises: InputError where there is no such class.
    """
    head = model.detection
    count = 0 if head is None else head.num_classes
    if head is None or not 0 <= keep < count:
        do = "name one of them, or leave it out"
        raise InputError("keep_class", keep, f"one of {count} classes, from 0", do)
    channels = torch.arange(head.anchors.shape[1] * (5 + count)).view(-1, 5 + count)
    kept = channels[:, [0, 1, 2, 3, 4, 5 + keep]].flatten()
    for output in head.outputs:
        conv = cast(nn.Conv2d, output)
        conv.out_channels = len(kept)
        conv.weight = nn.Parameter(conv.weight.detach()[kept])
        conv.bias = nn.Parameter(cast(Tensor, conv.bias).detach()[kept])
    for implicit in head.muls or ():
        implicit.vector = nn.Parameter(cast(Tensor, implicit.vector).detach()[kept])
    head.num_classes = 1


def _save(model: YOLOPv2, cfg: ImportConfig, preset: Preset) -> None:
    head = model.detection
    count = 1 if head is None else head.num_classes
    names = cfg.class_names or _class_names(count)
    if len(names) != count:
        do = "give as many"
        raise InputError("class_names", f"{len(names)} names", f"{count} for {count} classes", do)
    areas = 2 if model.drivable is None else model.drivable.output.conv.out_channels
    if areas not in (2, 3):
        do = "take a file with background and one or two areas"
        raise InputError(str(cfg.file), f"{areas} drivable classes", "2 or 3", do)
    config = ModelConfig(
        preset=preset,
        tasks=model.tasks,
        use_attention=model.lane is None or model.lane.attention is not None,
        use_repconv=head is not None and isinstance(head.convs[0], RepConv),
        lane_upsample="nearest"
        if model.lane and isinstance(model.lane.deconv1, Upconv)
        else "deconv",
    )
    data = DataConfig(img_size=cfg.img_size, area_classes="three" if areas == 3 else "merged")
    model_io.save(model, cfg.out, config=config, data=data, class_names=names)


def _class_names(count: int) -> tuple[str, ...]:
    if count == 1:
        return ("vehicle",)
    known = {RELEASED_CLASS: "vehicle"} if count == PRESETS["release"].num_classes else {}
    return tuple(known.get(number, f"class {number}") for number in range(count))
