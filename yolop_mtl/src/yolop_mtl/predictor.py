"""A trained network ready for use: images in, boxes, areas and lanes in their own pixels out.

    predictor = yolop_mtl.load("runs/yolop_mtl/NAME")
    result = predictor("street.jpg")  # or NumPy, PIL, a tensor, a list of them

The three steps of a call, `prepare`, `forward` and `finish`, can be called one by one, so that they
run at the same time on different images.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from shared_utils.errors import InputError, near_miss
from yolop_mtl import model_io, packed
from yolop_mtl.boxes import Detections
from yolop_mtl.config import Precision
from yolop_mtl.geometry import Letterbox, Pixels, fit, fit_long_side
from yolop_mtl.model import MAX_STRIDE, YOLOPv2, fuse
from yolop_mtl.pixels import Picture, to_rgb
from yolop_mtl.postprocess import detect, native_detections, native_drivable, native_lane
from yolop_mtl.result import Result
from yolop_mtl.subpixel import to_subpixel

__all__ = ["Picture", "Predictor", "Result", "load"]

LOWER: dict[str, torch.dtype | None] = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
SHIPPED = "assets/nano"  # in the package


class Predictor:
    """A network with what is done before and after it.

    Attributes:
        model: fused, in eval mode, channels last, on `device`; on a CPU packed for oneDNN, unless
            it is compiled.
        class_names: of boxes, by number.
        img_size: (H, W) of the network's input; with `long_side` that of an image of its aspect.
        long_side: longer side of the input, whose other side follows the images; None: all inputs
            are of `img_size`.
        device: that the network runs on.
        conf: a box needs a higher score.
        iou: of two boxes of one class that overlap more, the better one stays.
        lane_threshold: a lane pixel needs a higher probability.
        bridge_dashes: whether lane lines go on over the gaps between their dashes.
    """

    def __init__(
        self,
        model: YOLOPv2,
        *,
        class_names: Sequence[str],
        img_size: tuple[int, int],
        long_side: int | None = None,
        device: torch.device | str = "cpu",
        precision: Precision = "32-true",
        conf: float = 0.3,
        iou: float = 0.45,
        lane_threshold: float = 0.5,
        bridge_dashes: bool = False,
        compile: bool = False,
    ) -> None:
        """Make a network ready; it is changed: folded, and moved to the device.

        Raises: InputError for a value out of range, or where the network cannot be compiled.
        """
        for name, value in (("conf", conf), ("iou", iou), ("lane_threshold", lane_threshold)):
            if not 0 <= value <= 1:
                raise InputError(name, value, "0 to 1", "correct it")
        if precision not in LOWER:
            do = near_miss(str(precision), LOWER)
            raise InputError("precision", f"'{precision}'", "a known one", do)
        fit((1, 1), img_size)  # checks it
        self.class_names, self.img_size, self.long_side = tuple(class_names), img_size, long_side
        self.conf, self.iou, self.lane_threshold = conf, iou, lane_threshold
        self.bridge_dashes = bridge_dashes
        self.device = torch.device(device)
        fused = cast(YOLOPv2, fuse(model.eval(), completely=True))
        fused.requires_grad_(False)
        if self.device.type == "cpu":
            to_subpixel(fused)
        # Not in the types of Module.to.
        self.model = fused.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._lower = LOWER[precision]
        is_on_cpu = self.device.type == "cpu" and packed.is_available()
        if is_on_cpu and not compile and self._lower != torch.float16:
            packed.pack(self.model, img_size, dtype=self._lower)
            self._lower = None  # done
        elif self._lower is not None:
            _lower_kernels(self.model, self._lower)
        self._run: Any = torch.compile(self.model) if compile else self.model
        if compile:
            self._warm_up()

    def __repr__(self) -> str:
        height, width = self.img_size
        tasks = ", ".join(self.model.tasks)
        return f"Predictor({tasks}; {height} x {width}; {self.device})"

    @overload
    def __call__(self, images: Picture) -> Result: ...

    @overload
    def __call__(self, images: list[Picture] | tuple[Picture, ...]) -> list[Result]: ...

    def __call__(
        self, images: Picture | list[Picture] | tuple[Picture, ...]
    ) -> Result | list[Result]:
        """Find boxes, drivable area and lanes.

        Args:
            images: one, or a list of them, of any sizes, which is one batch: the path of a JPEG,
                PNG or WebP file, NumPy (h, w, 3) uint8 RGB, PIL, or a tensor (3, h, w) RGB, either
                uint8 or floating point from 0 to 1, on any device. Files and PIL images are turned
                as their EXIF entry says. Nothing of them is changed.

        Returns: a `Result`, or a list of them in the same order.

        Raises: InputError for what is no such image; MissingFileError.
        """
        if isinstance(images, list | tuple):
            pixels = [to_rgb(image) for image in images]
            return self._predict(pixels) if pixels else []
        return self._predict([to_rgb(images)])[0]

    def _predict(self, images: Sequence[Pixels]) -> list[Result]:
        batch, letterboxes = self.prepare(images)
        return self.finish(self.forward(batch), letterboxes, images)

    def prepare(self, images: Sequence[Pixels]) -> tuple[Tensor, list[Letterbox]]:
        """Letterbox images into one batch.

        Args:
            images: (h, w, 3) uint8 RGB each, one or more.

        Returns: (B, 3, H, W) uint8 on the CPU, and how each image lies in it.

        Raises: InputError for an image of no pixels.
        """
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        outer = self.img_size
        if self.long_side is not None:
            wanted = [fit_long_side(size, self.long_side).outer for size in sizes]
            outer = (max(height for height, _ in wanted), max(width for _, width in wanted))
        letterboxes = [fit(size, outer) for size in sizes]
        batch = np.stack([box.image(image) for box, image in zip(letterboxes, images, strict=True)])
        return torch.from_numpy(batch).permute(0, 3, 1, 2), letterboxes

    @torch.inference_mode()
    def forward(self, batch: Tensor) -> dict[str, Any]:
        """Raw outputs, as `YOLOPv2` gives them.

        Args:
            batch: (B, 3, H, W) uint8, RGB, on any device.
        """
        images = batch.to(self.device, non_blocking=True)
        images = images.to(dtype=torch.float32, memory_format=torch.channels_last).div_(255)
        context: AbstractContextManager[Any] = nullcontext()
        if self._lower is not None:
            context = torch.autocast(self.device.type, dtype=self._lower)
        with context:
            return cast(dict[str, Any], self._run(images))

    @torch.inference_mode()
    def finish(
        self, raw: dict[str, Any], letterboxes: Sequence[Letterbox], images: Sequence[Pixels]
    ) -> list[Result]:
        """From raw outputs to results in the pixels of each image.

        Args:
            raw: of `forward`.
            letterboxes: of `prepare`.
            images: that `prepare` got.
        """
        count = len(images)
        found: list[Detections | None] = [None] * count
        if self.model.detection is not None:
            maps = [x.float() for x in raw["detection"]]
            anchors = self.model.detection.anchors
            found = list(detect(maps, anchors, conf=self.conf, iou=self.iou))
        results = []
        for row, (box, image) in enumerate(zip(letterboxes, images, strict=True)):
            one = found[row]
            native = None if one is None else native_detections(one, box)
            drivable = native_drivable(raw["drivable"][row], box) if "drivable" in raw else None
            lanes = None
            if "lane" in raw:
                lanes = native_lane(raw["lane"][row], box, self.lane_threshold)
            results.append(
                Result(
                    image=image,
                    class_names=self.class_names,
                    boxes_xyxy=_table(native, "boxes_xyxy", np.float32, (0, 4)),
                    scores=_table(native, "scores", np.float32, (0,)),
                    labels=_table(native, "labels", np.int64, (0,)),
                    drivable=None if drivable is None else drivable > 0,
                    drivable_class=drivable,
                    lanes=lanes,
                    bridge_dashes=self.bridge_dashes,
                )
            )
        return results

    def _warm_up(self) -> None:
        """Compile now, so that what is missing shows now. Raises: InputError."""
        try:
            self.forward(torch.zeros(1, 3, *self.img_size, dtype=torch.uint8))
        except Exception as error:  # of compilers and drivers, in many types
            got = f"'{str(error).strip().splitlines()[0]}' from the compiler"
            do = "install a C++ compiler or leave compile out"
            raise InputError("compile", got, "a network that compiles", do) from error


def load(
    source: str | Path | None = None,
    *,
    device: str = "auto",
    precision: Precision = "32-true",
    img_size: int | Sequence[int] | None = None,
    conf: float = 0.3,
    iou: float = 0.45,
    lane_threshold: float = 0.5,
    bridge_dashes: bool = False,
    compile: bool = False,
) -> Predictor:
    """Read a network and make it ready for use.

    Args:
        source: run folder, another folder with model.safetensors and model.json, or the path of
            model.safetensors. None: the small network that comes with the package, trained on
            generated scenes only.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1 ...
        precision: 32-true, bf16-mixed or 16-mixed (autocast).
        img_size: (H, W) of the network's input, multiples of 32; or its longer side alone, when the
            other one follows the images. None: as the network was trained.
        conf: a box needs a higher score, 0 to 1.
        iou: of two boxes of one class that overlap more, the better one stays.
        lane_threshold: a lane pixel needs a higher probability.
        bridge_dashes: draw lane lines over the gaps between their dashes, where no lane pixel is.
        compile: with `torch.compile`, which takes a minute and a C++ compiler on a CPU.

    Raises: MissingFileError; InputError where the files are damaged or do not belong together, or a
        value cannot be.
    """
    chosen = choose_device(device)
    deployed = model_io.load(_shipped() if source is None else Path(source))
    size, long_side = _input_size(img_size, deployed.img_size)
    return Predictor(
        deployed.model,
        class_names=deployed.class_names,
        img_size=size,
        long_side=long_side,
        device=chosen,
        precision=precision,
        conf=conf,
        iou=iou,
        lane_threshold=lane_threshold,
        bridge_dashes=bridge_dashes,
        compile=compile,
    )


def choose_device(name: str) -> torch.device:
    """The device of a name; auto is a GPU where there is one. Raises: InputError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        got = f"'{name}' ({str(error).splitlines()[0].rstrip('.')})"
        raise InputError("device", got, "what this machine has", "use auto or cpu") from error
    if device.type == "meta":
        raise InputError("device", f"'{name}'", "what this machine has", "use auto or cpu")
    return device


