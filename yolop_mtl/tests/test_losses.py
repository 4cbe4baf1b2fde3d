"""Losses: closed forms and gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from yolop_mtl.assignment import find_candidates, take_all
from yolop_mtl.boxes import build_grid, encode_boxes, flatten
from yolop_mtl.losses import detection_losses, drivable_loss, lane_losses
from yolop_mtl.targets import ImageTargets, Targets, collate_targets

from .raw_outputs import ANCHORS, SIZE, STRIDES, TERMS, criterion, leaves, outputs, truth

# ---- masks: closed forms --------------------------------------------------------------------

P = torch.tensor([0.9, 0.8, 0.1, 0.2])
LOGITS = P.logit().view(1, 1, 2, 2)
MASK = torch.tensor([1, 1, 0, 0], dtype=torch.uint8).view(1, 2, 2)


def test_lane_terms_in_closed_form() -> None:
    losses = lane_losses(LOGITS, MASK, smooth=0.0)
    assert losses["loss_lane_focal"].item() == pytest.approx(0.00249484, rel=1e-5)
    assert losses["loss_lane_dice"].item() == pytest.approx(0.15, abs=1e-6)
    assert losses["loss_lane_iou"].item() == pytest.approx(1 - 0.739130, abs=1e-6)


def test_tverskys_focal_form() -> None:
    losses = lane_losses(LOGITS, MASK, smooth=0.0, fp=0.7, fn=0.3, exponent=4 / 3)
    assert losses["loss_lane_dice"].item() == pytest.approx(0.0796994, abs=1e-6)


@pytest.mark.parametrize(
    ("p", "is_lane", "expected"),
    [(0.9, 1, 2.63401e-4), (0.9, 0, 1.398820), (0.5, 1, 0.0433217), (0.5, 0, 0.1299651)],
)
def test_focal_term_in_closed_form(p: float, is_lane: int, expected: float) -> None:
    logits = torch.full((1, 1, 3, 3), p).logit()
    mask = torch.full((1, 3, 3), is_lane, dtype=torch.uint8)
    found = lane_losses(logits, mask)["loss_lane_focal"].item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_iou_term_follows_from_the_dice_term(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 1, 5, 7, generator=generator)
    mask = torch.randint(2, (1, 5, 7), generator=generator)
    losses = lane_losses(logits, mask, smooth=0.0)
    dice = losses["loss_lane_dice"].item()
    assert losses["loss_lane_iou"].item() == pytest.approx(2 * dice / (1 + dice), abs=1e-6)


def test_smoothing_is_one_in_numerator_and_denominator() -> None:
    losses = lane_losses(LOGITS, MASK)
    assert losses["loss_lane_dice"].item() == pytest.approx(1 - (3.4 + 1) / (4 + 1), abs=1e-6)
    assert losses["loss_lane_iou"].item() == pytest.approx(1 - (1.7 + 1) / (2.3 + 1), abs=1e-6)


def test_zero_logits() -> None:
    losses = criterion(balance=(1, 1, 1), assign="plain")(outputs(fill=0.0), truth())
    assert losses["loss_drivable"].item() == pytest.approx(math.log(2), abs=1e-6)
    # Once for each scale.
    assert losses["loss_obj"].item() == pytest.approx(3 * math.log(2), abs=1e-5)
    assert losses["loss_cls"].item() == pytest.approx(3 * math.log(2), abs=1e-5)


def test_a_perfect_drivable_prediction_costs_nothing() -> None:
    # A sigmoid before the loss, as the released model's log shows it, would leave 0.503204.
    mask = truth().drivable
    logits = torch.stack([20.0 - 40 * mask, 40.0 * mask - 20], 1)
    assert drivable_loss(logits, mask).item() < 1e-6
    faulty = [math.log(1 + math.exp(-1)), math.log(2)]
    assert sum(faulty) / 2 == pytest.approx(0.503204, abs=1e-6)


def test_drivable_loss_equals_a_plain_mean() -> None:
    logits, mask = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    expected = -sum(
        logits[b, :, y, x].log_softmax(0)[mask[b, y, x]]
        for b in range(2) for y in range(4) for x in range(5)
    )  # fmt: skip
    assert drivable_loss(logits, mask).item() == pytest.approx(expected.item() / 40, abs=1e-5)


def test_overlap_of_images_or_of_the_batch() -> None:
    logits = torch.cat([LOGITS, -LOGITS])
    masks = MASK.repeat(2, 1, 1)
    per_image = lane_losses(logits, masks, smooth=0.0)["loss_lane_dice"].item()
    assert per_image == pytest.approx((0.15 + 0.85) / 2, abs=1e-6)
    masks[1] = torch.tensor([[1, 1], [1, 1]])  # then the two ways differ
    per_batch = lane_losses(logits, masks, smooth=0.0, reduce="batch")["loss_lane_dice"].item()
    # TP 1.7 + 2, sum of p 2 + 2, sum of g 2 + 4.
    assert per_batch == pytest.approx(1 - 2 * 3.7 / 10, abs=1e-6)


# ---- boxes ----------------------------------------------------------------------------------


def test_detection_terms_equal_a_plain_loop() -> None:
    out, targets = outputs(num_classes=3), truth(3)
    losses = detection_losses(out["detection"], targets, ANCHORS, STRIDES, assign="plain")
    sizes = [x.shape[2:] for x in out["detection"]]
    grid = build_grid([tuple(s) for s in sizes], STRIDES, ANCHORS)
    raw = flatten(out["detection"], 3)
    positives = take_all(find_candidates(targets.boxes_cxcywh, sizes, STRIDES, ANCHORS))
    box_terms: list[list[float]] = [[], [], []]
    cls_terms: list[list[float]] = [[], [], []]
    wanted = torch.zeros(raw.shape[:2])
    for box, index in zip(*(x.tolist() for x in positives), strict=True):
        image, scale = int(targets.images[box]), int(grid.scales[index])
        share = raw[image, index].sigmoid().detach()
        stride = STRIDES[scale]
        # In cell units, by hand.
        px, py = (2 * share[:2] - 0.5 + grid.cells[index]).tolist()
        pw, ph = ((2 * share[2:4]) ** 2 * grid.anchors[index] / stride).tolist()
        tx, ty, tw, th = (targets.boxes_cxcywh[box] / stride).tolist()
        wide = min(px + pw / 2, tx + tw / 2) - max(px - pw / 2, tx - tw / 2)
        high = min(py + ph / 2, ty + th / 2) - max(py - ph / 2, ty - th / 2)
        inner = max(wide, 0) * max(high, 0)
        iou = inner / (pw * ph + tw * th - inner)
        cw = max(px + pw / 2, tx + tw / 2) - min(px - pw / 2, tx - tw / 2)
        ch = max(py + ph / 2, ty + th / 2) - min(py - ph / 2, ty - th / 2)
        v = 4 / math.pi**2 * (math.atan(tw / th) - math.atan(pw / ph)) ** 2
        alpha = v / (1 - iou + v)
        ciou = iou - ((px - tx) ** 2 + (py - ty) ** 2) / (cw**2 + ch**2) - alpha * v
        box_terms[scale].append(1 - ciou)
        one_hot = F.one_hot(targets.labels[box], 3).float()
        cls_terms[scale].append(F.binary_cross_entropy(share[5:], one_hot).item())
        wanted[image, index] = max(wanted[image, index].item(), iou)
    assert all(box_terms)  # every scale has some
    mean = [sum(x) / len(x) for x in box_terms]
    assert losses["loss_box"].item() == pytest.approx(sum(mean), rel=1e-4)
    mean = [sum(x) / len(x) for x in cls_terms]
    assert losses["loss_cls"].item() == pytest.approx(sum(mean), rel=1e-4)
    expected = sum(
        weight
        * F.binary_cross_entropy_with_logits(
            raw[:, grid.scales == scale, 4], wanted[:, grid.scales == scale]
        ).item()
        for scale, weight in enumerate((4, 1, 0.4))
    )
    assert losses["loss_obj"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("assign", ["ota", "plain"])
def test_a_perfect_prediction_costs_nothing(assign: str) -> None:
    targets = Targets(
        boxes_cxcywh=torch.tensor([[30.0, 20.0, 30.0, 20.0]]),
        labels=torch.tensor([1]),
        images=torch.tensor([0]),
    )
    sizes = [(SIZE[0] // s, SIZE[1] // s) for s in STRIDES]
    grid = build_grid(sizes, STRIDES, ANCHORS)
    raw = torch.full((1, len(grid.scales), 7), -20.0)
    positives = take_all(find_candidates(targets.boxes_cxcywh, sizes, STRIDES, ANCHORS))
    index = positives.places
    raw[0, index, :4] = encode_boxes(
        targets.boxes_cxcywh, grid.cells[index], grid.strides[index], grid.anchors[index]
    )
    raw[0, index, 4] = raw[0, index, 6] = 20.0
    maps = [
        part.view(1, 3, *size, 7).permute(0, 1, 4, 2, 3).flatten(1, 2)
        for part, size in zip(raw.split([3 * h * w for h, w in sizes], 1), sizes, strict=True)
    ]
    losses = detection_losses(maps, targets, ANCHORS, STRIDES, assign=assign)
    assert losses["loss_box"].item() == pytest.approx(0, abs=1e-4)
    assert losses["loss_cls"].item() == pytest.approx(0, abs=1e-4)
    # OTA leaves perfect places without an object: ten of eighteen are taken.
    assert (losses["loss_obj"].item() < 1e-2) == (assign == "plain")


def test_the_class_term_is_zero_for_one_class() -> None:
    losses = criterion()(outputs(num_classes=1), truth(1))
    assert losses["loss_cls"].item() == 0
    assert losses["loss_box"].item() > 0


def test_the_focal_exponent_weighs_both_cross_entropies_down() -> None:
    plain = criterion()(outputs(), truth())
    focal = criterion(focal_gamma=1.5)(outputs(), truth())
    assert focal["loss_obj"] < plain["loss_obj"]
    assert focal["loss_cls"] < plain["loss_cls"]
    assert focal["loss_box"] == plain["loss_box"]
    # -ln p times (1 - p)² at zero logits and targets 0.
    empty = truth()._replace(
        boxes_cxcywh=torch.zeros(0, 4), labels=torch.zeros(0).long(), images=torch.zeros(0).long()
    )
    focal = criterion(focal_gamma=2.0, balance=(1, 0, 0))(outputs(fill=0.0), empty)
    assert focal["loss_obj"].item() == pytest.approx(math.log(2) / 4, abs=1e-6)


# ---- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", ["ota", "plain"])
def test_every_term_alone_gives_a_gradient_to_its_own_task(assign: str) -> None:
    owners = {"loss_drivable": [3]} | {f"loss_lane_{t}": [4] for t in ("focal", "dice", "iou")}
    assert tuple(criterion()(outputs(), truth())) == TERMS
    for term in TERMS:
        out = outputs()
        loss = criterion(assign=assign)(out, truth())[term]
        assert loss.shape == ()
        loss.backward()
        reached = [x.grad is not None and bool(x.grad.any()) for x in leaves(out)]
        own = owners.get(term)
        if own is None:
            assert reached[3:] == [False, False]
            assert any(reached[:3])
        else:
            assert reached == [i in own for i in range(5)]
        assert all(x.grad is None or x.grad.isfinite().all() for x in leaves(out))


def test_no_targets_at_all() -> None:
    out = outputs()
    empty = ImageTargets(
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        drivable=torch.zeros(SIZE),
        lane=torch.zeros(SIZE),
    )
    losses = criterion()(out, collate_targets([empty, empty], SIZE))
    assert losses["loss_box"].item() == losses["loss_cls"].item() == 0
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(x.grad.isfinite().all() for x in leaves(out))


def test_lane_terms_are_finite_without_lanes_and_for_extreme_logits() -> None:
    for value in (-200.0, 0.0, 200.0):
        for mask in (torch.zeros(1, 4, 4), torch.ones(1, 4, 4), torch.full((1, 4, 4), 255)):
            logits = torch.full((1, 1, 4, 4), value, requires_grad=True)
            losses = lane_losses(logits, mask.byte(), exponent=4 / 3)
            sum(losses.values()).backward()
            assert all(loss.isfinite() for loss in losses.values())
            assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_terms_are_computed_in_single_precision_inside_autocast(dtype: torch.dtype) -> None:
    exact = outputs()

    def cast(kind: torch.dtype, source: dict[str, object]) -> dict[str, object]:
        maps = {"detection": [x.detach().to(kind) for x in source["detection"]]}
        return maps | {task: source[task].detach().to(kind) for task in ("drivable", "lane")}

    half = cast(dtype, exact)
    rounded = cast(torch.float32, half)
    expected, near = criterion()(rounded, truth()), criterion()(exact, truth())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = criterion()(half, truth())
    for term in TERMS:
        assert found[term].dtype == torch.float32
        assert torch.equal(found[term], expected[term])
        assert found[term].item() == pytest.approx(near[term].item(), rel=1e-2)


def test_one_image_in_a_batch_of_equals_gives_the_same_terms() -> None:
    one = outputs(batch=1)
    two = {"detection": [x.repeat(2, 1, 1, 1) for x in one["detection"]]}
    two |= {task: one[task].repeat(2, 1, 1, 1) for task in ("drivable", "lane")}
    targets = truth()
    single = Targets(
        targets.boxes_cxcywh[:2], targets.labels[:2], torch.tensor([0, 0]), None,
        targets.drivable[:1], targets.lane[:1],
    )  # fmt: skip
    twice = Targets(
        single.boxes_cxcywh.repeat(2, 1), single.labels.repeat(2), torch.tensor([0, 0, 1, 1]), None,
        single.drivable.repeat(2, 1, 1), single.lane.repeat(2, 1, 1),
    )  # fmt: skip
    alone, both = criterion()(one, single), criterion()(two, twice)
    for term in TERMS:
        assert both[term].item() == pytest.approx(alone[term].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: criterion(assign="simota"), "assign: got 'simota', expected ota or plain; corr"),
        (lambda: criterion(lane_reduce="sum"), "lane_reduce: got 'sum', expected image or batch"),
        (lambda: criterion(balance=(1, 2)), "balance: got 2, expected 3 weights; one a scale"),
        (
            lambda: drivable_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 5)),
            "drivable: got masks of 1x4x5, expected 1x4x4; letterbox masks as the images",
        ),
        (
            lambda: lane_losses(torch.zeros(1, 1, 4, 4), torch.zeros(2, 4, 4)),
            "lane: got masks of 2x4x4, expected 1x4x4; letterbox masks as the images",
        ),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
