"""Network and losses together: every weight learns, and a batch can be learnt by heart."""

import pytest
import torch

from yolop_mtl import build_model
from yolop_mtl.loss_weights import LossWeights, default_gains
from yolop_mtl.losses import Criterion
from yolop_mtl.model import YOLOPv2
from yolop_mtl.targets import ImageTargets, Targets, collate_targets

SIZE = (64, 96)


def scenes() -> tuple[torch.Tensor, Targets]:
    """Two images: a bright box, a road below, a vertical line."""
    images, items = torch.full((2, 3, *SIZE), 0.2), []
    for number, (x, y) in enumerate(((30, 20), (60, 30))):
        drivable, lane = torch.zeros(SIZE), torch.zeros(SIZE)
        drivable[40:] = 1
        lane[40:, 20 + 30 * number : 24 + 30 * number] = 1
        images[number, 1, 40:] = 0.6
        images[number, 2][lane == 1] = 1.0
        images[number, 0, y - 8 : y + 8, x - 12 : x + 12] = 1.0
        boxes = torch.tensor([[x, y, 24.0, 16.0]])
        labels = torch.tensor([number])
        items.append(ImageTargets(boxes, labels, drivable=drivable, lane=lane))
    return images, collate_targets(items, SIZE)


def parts(**options: object) -> tuple[YOLOPv2, Criterion, LossWeights]:
    torch.manual_seed(0)
    model = build_model("nano", num_classes=2, **options)
    head = model.detection
    criterion = Criterion(anchors=head.anchors, strides=head.strides)
    gains = default_gains(num_classes=2, img_size=(640, 640))
    return model, criterion, LossWeights(gains=gains, tasks=model.tasks, is_learned=True)


@pytest.mark.parametrize("use_repconv", [False, True])
def test_every_weight_has_a_gradient_and_moves(use_repconv: bool) -> None:
    model, criterion, weights = parts(use_repconv=use_repconv)
    images, targets = scenes()
    model.eval()(images)  # what an evaluation leaves behind must not matter
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [*model.parameters(), *weights.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        total, _ = weights(criterion(model(images), targets))
        total.backward()
        for name, parameter in [*model.named_parameters(), *weights.named_parameters()]:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    # The norm after a transposed convolution takes away what its bias adds.
    idle = {"detection.anchors", *(f"lane.deconv{i}.conv.bias" for i in (1, 2, 3))}
    assert set(before) - moved - idle == set()


def test_frozen_parts_stay_as_they_are() -> None:
    model, criterion, weights = parts()
    model.backbone.requires_grad_(False).eval()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    images, targets = scenes()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    weights(criterion(model(images), targets))[0].backward()
    optimizer.step()
    after = model.backbone.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())


def test_a_batch_is_learnt() -> None:
    model, criterion, weights = parts()
    images, targets = scenes()
    optimizer = torch.optim.AdamW([*model.parameters(), *weights.parameters()], lr=5e-3)
    terms = []
    for _ in range(30):
        losses = criterion(model(images), targets)
        terms.append({name: loss.item() for name, loss in losses.items()})
        total, _ = weights(losses)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for name in ("loss_box", "loss_drivable", "loss_lane_dice", "loss_lane_focal", "loss_cls"):
        assert terms[-1][name] < 0.7 * terms[0][name], name


def test_a_network_learns_from_images_of_which_each_lacks_something() -> None:
    model, criterion, weights = parts()
    images, targets = scenes()
    whole = [
        ImageTargets(
            targets.boxes_cxcywh[i : i + 1],
            targets.labels[i : i + 1],
            drivable=targets.drivable[i],
            lane=targets.lane[i],
        )
        for i in range(2)
    ]
    partly = collate_targets(
        [whole[0]._replace(lane=None), whole[1]._replace(boxes_cxcywh=None, labels=None)], SIZE
    )
    losses = criterion(model(images), partly)
    assert all(loss.item() > 0 for loss in losses.values())
    weights(losses)[0].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
