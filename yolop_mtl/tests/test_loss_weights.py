"""How terms become one number."""

import math

import pytest
import torch

from yolop_mtl.loss_weights import BASE_GAINS, TASK_OF, LossWeights, default_gains

LOSSES = {name: torch.tensor(1.0 + i) for i, name in enumerate(TASK_OF)}
TASKS = ("detection", "drivable", "lane")


def test_constant_weights_are_applied_once() -> None:
    total, weighted = LossWeights(gains=BASE_GAINS, tasks=TASKS)(LOSSES)
    assert list(weighted) == list(LOSSES)
    for name, loss in LOSSES.items():
        assert weighted[name].item() == pytest.approx(BASE_GAINS[name] * loss.item())
    assert total.item() == pytest.approx(sum(weighted.values()).item())
    assert list(LossWeights(gains=BASE_GAINS, tasks=TASKS).parameters()) == []


def test_gains_grow_with_classes_and_size() -> None:
    gains = default_gains(num_classes=80, img_size=(384, 640))
    assert (gains["loss_box"], gains["loss_cls"], gains["loss_obj"]) == (0.05, 0.3, 0.7)
    gains = default_gains(num_classes=8, img_size=(320, 192))
    assert gains["loss_cls"] == pytest.approx(0.03)
    assert gains["loss_obj"] == pytest.approx(0.7 / 4)


def test_learned_weights_start_as_constant_ones_and_find_the_inverse_of_a_loss() -> None:
    weights = LossWeights(gains=BASE_GAINS, tasks=TASKS, is_learned=True)
    total, weighted = weights(LOSSES)
    constant, same = LossWeights(gains=BASE_GAINS, tasks=TASKS)(LOSSES)
    assert total.item() == pytest.approx(constant.item())
    assert {k: v.item() for k, v in weighted.items()} == pytest.approx(
        {k: v.item() for k, v in same.items()}
    )
    total.backward()
    for task in TASKS:
        own = sum(BASE_GAINS[n] * loss for n, loss in LOSSES.items() if TASK_OF[n] == task)
        assert weights.log_variances[task].grad.item() == pytest.approx(1 - own.item(), abs=1e-5)
        # At v = ln l the gradient is 0, and the task's terms add up to 1.
        weights.log_variances[task].data.fill_(math.log(own.item()))
    weights.zero_grad()
    total, weighted = weights(LOSSES)
    total.backward()
    assert all(abs(v.grad.item()) < 1e-6 for v in weights.parameters())
    assert sum(weighted.values()).item() == pytest.approx(3, abs=1e-5)


def test_an_unlabelled_task_and_one_that_is_off_leave_their_weights_alone() -> None:
    weights = LossWeights(gains=BASE_GAINS, tasks=TASKS, is_learned=True)
    losses = {n: loss for n, loss in LOSSES.items() if TASK_OF[n] != "detection"}
    losses["loss_drivable"] = torch.tensor(0.0, requires_grad=True)
    total, _ = weights(losses)
    total.backward()
    assert weights.log_variances["detection"].grad is None
    assert weights.log_variances["drivable"].grad.item() == 0
    assert weights.log_variances["lane"].grad.item() != 0


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        ({"loss_boxes": 1.0}, r"gains: got 'loss_boxes', expected a known term; did you mean 'los"),
        ({"loss_box": -1.0}, r"gains.loss_box: got -1.0, expected 0 or more; correct it"),
        ({"loss_box": math.inf}, r"gains.loss_box: got inf, expected 0 or more; correct it"),
    ],
)
def test_wrong_gains_are_refused(gains: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossWeights(gains=gains, tasks=TASKS)
