"""What is not labelled counts in no loss; how images with different labels are joined."""

import pytest
import torch

from yolop_mtl.assignment import find_candidates, take_all
from yolop_mtl.boxes import build_grid
from yolop_mtl.losses import drivable_loss, known_cells, lane_losses
from yolop_mtl.targets import IGNORE, ImageTargets, Targets, collate_targets

from .raw_outputs import ANCHORS, SIZE, STRIDES, TERMS, criterion, leaves, outputs, truth

# ---- what is not labelled -------------------------------------------------------------------


def test_ignored_pixels_count_in_no_term() -> None:
    out, targets = outputs(), truth()
    drivable, lane = targets.drivable.clone(), targets.lane.clone()
    drivable[:, :20], lane[:, :, 30:] = IGNORE, IGNORE
    found = criterion()(out, targets._replace(drivable=drivable, lane=lane))
    top, side = out["drivable"][:, :, 20:], out["lane"][..., :30]
    assert found["loss_drivable"].item() == pytest.approx(
        drivable_loss(top, drivable[:, 20:]).item(), rel=1e-5
    )
    for term, expected in lane_losses(side, lane[..., :30]).items():
        assert found[term].item() == pytest.approx(expected.item(), rel=1e-5)
    (found["loss_drivable"] + found["loss_lane_iou"] + found["loss_lane_focal"]).backward()
    assert not out["drivable"].grad[:, :, :20].any()
    assert not out["lane"].grad[..., 30:].any()


@pytest.mark.parametrize("reduce", ["image", "batch"])
def test_an_image_without_a_mask_is_left_out_and_not_empty(reduce: str) -> None:
    out, targets = outputs(), truth()
    lane, drivable = targets.lane.clone(), targets.drivable.clone()
    lane[1], drivable[1] = IGNORE, IGNORE
    found = criterion(lane_reduce=reduce)(out, targets._replace(lane=lane, drivable=drivable))
    for term, expected in lane_losses(out["lane"][:1], lane[:1]).items():
        assert found[term].item() == pytest.approx(expected.item(), rel=1e-5)
    expected = drivable_loss(out["drivable"][:1], drivable[:1])
    assert found["loss_drivable"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_image_without_boxes_labelled_is_left_out_and_not_empty() -> None:
    out, targets = outputs(), truth()
    known = torch.ones(2, *SIZE, dtype=torch.bool)
    known[1] = False
    first = targets.images == 0
    partly = targets._replace(
        boxes_cxcywh=targets.boxes_cxcywh[first],
        labels=targets.labels[first],
        images=targets.images[first],
        known=known,
    )
    found = criterion()(out, partly)
    alone = {"detection": [x[:1] for x in out["detection"]]}
    for term, expected in criterion()(alone, partly._replace(known=None)).items():
        assert found[term].item() == pytest.approx(expected.item(), rel=1e-5)
    (found["loss_obj"] + found["loss_box"] + found["loss_cls"]).backward()
    assert not any(x.grad[1].any() for x in out["detection"])


def test_cells_with_an_unknown_pixel_are_ignored_unless_they_answer_for_a_box() -> None:
    known = torch.ones(1, *SIZE, dtype=torch.bool)
    known[0, 16:33, 40:56] = False
    sizes = [(SIZE[0] // s, SIZE[1] // s) for s in STRIDES]
    grid = build_grid(sizes, STRIDES, ANCHORS)
    cells = known_cells(known, sizes, 1, len(grid.scales), known.device)[0]
    for index, (column, row) in enumerate(grid.cells.int().tolist()):
        s = STRIDES[int(grid.scales[index])]
        pixels = known[0, row * s : (row + 1) * s, column * s : (column + 1) * s]
        assert cells[index] == pixels.all()
    out = outputs(batch=1)
    box = Targets(
        torch.tensor([[44.0, 20.0, 14.0, 18.0]]), torch.tensor([0]), torch.tensor([0]), known
    )
    criterion(assign="plain")(out, box)["loss_obj"].backward()
    grad = torch.cat([x.grad.view(3, 7, -1)[:, 4].flatten() for x in out["detection"]])
    positive = torch.zeros(len(grid.scales), dtype=torch.bool)
    positive[take_all(find_candidates(box.boxes_cxcywh, sizes, STRIDES, ANCHORS)).places] = True
    assert (positive & ~cells).any()
    assert torch.equal(grad != 0, cells | positive)


def test_a_batch_with_nothing_labelled_gives_zeros_with_a_gradient_of_zero() -> None:
    out = outputs()
    targets = collate_targets([ImageTargets(None, None), ImageTargets(None, None)], SIZE)
    assert targets.drivable is None
    losses = criterion()(out, targets)
    assert tuple(losses) == TERMS
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert not any(x.grad.any() for x in leaves(out))


def test_tasks_that_are_off_have_no_terms() -> None:
    out = outputs()
    assert list(criterion()({"lane": out["lane"]}, truth())) == list(TERMS[4:])
    assert list(criterion()({"drivable": out["drivable"]}, truth())) == ["loss_drivable"]


# ---- targets --------------------------------------------------------------------------------


def test_images_are_joined_and_what_they_lack_is_unknown() -> None:
    lane = torch.ones(SIZE, dtype=torch.uint8)
    boxes = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    targets = collate_targets(
        [
            ImageTargets(boxes, torch.tensor([0, 1]), lane=lane),
            ImageTargets(None, None),
            ImageTargets(boxes[:1], torch.tensor([2])),
        ],
        SIZE,
    )
    assert targets.images.tolist() == [0, 0, 2]
    assert targets.labels.tolist() == [0, 1, 2]
    assert targets.boxes_cxcywh.shape == (3, 4)
    assert targets.known.all((1, 2)).tolist() == [True, False, True]
    assert targets.drivable is None
    assert [x.unique().tolist() for x in targets.lane] == [[1], [IGNORE], [IGNORE]]
    moved = targets.to("cpu")
    assert torch.equal(moved.lane, targets.lane)
    assert moved.drivable is None
