"""Samples that are shown to the classifier without a loss of its own, and how they wait."""

import copy

import pytest
import torch
from torch.nn import functional as F

from dnc import NearestCentroidHead
from dnc.samples import joined, with_class
from shared_utils.errors import InputError

C, D, K = 3, 5, 2


def head(**options: object) -> NearestCentroidHead:
    torch.manual_seed(0)
    return NearestCentroidHead(C, D, K, memory="batch", ignore_index=255, **options)


def maps(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, D, 4, 3, generator=generator)
    labels = torch.randint(0, C, (2, 4, 3), generator=generator)
    labels[0, 0] = 255
    return features, labels


@pytest.mark.parametrize("after", [-1, 0])
def test_observe_and_forward_do_what_loss_does(after: int) -> None:
    one = head(correct_only_after=after)
    other = copy.deepcopy(one)
    for turn in range(3):
        features, labels = maps(turn)
        features.requires_grad_()
        expected = one.loss(features, labels)["loss_dnc"]
        (grad,) = torch.autograd.grad(expected, features)
        one.update()
        other.observe(features.detach(), labels)
        logits = other(features)
        found = F.cross_entropy(logits, labels, ignore_index=255)
        other.update()  # before backward: the scores were made from a copy
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, features)[0], grad)
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_only_what_is_not_ignored_waits_in_unit_length() -> None:
    made = head()
    features, labels = maps()
    made.observe(features, labels, torch.tensor([7, 9]))
    (waiting,) = made._pending
    assert len(waiting.z) == len(waiting.labels) == len(waiting.indices) == 21
    assert waiting.indices.unique().tolist() == [7, 9]
    assert waiting.indices.tolist().count(7) == 9
    torch.testing.assert_close(waiting.z.norm(dim=1), torch.ones(21))
    own = features.movedim(1, -1)[labels != 255]
    torch.testing.assert_close(waiting.z, F.normalize(own, dim=1))


def test_rows_are_taken_as_well() -> None:
    made = head()
    made.observe(torch.randn(6, D), torch.tensor([0, 1, 2, 255, 0, 1]))
    assert made._pending[0].labels.tolist() == [0, 1, 2, 0, 1]


def test_nothing_is_kept_in_eval_mode_or_of_nothing() -> None:
    made = head().eval()
    made.observe(*maps())
    assert not made._pending
    made.train()
    features, labels = maps()
    before = copy.deepcopy(made.state_dict())
    made.observe(features, torch.full_like(labels, 255))
    made.update()
    assert all(torch.equal(before[name], t) for name, t in made.state_dict().items())


def test_what_does_not_fit_is_named() -> None:
    features, labels = maps()
    with pytest.raises(InputError, match=r"labels: got shape \(2, 3, 3\), expected \(2, 4, 3\)"):
        head().observe(features, labels[:, 1:])
    with pytest.raises(InputError, match=r"labels: got 3, expected 0 to 2, or 255"):
        head().observe(features, labels.clamp(max=3))
    with pytest.raises(InputError, match=r"features: got shape \(2, 4, 4, 3\)"):
        head().observe(features[:, 1:], labels)


def test_nothing_joined_is_of_the_right_width() -> None:
    none = joined([], torch.zeros(C, K, D))
    assert none.z.shape == (0, D)
    assert none.labels.dtype == none.indices.dtype == torch.int64


def test_soft_labels_count_where_one_class_dominates() -> None:
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.1, 0.8]])
    kept, has_class = with_class(torch.randn(2, D), soft, torch.arange(2), 255)
    assert has_class.tolist() == [False, True]
    assert (kept.labels.tolist(), kept.indices.tolist()) == ([2], [1])
