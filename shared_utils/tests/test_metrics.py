import pytest
import torch

from shared_utils.metrics import classification_metrics


def hand_count(logits, targets, k):
    right = 0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        right += target in best
    return right / len(targets)


@pytest.mark.parametrize("num_classes", [6, 10])
def test_ragged_batches_give_what_a_hand_count_over_all_samples_gives(num_classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(37, num_classes, generator=generator)
    targets = torch.randint(num_classes, (37,), generator=generator)
    metrics = classification_metrics(num_classes)
    for part in torch.arange(37).split([1, 20, 16]):
        metrics.update(logits[part], targets[part])
    scores = {name: float(value) for name, value in metrics.compute().items()}
    assert scores.keys() == {"top1", "top5"}
    assert scores["top1"] == pytest.approx(hand_count(logits, targets, 1))
    assert scores["top5"] == pytest.approx(hand_count(logits, targets, 5))


def test_scores_that_start_equal_stay_apart():
    metrics = classification_metrics(6)
    metrics.update(torch.eye(6)[:2], torch.tensor([0, 1]))  # top1 and top5 both right
    metrics.update(torch.tensor([[5.0, 4, 3, 2, 1, 0]]), torch.tensor([1]))  # top5 only
    assert float(metrics.compute()["top1"]) == pytest.approx(2 / 3)
    assert float(metrics.compute()["top5"]) == 1


@pytest.mark.parametrize("num_classes", [2, 5])
def test_top5_is_absent_below_six_classes(num_classes):
    metrics = classification_metrics(num_classes)
    metrics.update(torch.eye(num_classes), torch.arange(num_classes))
    assert {name: float(value) for name, value in metrics.compute().items()} == {"top1": 1.0}


def test_reset_forgets():
    metrics = classification_metrics(2)
    metrics.update(torch.eye(2), torch.tensor([1, 0]))
    metrics.reset()
    metrics.update(torch.eye(2), torch.tensor([0, 1]))
    assert float(metrics.compute()["top1"]) == 1
