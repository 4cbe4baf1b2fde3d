"""`yolop-mtl export`: a trained network as a file for other programs, checked before it counts."""

import contextlib
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import tyro

from shared_utils.errors import InputError
from yolop_mtl import export_check as check
from yolop_mtl import export_graph, export_onnx, model_io
from yolop_mtl.config import check_ranges
from yolop_mtl.export_graph import Deployable, Shape
from yolop_mtl.export_onnx import ALL, Suppression
from yolop_mtl.model import MAX_STRIDE
from yolop_mtl.model_io import Deployed

if TYPE_CHECKING:
    from onnx import ModelProto

Format = Literal["onnx", "torchscript", "torch-export", "openvino", "tensorrt"]
ENDINGS: dict[Format, str] = {
    "onnx": ".onnx",
    "torchscript": ".torchscript",
    "torch-export": ".pt2",
    "openvino": ".xml",
    "tensorrt": ".engine",
}
OF_ONNX: tuple[Format, ...] = ("onnx", "openvino", "tensorrt")  # others cannot hold suppression
ENGINE_FACTS = ".engine.json"  # beside an engine, which holds no text
METADATA = "metadata.json"  # inside files of torch
PACKAGES: dict[Format, tuple[str, str]] = {  # what a format needs, and how to get it
    "onnx": ("onnxscript", "pip install onnx onnxruntime onnxscript, dependencies of yolop_mtl"),
    "openvino": ("openvino", "pip install openvino, which is the extra openvino of this package"),
    "tensorrt": ("tensorrt", "pip install tensorrt on a machine with an NVIDIA GPU"),
}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a network for other programs: boxes decoded, masks as logits, facts in the file.

    Each file is opened again and compared with the network on two batches before it gets its name.
    """

    source: tyro.conf.Positional[Path]
    """run folder, folder of model.safetensors and model.json, or the path of model.safetensors"""
    format: tuple[Format, ...] = ("onnx",)
    """one or more of onnx, torchscript, torch-export, openvino, tensorrt"""
    out: Path | None = None
    """folder to write to (default: where model.safetensors lies)"""
    img_size: tuple[int, int] | None = None
    """fix height and width in pixels, multiples of 32 (default: free, 64 or more;
    TorchScript's are free in any case, TensorRT's always fixed, by default the network's)"""
    batch_size: int | None = None
    """fix the number of images (default: free; TensorRT's 1 to 16)"""
    raw: bool = False
    """give the box head's maps as they are, detection_s8, _s16, _s32, in place of boxes and
    scores"""
    nms: bool = False
    """suppress doubles in the file (onnx, openvino, tensorrt; with half onnx alone): num_detections
    (B,), boxes (B, max_det, 4), scores and labels (B, max_det), best first"""
    conf: float = 0.3
    """with nms: a box needs a higher score"""
    iou: float = 0.45
    """with nms: of two boxes of one class that overlap more the better one stays"""
    max_det: int = 300
    """with nms: at most so many boxes of an image"""
    half: bool = False
    """weights and arithmetic in 16 bits, for GPUs; input and outputs stay 32"""

    def __post_init__(self) -> None:
        """Check ranges and what goes together."""
        check_ranges("", self, {"conf": (0, 1), "iou": (0, 1), "max_det": (1, 10_000)})
        if self.batch_size is not None:
            check_ranges("", self, {"batch_size": (1, 2**20)})
        sides = self.img_size or (MAX_STRIDE,)
        if any(side < MAX_STRIDE or side % MAX_STRIDE for side in sides):
            expected = f"a height and a width that are multiples of {MAX_STRIDE}"
            raise InputError("img_size", self.img_size, expected, "round them")
        if not self.format:
            do = "leave it out for onnx"
            raise InputError("format", "nothing", f"one or more of {', '.join(ENDINGS)}", do)
        others = [name for name in self.format if name not in OF_ONNX]
        if self.nms and others:
            do = "leave out --nms, or export that format alone"
            raise InputError("nms", f"format {others[0]}", ", ".join(OF_ONNX), do)
        if self.nms and self.half and self.format != ("onnx",):
            do = "leave out one of them"
            raise InputError("half", "nms with another format than onnx", "one of the two", do)
        if self.nms and self.raw:
            do = "leave out one of them"
            raise InputError("nms", "raw maps", "decoded boxes", do)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: the file.
        differences: the largest of each output from the network's, in its unit.
        num_suppressed: boxes compared after suppression; None without.
    """

    path: Path
    differences: dict[str, float]
    num_suppressed: int | None = None

    def __str__(self) -> str:
        """One line."""
        size = self.path.stat().st_size / 2**20
        told = ", ".join(f"{name} {value:.1g}" for name, value in self.differences.items())
        line = f"{self.path} ({size:.1f} MiB) differs from the network by at most: {told}"
        if self.num_suppressed is not None:
            line += f"; the same {self.num_suppressed} boxes after suppression"
        return line


def export(cfg: ExportConfig) -> list[Exported]:
    """Write all formats.

    Raises: InputError where the network is none, a package is missing, or a file gives something
        else than the network; no file of that format is left then.
    """
    for name in cfg.format:
        package, do = PACKAGES.get(name, ("torch", ""))
        if importlib.util.find_spec(package) is None:
            raise InputError(f"format {name}", f"no package '{package}'", "it installed", do)
    if "tensorrt" in cfg.format:
        from yolop_mtl.export_tensorrt import check_gpu

        check_gpu()
    deployed = model_io.load(cfg.source)
    shape = Shape(cfg.batch_size, cfg.img_size)
    job, written = _Job(cfg, deployed, shape), []
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(cfg.format):
        if name == "tensorrt" and shape.size is None:
            # An engine is made for one size; the others share what is recorded.
            own = _Job(cfg, deployed, shape._replace(size=deployed.img_size))
            written.append(own.write_tensorrt())
        else:
            written.append(job.writers[name]())
    return written


class _Job:
    """What formats share: the network, its record, and what it gives on the images of the check."""

    def __init__(self, cfg: ExportConfig, deployed: Deployed, shape: Shape) -> None:
        self.cfg, self.shape = cfg, shape
        model = deployed.model
        if model.detection is None and (cfg.nms or cfg.raw):
            got = f"a network for {', '.join(model.tasks)}"
            raise InputError("nms" if cfg.nms else "raw", got, "one for boxes", "leave it out")
        self.folder = cfg.out or (cfg.source if cfg.source.is_dir() else cfg.source.parent)
        self.graph = Deployable(model, is_raw=cfg.raw, is_half=cfg.half)
        self.images = check.images_for(self.shape, deployed.img_size)
        run = check.reference(model, is_raw=cfg.raw)
        self.expected = [run(images) for images in self.images]
        with torch.no_grad():
            self.names = list(self.graph(torch.zeros(self.shape.example)))
        self.facts = export_graph.describe(deployed, self.names, self.shape)
        self.facts["precision"] = "float16" if cfg.half else "float32"
        self.tolerance = check.HALF_TOLERANCE if cfg.half else check.TOLERANCE
        self.suppression = Suppression(conf=cfg.conf, iou=cfg.iou, max_det=cfg.max_det)
        if cfg.nms:
            told = self.suppression.describe()
            masks = {n: t for n, t in self.facts["outputs"].items() if n not in ALL}
            self.facts |= {"nms": told["nms"], "outputs": told["outputs"] | masks}

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        return export_graph.record(self.graph, self.shape)

    @cached_property
    def plain(self) -> "ModelProto":
        """Without suppression."""
        keeps = not self.cfg.nms
        return export_onnx.convert(self.program, self.names, self.shape, keeps_names=keeps)

    @cached_property
    def proto(self) -> "ModelProto":
        proto = self.plain
        if self.cfg.nms:
            proto = export_onnx.with_suppression(proto, self.suppression)
        export_onnx.put_facts(proto, self.facts)
        return proto

    def path(self, what: Format) -> Path:
        kind = "_nms" * self.cfg.nms + "_raw" * self.cfg.raw + "_fp16" * self.cfg.half
        return self.folder / f"model{kind}{ENDINGS[what]}"

    @property
    def writers(self) -> dict[Format, Callable[[], Exported]]:
        return {
            "onnx": self.write_onnx,
            "torchscript": self.write_torchscript,
            "torch-export": self.write_torch_export,
            "openvino": self.write_openvino,
            "tensorrt": self.write_tensorrt,
        }

    # ---- one method per format ---------------------------------------------------------------

    def write_onnx(self) -> Exported:
        import onnx

        with _checked(self.path("onnx")) as path:
            onnx.save(self.proto, path)
            result = self.compared("onnx", check.open_onnx(path))
        return result

    def write_torchscript(self) -> Exported:
        with _checked(self.path("torchscript")) as path, warnings.catch_warnings():
            # torch says that newer forms exist, and names shapes that tracing may have fixed:
            # two sizes are compared below.
            warnings.simplefilter("ignore")
            scripted = export_graph.script(self.graph, self.shape)
            torch.jit.save(scripted, str(path), _extra_files={METADATA: json.dumps(self.facts)})
            result = self.compared("torchscript", check.open_torchscript(path))
        return result

    def write_torch_export(self) -> Exported:
        with _checked(self.path("torch-export")) as path:
            torch.export.save(self.program, path, extra_files={METADATA: json.dumps(self.facts)})
            result = self.compared("torch-export", check.open_torch_export(path))
        return result

    def write_openvino(self) -> Exported:
        import onnx
        import openvino

        with (
            _checked(self.path("openvino"), ".bin") as path,
            tempfile.TemporaryDirectory(prefix="yolop-mtl-") as folder,
        ):
            source = Path(folder) / "model.onnx"
            onnx.save(self.proto, source)
            model = openvino.convert_model(source)
            for key, value in self.facts.items():
                model.set_rt_info(json.dumps(value), ["yolop_mtl", key])
            # Weights as they are: 32 bits, or 16 where half asks for it.
            openvino.save_model(model, path, compress_to_fp16=False)
            result = self.compared(
                "openvino", check.open_openvino(path, list(self.facts["outputs"]))
            )
        return result

    def write_tensorrt(self) -> Exported:
        from yolop_mtl import export_tensorrt

        with _checked(self.path("tensorrt"), ENGINE_FACTS) as path:
            path.write_bytes(export_tensorrt.build(self.proto, self.shape))
            path.with_suffix(ENGINE_FACTS).write_text(json.dumps(self.facts, indent=1) + "\n")
            result = self.compared("tensorrt", export_tensorrt.open_engine(path))
        return result

    # ---- comparison --------------------------------------------------------------------------

    def compared(self, what: Format, run: check.Runner) -> Exported:
        """Against the network."""
        path = self.path(what)
        if not self.cfg.nms:
            outputs = [run(images) for images in self.images]
            found = check.compare(what, outputs, self.expected, self.images, self.tolerance)
            return Exported(path=path, differences=found)
        wide = export_onnx.widened(self.proto, self.plain).SerializeToString()
        expected = [{ALL.get(name, name): x for name, x in e.items()} for e in self.expected]
        count, found = check.compare_suppressed(
            what, run, wide, expected, self.images, self.suppression, self.tolerance
        )
        return Exported(path=path, differences=found, num_suppressed=count)


@contextlib.contextmanager
def _checked(path: Path, beside: str = "") -> Iterator[Path]:
    """Yield another path; it gets its name when the body has written and compared the file.

    Args:
        path: of the file.
        beside: ending of a second file, of the same name.
    """
    temporary = path.with_name(f"unchecked-{path.name}")
    endings = [path.suffix, *([beside] if beside else [])]
    try:
        yield temporary
        for ending in endings:
            temporary.with_suffix(ending).replace(path.with_suffix(ending))
    finally:
        for ending in endings:
            temporary.with_suffix(ending).unlink(missing_ok=True)