def _shipped() -> Path:
    folder = Path(str(resources.files("yolop_mtl").joinpath(SHIPPED)))
    if not (folder / model_io.WEIGHTS).is_file():
        got, expected = "none, and no weights come with this installation", "a network"
        raise InputError("weights", got, expected, "name a run folder or a model.safetensors")
    return folder


def _input_size(
    wanted: int | Sequence[int] | None, own: tuple[int, int]
) -> tuple[tuple[int, int], int | None]:
    """(H, W) of the input, and its longer side where that decides alone."""
    if wanted is None:
        return own, None
    sides = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    if len(sides) == 1:
        if sides[0] < MAX_STRIDE:
            raise InputError("img_size", sides[0], f"a multiple of {MAX_STRIDE}", "raise it")
        return fit_long_side(own, sides[0]).outer, sides[0]
    if len(sides) != 2:
        do = "name height and width, or the longer side"
        raise InputError("img_size", f"{len(sides)} numbers", "one or two", do)
    return fit((1, 1), (sides[0], sides[1])).outer, None


def _lower_kernels(model: nn.Module, dtype: torch.dtype) -> None:
    """Store kernels as autocast would cast them in every pass: same numbers, without the work."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.to(dtype)


def _table(found: Detections | None, name: str, kind: Any, empty: tuple[int, ...]) -> Any:
    """A column of the detections as NumPy; of no row where the network finds no boxes."""
    if found is None:
        return np.zeros(empty, dtype=kind)
    return getattr(found, name).numpy().astype(kind, copy=False)
