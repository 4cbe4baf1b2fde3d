"""Network and losses as one: steps made of parts, parts that are off or frozen, fitness."""

from typing import Any

import pytest
import torch
from torch import Tensor

from yolop_mtl.assemble import build_losses, build_network
from yolop_mtl.config import DataConfig, LossConfig, ModelConfig
from yolop_mtl.learner import Learner, fitness
from yolop_mtl.model import TASKS
from yolop_mtl.targets import ImageTargets, Targets, collate_targets

SIZE = (64, 128)
PARTS = ("backbone", "neck", "detection", "drivable", "lane")


def learner(*, freeze: tuple[str, ...] = (), **options: Any) -> Learner:
    """A nano network whose norms, where all parts are frozen by `eval`, do not see the batch."""
    torch.manual_seed(0)
    config = ModelConfig(preset="nano", **options)
    model = build_network(config, DataConfig(img_size=SIZE), num_classes=2)
    losses = build_losses(LossConfig(assign="plain"), model, SIZE)
    return Learner(model, *losses, freeze=freeze)


def batch(count: int = 4) -> tuple[Tensor, Targets]:
    """Images that all have as many positives at each scale, so that means of means are means."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, *SIZE), generator=generator, dtype=torch.uint8)
    items = []
    for number in range(count):
        boxes = torch.tensor([[45.0 + 32 * (number % 2), 35.0, 30.0, 20.0]])
        drivable, lane = torch.zeros(SIZE), torch.zeros(SIZE)
        drivable[30 + number :] = 1
        lane[:, 10 * number : 10 * number + 4] = 1
        labels = torch.tensor([number % 2])
        items.append(ImageTargets(boxes, labels, drivable=drivable, lane=lane))
    return images, collate_targets(items, SIZE)


def part(images: Tensor, targets: Targets, start: int, stop: int) -> tuple[Tensor, Targets]:
    """Some of the images of a batch, all of which have one box."""
    return images[start:stop], Targets(
        targets.boxes_cxcywh[start:stop],
        targets.labels[start:stop],
        targets.images[start:stop] - start,
        drivable=targets.drivable[start:stop],
        lane=targets.lane[start:stop],
    )


def gradients(network: Learner) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_two_halves_give_the_gradient_of_the_whole() -> None:
    network = learner().eval()  # norms with running statistics
    images, targets = batch(4)
    network(images, targets)[0].backward()
    whole = {name: grad.clone() for name, grad in gradients(network).items()}
    network.zero_grad()
    for start in (0, 2):
        (network(*part(images, targets, start, start + 2))[0] / 2).backward()
    halves = gradients(network)
    assert whole.keys() == halves.keys() == dict(network.named_parameters()).keys()
    for name, grad in whole.items():
        torch.testing.assert_close(halves[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_that_is_off_has_no_head_and_no_loss(task: str) -> None:
    others = tuple(other for other in TASKS if other != task)
    network = learner(tasks=others)
    total, terms = network(*batch(2))
    assert not any(task in name for name, _ in network.model.named_parameters())
    own = {"detection": "loss_box", "drivable": "loss_drivable", "lane": "loss_lane_iou"}
    assert own[task] not in terms
    assert all(own[other] in terms for other in others)
    torch.testing.assert_close(total, torch.stack([*terms.values()]).sum())


def test_a_task_without_labels_gives_no_gradient_to_its_head() -> None:
    network = learner()
    images, targets = batch(2)
    total, terms = network(images, targets._replace(lane=None))
    total.backward()
    assert terms["loss_lane_dice"].item() == terms["loss_lane_focal"].item() == 0
    for name, grad in gradients(network).items():
        assert bool(grad.any()) != name.startswith("model.lane"), name


@pytest.mark.parametrize("frozen", PARTS)
def test_a_frozen_part_stays(frozen: str) -> None:
    network = learner(freeze=(frozen,)).train()
    before = {k: v.clone() for k, v in getattr(network.model, frozen).state_dict().items()}
    parameters = [p for p in network.parameters() if p.requires_grad]
    network(*batch(2))[0].backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    after = getattr(network.model, frozen).state_dict()
    assert all(value.equal(before[name]) for name, value in after.items())
    other = "neck" if frozen == "backbone" else "backbone"
    assert getattr(network.model, other).training


@pytest.mark.parametrize(
    ("freeze", "options", "message"),
    [
        (("lane",), {"tasks": ("drivable",)}, "optim.freeze: got 'lane', which is off, expected a"),
        (PARTS, {}, "optim.freeze: got backbone, neck, detection, drivable, lane, expected a part"),
    ],
)
def test_what_cannot_be_frozen(
    freeze: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        learner(freeze=freeze, **options)


def test_fitness_is_a_mean_of_what_there_is() -> None:
    weights = {"mAP50_95": 0.4, "drivable_mIoU": 0.3, "lane_f1": 0.3}
    metrics = {"mAP50_95": 0.5, "drivable_mIoU": 0.9, "lane_f1": 0.6}
    assert fitness(metrics, weights) == pytest.approx(0.65)
    del metrics["mAP50_95"]
    assert fitness(metrics, weights) == pytest.approx(0.75)
    assert fitness({}, weights) == 0
