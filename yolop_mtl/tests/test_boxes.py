"""Boxes: decoding and its limits, overlap, suppression."""

import pytest
import torch
from torchvision.ops import box_convert, box_iou, complete_box_iou_loss

from yolop_mtl import boxes, build_model
from yolop_mtl.boxes import COCO_ANCHORS, Decoded, box_overlap, decode, suppress

STRIDES = (8, 16, 32)
ANCHORS = torch.tensor(COCO_ANCHORS, dtype=torch.float32)


def maps(height: int, width: int, num_classes: int = 1, batch: int = 1) -> list[torch.Tensor]:
    channels = 3 * (5 + num_classes)
    return [torch.zeros(batch, channels, height // s, width // s) for s in STRIDES]


def test_anchors_are_those_of_the_released_graph() -> None:
    assert build_model("nano").detection.anchors.flatten().tolist() == [
        *(12, 16, 19, 36, 40, 28),
        *(36, 75, 76, 55, 72, 146),
        *(142, 110, 192, 243, 459, 401),
    ]
    assert "detection.anchors" in build_model("nano").state_dict()


def test_zero_logits_give_anchors_in_the_middle_of_their_cells() -> None:
    decoded = decode(maps(64, 96), ANCHORS, STRIDES)
    assert decoded.boxes_xyxy.shape == (1, 3 * (8 * 12 + 4 * 6 + 2 * 3), 4)
    found = box_convert(decoded.boxes_xyxy[0], "xyxy", "cxcywh")
    expected = [
        [(column + 0.5) * stride, (row + 0.5) * stride, width, height]
        for stride, anchors in zip(STRIDES, COCO_ANCHORS, strict=True)
        for width, height in anchors
        for row in range(64 // stride)
        for column in range(96 // stride)
    ]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)
    assert torch.equal(decoded.scores, torch.full_like(decoded.scores, 0.5))


def test_limits_of_decoding() -> None:
    grid = boxes.build_grid([(4, 4), (2, 2), (1, 1)], STRIDES, ANCHORS)
    for raw, centre, side in ((-40.0, -0.5, 0.0), (40.0, 1.5, 4.0)):
        box = boxes.decode_boxes(torch.full((len(grid.scales), 4), raw), *grid[:3])
        offset = box[:, :2] / grid.strides[:, None] - grid.cells
        assert torch.allclose(offset, torch.full_like(offset, centre))
        assert torch.allclose(box[:, 2:], side * grid.anchors)


def test_maps_are_read_anchor_after_anchor() -> None:
    raw = [torch.randn(2, 3 * 7, 64 // s, 96 // s) for s in STRIDES]
    decoded = decode(raw, ANCHORS, STRIDES)
    number = 0
    for x, stride, anchors in zip(raw, STRIDES, COCO_ANCHORS, strict=True):
        view = x.view(2, 3, 7, 64 // stride, 96 // stride)
        for anchor, row, column in ((0, 0, 0), (1, 1, 2), (2, 0, 1)):
            share = view[1, anchor, :, row, column].sigmoid().tolist()
            centre = (2 * share[0] - 0.5 + column) * stride, (2 * share[1] - 0.5 + row) * stride
            size = [(2 * share[2 + i]) ** 2 * anchors[anchor][i] for i in (0, 1)]
            cells = x.shape[2] * x.shape[3]
            index = number + anchor * cells + row * x.shape[3] + column
            box = box_convert(decoded.boxes_xyxy[1, index], "xyxy", "cxcywh")
            assert box.tolist() == pytest.approx([*centre, *size], abs=1e-3)
            scores = [share[4] * share[5], share[4] * share[6]]
            assert decoded.scores[1, index].tolist() == pytest.approx(scores, abs=1e-6)
        number += 3 * x.shape[2] * x.shape[3]


def test_one_class_is_scored_by_objectness_alone() -> None:
    raw = torch.randn(5, 6)
    assert torch.equal(boxes.score_classes(raw), raw[:, 4:5].sigmoid())


def test_encoding_is_the_inverse_of_decoding() -> None:
    grid = boxes.build_grid([(4, 6), (2, 3)], (8, 16), ANCHORS[:2])
    raw = torch.randn(len(grid.scales), 4)
    box = boxes.decode_boxes(raw, *grid[:3])
    assert torch.allclose(boxes.encode_boxes(box, *grid[:3]), raw, atol=1e-3)


def test_half_precision_maps_are_decoded_in_single() -> None:
    decoded = decode([x.bfloat16() for x in maps(32, 32)], ANCHORS, STRIDES)
    assert decoded.boxes_xyxy.dtype == decoded.scores.dtype == torch.float32


# ---- overlap --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "other", "iou", "loss"),
    [
        ((0, 0, 2, 2), (1, 1, 3, 3), 0.142857, 0.968254),
        ((0, 0, 4, 2), (0, 0, 2, 4), 0.333333, 0.762918),
        ((0, 0, 1, 1), (2, 0, 3, 1), 0.0, 1.4),
        ((1, 2, 5, 4), (1, 2, 5, 4), 1.0, 0.0),
    ],
)
def test_overlap_in_closed_form(
    box: tuple[int], other: tuple[int], iou: float, loss: float
) -> None:
    found, complete = box_overlap(torch.tensor(box).float(), torch.tensor(other).float())
    assert found.item() == pytest.approx(iou, abs=1e-6)
    assert 1 - complete.item() == pytest.approx(loss, abs=1e-6)


def test_overlap_equals_torchvisions_and_so_does_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(50, 2, generator=generator, dtype=torch.float64) * 8
    sides = torch.rand(50, 2, generator=generator, dtype=torch.float64) * 8 + 1
    mine = torch.cat([corner, corner + sides], 1).requires_grad_()
    other = torch.cat([corner.flip(0), corner.flip(0) + sides.roll(7, 0)], 1)
    iou, complete = box_overlap(mine, other)
    assert torch.allclose(iou, box_iou(mine, other).diag(), atol=1e-8)
    (gradient,) = torch.autograd.grad(complete.sum(), mine)
    loss = complete_box_iou_loss(mine, other, eps=1e-9, reduction="sum")
    assert loss.item() == pytest.approx(50 - complete.sum().item(), abs=1e-6)
    (expected,) = torch.autograd.grad(loss, mine)
    assert torch.allclose(gradient, -expected, atol=1e-6)


def test_overlap_of_boxes_without_area_is_finite() -> None:
    mine = torch.zeros(2, 4, requires_grad=True)
    _, complete = box_overlap(mine, torch.tensor([[0.0, 0, 0, 0], [1, 1, 2, 2]]))
    complete.sum().backward()
    assert complete.isfinite().all()
    assert mine.grad.isfinite().all()


# ---- suppression ----------------------------------------------------------------------------


def plain_nms(
    boxes_xyxy: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float
) -> list[int]:
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        rivals = [k for k in kept if labels[k] == labels[index]]
        if all(box_iou(boxes_xyxy[[k]], boxes_xyxy[[index]]) <= threshold for k in rivals):
            kept.append(index)
    return kept


@pytest.fixture
def crowd() -> Decoded:
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(2, 60, 2, generator=generator) * 20
    sides = torch.rand(2, 60, 2, generator=generator) * 20 + 5
    scores = torch.rand(2, 60, 3, generator=generator)
    return Decoded(torch.cat([corner, corner + sides], 2), scores)


@pytest.mark.parametrize("is_class_agnostic", [False, True])
def test_suppression_equals_a_plain_loop(crowd: Decoded, is_class_agnostic: bool) -> None:
    found = suppress(
        crowd, conf_threshold=0.5, iou_threshold=0.3, is_class_agnostic=is_class_agnostic
    )
    assert len(found) == 2
    for boxes_xyxy, table, result in zip(*crowd, found, strict=True):
        scores, labels = table.max(1)
        rows = (scores > 0.5).nonzero()[:, 0]
        groups = torch.zeros_like(labels) if is_class_agnostic else labels
        kept = rows[plain_nms(boxes_xyxy[rows], scores[rows], groups[rows], 0.3)]
        assert torch.equal(result.boxes_xyxy, boxes_xyxy[kept])
        assert torch.equal(result.scores, scores[kept])
        assert torch.equal(result.labels, labels[kept])


def test_a_box_may_have_several_labels(crowd: Decoded) -> None:
    many = suppress(crowd, conf_threshold=0.5, iou_threshold=1.0, is_multi_label=True)
    assert [len(x.scores) for x in many] == (crowd.scores > 0.5).sum((1, 2)).tolist()


def test_the_best_are_kept_and_nothing_is_possible(crowd: Decoded) -> None:
    few = suppress(crowd, conf_threshold=0.0, iou_threshold=1.0, max_detections=4)
    assert torch.equal(few[0].scores, crowd.scores[0].amax(1).topk(4).values)
    none = suppress(crowd, conf_threshold=1.0)
    assert [x.boxes_xyxy.shape for x in none] == [(0, 4)] * 2


def test_too_many_candidates_are_told(crowd: Decoded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "MAX_CANDIDATES", 10)
    with pytest.warns(UserWarning, match="60 boxes of an image pass conf_threshold 0.0; the best"):
        found = suppress(crowd, conf_threshold=0.0, iou_threshold=1.0)
    assert torch.equal(found[0].scores, crowd.scores[0].amax(1).topk(10).values)
