"""Exported files opened again, and what they give compared with the network itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.ops import box_iou

from shared_utils.errors import InputError
from yolop_mtl.boxes import Decoded, Detections, decode, suppress
from yolop_mtl.export_graph import INPUT, Shape, load_torchscript
from yolop_mtl.export_onnx import ALL, FOUND, Suppression
from yolop_mtl.model import MAX_STRIDE, YOLOPv2

TOLERANCE = 1e-4  # of boxes: times the longer side; of scores; of maps: times the largest value
HALF_TOLERANCE = 2e-2
SMALLEST = 0.01  # maps whose values are all smaller are compared as if this were the largest
SAME_IOU, SAME_SCORE = 0.99, 1e-3
SAME_SIDE = 0.01  # pixels; of a box without width IoU says nothing
LOOKED_AT = 50  # boxes of an image that pass the threshold where suppression is compared
OTHER_SIZE, OTHER_BATCH = (128, 64), 3

Outputs = dict[str, Tensor]
Runner = Callable[[Tensor], Outputs]
Tensors = Mapping[str, Tensor]


def open_onnx(model: Path | bytes, **inputs: Tensor) -> Runner:
    """An ONNX file or its bytes in onnxruntime on the CPU.

    Args:
        model: path or serialized model.
        inputs: further ones.
    """
    import onnxruntime

    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    more = {name: value.numpy() for name, value in inputs.items()}

    def run(images: Tensor) -> Outputs:
        found = session.run(names, {INPUT: images.numpy()} | more)
        return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}

    return run


def open_torchscript(path: Path) -> Runner:
    """A TorchScript file that this program wrote."""
    return _quiet(load_torchscript(path))


def open_torch_export(path: Path) -> Runner:
    """A file of torch.export that this program wrote."""
    return _quiet(torch.export.load(path).module())


def open_openvino(path: Path, names: Sequence[str]) -> Runner:
    """An OpenVINO model on the CPU, in 32 bits, which it would leave on CPUs that have bf16.

    Args:
        path: of the .xml.
        names: of its outputs, which may have others beside.
    """
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)

    def run(images: Tensor) -> Outputs:
        found = compiled({INPUT: images.numpy()})
        return {name: torch.from_numpy(found[name].copy()) for name in names}

    return run


def _quiet(module: Any) -> Runner:
    def run(images: Tensor) -> Outputs:
        with torch.no_grad():
            return cast(Outputs, module(images))

    return run


def reference(model: YOLOPv2, *, is_raw: bool) -> Runner:
    """What files must give: the network as it was saved, not folded, its boxes decoded."""

    @torch.no_grad()
    def run(images: Tensor) -> Outputs:
        raw = model(images)
        found: Outputs = {}
        if model.detection is not None:
            maps, strides = raw["detection"], model.detection.strides
            if is_raw:
                named = zip(strides, maps, strict=True)
                found |= {f"detection_s{stride}": x for stride, x in named}
            else:
                found["boxes"], found["scores"] = decode(maps, model.detection.anchors, strides)
        return found | {task: raw[task] for task in ("drivable", "lane") if task in raw}

    return run


def images_for(shape: Shape, img_size: tuple[int, int]) -> list[Tensor]:
    """Two batches of noise, of two sizes and counts where these are free.

    Args:
        shape: of the file's input.
        img_size: the size that the network was trained for.
    """
    first = shape.size or cast(tuple[int, int], tuple(max(2 * MAX_STRIDE, s) for s in img_size))
    second = shape.size or (OTHER_SIZE if first != OTHER_SIZE else OTHER_SIZE[::-1])
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(shape.batch or batch, 3, *size, generator=generator)
        for batch, size in ((1, first), (OTHER_BATCH, second))
    ]


def compare(
    what: str,
    found: Sequence[Tensors],
    expected: Sequence[Tensors],
    images: Sequence[Tensor],
    tolerance: float,
) -> dict[str, float]:
    """The largest difference of each output, in its own unit.

    Args:
        what: the file's format, for the message.
        found: outputs by name, of each batch of images.
        expected: what they must be.
        images: the batches.
        tolerance: of boxes, times the longer side in pixels; of scores; of maps, times the largest
            value.

    Raises: InputError for a difference beyond it, or another set or shape of outputs.
    """
    worst: dict[str, float] = {}
    for batch, got, wanted in zip(images, found, expected, strict=True):
        for name in sorted(got.keys() | wanted.keys()):
            shapes = [tuple(x[name].shape) if name in x else "none" for x in (got, wanted)]
            if shapes[0] != shapes[1]:
                raise refused(f"{what} {name}", f"shape {shapes[0]}", f"{shapes[1]}")
        for name, x in wanted.items():
            difference = float((got[name] - x).abs().max())
            scale = max(SMALLEST, float(x.abs().max()))
            if "boxes" in name:
                scale = float(max(batch.shape[2:]))
            elif "scores" in name:
                scale = 1.0
            if not difference <= tolerance * scale:
                most = f"at most {tolerance * scale:.2g}"
                raise refused(f"{what} {name}", f"a difference of {difference:.2g}", most)
            worst[name] = max(worst.get(name, 0.0), difference)
    return worst


def compare_suppressed(
    what: str,
    run: Runner,
    widened: bytes,
    expected: Sequence[Tensors],
    images: Sequence[Tensor],
    how: Suppression,
    tolerance: float,
) -> tuple[int, dict[str, float]]:
    """As `compare`, of a file with suppression inside.

    Suppression turns a difference of the last digit into another set of boxes. So it is compared on
    the very predictions that it got, which `export_onnx.widened` gives as well, and those with the
    network's; at the file's threshold and at one that some boxes of any network pass.

    Returns: how many boxes were compared, and the differences.
    """
    total, outputs = 0, list[Outputs]()
    for conf in (_confidence_for(expected), how.conf):
        wide = open_onnx(widened, conf=torch.tensor([conf]))
        outputs = [wide(batch) for batch in images]
        used = replace(how, conf=conf)
        total += sum(compare_kept("onnx", found, _decoded(found), used) for found in outputs)
    # Of the file's own threshold from here on.
    masks = [{n: x for n, x in wanted.items() if n not in ALL.values()} for wanted in expected]
    found_masks = []
    for batch, wide_found in zip(images, outputs, strict=True):
        found = run(batch)
        compare_kept(what, found, _decoded(wide_found), how)
        found_masks.append({name: x for name, x in found.items() if name not in FOUND})
    plain = [{name: found[name] for name in expected[0]} for found in outputs]
    worst = compare("onnx", plain, expected, images, tolerance)
    return total, worst | compare(what, found_masks, masks, images, tolerance)


def _confidence_for(found: Sequence[Tensors]) -> float:
    """A threshold that some fifty boxes of an image pass on average, whatever the network."""
    best = torch.cat([x[ALL["scores"]].amax(2).flatten() for x in found])
    count = LOOKED_AT * sum(len(x[ALL["scores"]]) for x in found)
    return float(best.topk(min(count, len(best))).values[-1])


def compare_kept(what: str, found: Tensors, decoded: Decoded, how: Suppression) -> int:
    """Boxes that a file kept against those that `boxes.suppress` keeps; returns how many.

    Args:
        what: the file's format, for the message.
        found: outputs of the file.
        decoded: all boxes and scores.
        how: thresholds.

    Raises: InputError unless each has one partner of its class with IoU > 0.99 (or all sides
        less than 0.01 pixels away) and a score less than 0.001 away, and rows that are no boxes
        say so.
    """
    expected = suppress(
        decoded, conf_threshold=how.conf, iou_threshold=how.iou, max_detections=how.max_det
    )
    for image, wanted in enumerate(expected):
        count = int(found["num_detections"][image])
        boxes, scores, labels = (found[name][image] for name in FOUND[1:])
        if count != len(wanted.scores):
            raise refused(f"{what} num_detections", count, str(len(wanted.scores)))
        rest = (boxes[count:] != 0).any() or (scores[count:] != 0).any()
        if rest or (labels[count:] != -1).any():
            raise refused(f"{what} boxes", "values after the last one", "0, with label -1")
        _check_partners(what, Detections(boxes[:count], scores[:count], labels[:count]), wanted)
    return sum(len(wanted.scores) for wanted in expected)


def _check_partners(what: str, found: Detections, wanted: Detections) -> None:
    """Raise InputError for a box without a partner."""
    overlap = box_iou(found.boxes_xyxy, wanted.boxes_xyxy)
    apart = (found.scores[:, None] - wanted.scores).abs()
    sides = (found.boxes_xyxy[:, None] - wanted.boxes_xyxy).abs().amax(2)
    fits = ((overlap > SAME_IOU) | (sides < SAME_SIDE)) & (apart < SAME_SCORE)
    fits &= found.labels[:, None] == wanted.labels
    free = torch.ones(len(wanted.scores), dtype=torch.bool)
    for row, near in enumerate(fits):
        # Of the free ones the nearest in score: boxes may lie on one another.
        distance = torch.where(near & free, apart[row], torch.inf)
        best = int(distance.argmin())
        if not distance[best] < torch.inf:
            box = ", ".join(f"{side:.1f}" for side in found.boxes_xyxy[row].tolist())
            raise refused(f"{what} boxes", f"({box}) alone", "a box as the network gives it")
        free[best] = False


def _decoded(outputs: Tensors) -> Decoded:
    """All boxes and scores of a widened model."""
    return Decoded(*(outputs[name] for name in ALL.values()))


def refused(field: str, got: object, expected: str) -> InputError:
    """What is raised of a file that is not kept."""
    return InputError(field, got, expected, "no file was kept; report this model")
