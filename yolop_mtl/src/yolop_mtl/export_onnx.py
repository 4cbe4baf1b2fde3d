"""The graph as ONNX, with suppression of doubles inside where that is asked for."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from yolop_mtl.export_graph import INPUT, Shape

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18
FOUND = ("num_detections", "boxes", "scores", "labels")
ALL = {"boxes": "all_boxes", "scores": "all_scores"}  # names of what suppression takes

# The best class of every box, one suppression per class and image, then the best boxes of all
# classes. Rows are added at the end, so that there are max_det even of a small image.
SUPPRESSION = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
suppression (
  float[batch, num_predictions, 4] all_boxes, float[batch, num_predictions, num_classes] all_scores
) => (
  int64[batch] num_detections, float[batch, {max_det}, 4] boxes, float[batch, {max_det}] scores,
  int64[batch, {max_det}] labels
)
<
  float[1] conf = {{{conf}}}, float[1] iou = {{{iou}}},
  int64[1] nms_max_det = {{{max_det}}}, int64[1] nms_0 = {{0}}, int64[1] nms_1 = {{1}},
  int64[1] nms_2 = {{2}}, int64 nms_from = {{0}}, int64 nms_step = {{1}},
  int64[2] nms_image_and_box = {{0, 2}}, int64[3] nms_sides = {{1, 1, 4}},
  float nms_low = {{-1.0}}, float nms_nothing = {{0.0}}, int64 nms_no_label = {{-1}}
>
{{
  nms_best = ReduceMax <keepdims = 0> (all_scores, nms_2)
  nms_label = ArgMax <axis = 2, keepdims = 0> (all_scores)
  nms_count = Shape <start = 2, end = 3> (all_scores)
  nms_until = Squeeze (nms_count, nms_0)
  nms_classes = Range (nms_from, nms_until, nms_step)
  nms_label_column = Unsqueeze (nms_label, nms_2)
  nms_is_best = Equal (nms_label_column, nms_classes)
  nms_own = Where (nms_is_best, all_scores, nms_low)
  nms_by_class = Transpose <perm = [0, 2, 1]> (nms_own)
  nms_kept = NonMaxSuppression (all_boxes, nms_by_class, nms_max_det, iou, conf)
  nms_places = Gather <axis = 1> (nms_kept, nms_image_and_box)
  nms_kept_scores = GatherND (nms_best, nms_places)
  nms_shape = Shape (nms_best)
  nms_blank = ConstantOfShape <value = float[1] {{0.0}}> (nms_shape)
  nms_marked = ScatterND (nms_blank, nms_places, nms_kept_scores)
  nms_more = Concat <axis = 0> (nms_0, nms_0, nms_0, nms_max_det)
  nms_more_boxes = Concat <axis = 0> (nms_0, nms_0, nms_0, nms_0, nms_max_det, nms_0)
  nms_marked_long = Pad (nms_marked, nms_more)
  nms_label_long = Pad (nms_label, nms_more)
  nms_boxes_long = Pad (all_boxes, nms_more_boxes)
  scores, nms_index = TopK <axis = 1> (nms_marked_long, nms_max_det)
  nms_is_there = Greater (scores, nms_nothing)
  nms_labels = GatherElements <axis = 1> (nms_label_long, nms_index)
  labels = Where (nms_is_there, nms_labels, nms_no_label)
  nms_index_column = Unsqueeze (nms_index, nms_2)
  nms_index_sides = Expand (nms_index_column, nms_sides)
  nms_boxes = GatherElements <axis = 1> (nms_boxes_long, nms_index_sides)
  nms_is_there_column = Unsqueeze (nms_is_there, nms_2)
  boxes = Where (nms_is_there_column, nms_boxes, nms_nothing)
  nms_ones = Cast <to = 7> (nms_is_there)
  num_detections = ReduceSum <keepdims = 0> (nms_ones, nms_1)
}}
"""


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """What is left of all boxes: see `postprocess.detect`."""

    conf: float
    iou: float
    max_det: int

    def describe(self) -> dict[str, Any]:
        """Plain data for the file, and what its outputs are."""
        count = self.max_det
        return {
            "nms": {"conf": self.conf, "iou": self.iou, "max_det": count},
            "outputs": {
                "num_detections": "(B,) int64: how many of the rows below are boxes",
                "boxes": f"(B, {count}, 4) float32: x1, y1, x2, y2 in pixels of the input, best "
                "first, then 0",
                "scores": f"(B, {count}) float32: 0 to 1, then 0",
                "labels": f"(B, {count}) int64: number of the class, then -1",
            },
        }


def convert(
    program: torch.export.ExportedProgram,
    names: Sequence[str],
    shape: Shape,
    *,
    keeps_names: bool = True,
) -> "ModelProto":
    """The recorded graph as ONNX.

    Args:
        program: of `export_graph.record`.
        names: of its outputs.
        shape: of its input.
        keeps_names: else boxes and scores get the names that suppression takes them by.
    """
    outputs = list(names) if keeps_names else [ALL.get(name, name) for name in names]
    with warnings.catch_warnings():
        # The exporter warns of its own internals; what counts is compared afterwards.
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program,
            (torch.zeros(shape.example),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=outputs,
            verbose=False,
        )
    if made is None:
        raise RuntimeError("torch.onnx.export gave no program")
    proto = made.model_proto
    _name_dims(proto)
    for value in (*proto.graph.node, *proto.graph.value_info):
        # Where in this program's source each came from: a third of a small file.
        del value.metadata_props[:]
    return proto


def with_suppression(proto: "ModelProto", how: Suppression) -> "ModelProto":
    """The model with `num_detections`, `boxes`, `scores`, `labels` in place of all boxes."""
    from onnx import compose, parser

    text = SUPPRESSION.format(
        ir_version=proto.ir_version,
        opset=OPSET,
        conf=repr(how.conf),
        iou=repr(how.iou),
        max_det=how.max_det,
    )
    tail = parser.parse_model(text)
    names = list(ALL.values())
    merged = compose.merge_models(proto, tail, io_map=[(name, name) for name in names])
    others = [x for x in proto.graph.output if x.name not in names]
    del merged.graph.output[:]
    merged.graph.output.extend([*tail.graph.output, *others])
    return merged


def widened(proto: "ModelProto", plain: "ModelProto") -> "ModelProto":
    """A copy to check suppression by: it also gives all boxes and scores, and takes `conf`.

    Args:
        proto: of `with_suppression`.
        plain: what it was made of.
    """
    from onnx import ModelProto, TensorProto, helper

    copy = ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.extend(x for x in plain.graph.output if x.name in ALL.values())
    constants = [x for x in copy.graph.initializer if x.name != "conf"]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(constants)
    copy.graph.input.append(helper.make_tensor_value_info("conf", TensorProto.FLOAT, [1]))
    return copy


def put_facts(proto: "ModelProto", facts: Mapping[str, Any]) -> None:
    """Write each fact as JSON into the file's metadata."""
    from onnx import helper

    helper.set_model_props(proto, {key: json.dumps(value) for key, value in facts.items()})


def _name_dims(proto: "ModelProto") -> None:
    """Give free dimensions of input and outputs names that a person understands."""
    found = [dim.dim_param for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    named = zip(found, ("batch", "channels", "height", "width"), strict=True)
    names = {symbol: name for symbol, name in named if symbol}
    for value in (*proto.graph.input, *proto.graph.output):
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
            elif dim.dim_param:
                stride = value.name.rpartition("_s")[2]
                side = f"{('height', 'width')[place % 2]}/{stride}"
                dim.dim_param = side if stride.isdigit() else "num_predictions"
