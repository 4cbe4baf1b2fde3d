"""Every refusal of the head, by its words."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dnc import NearestCentroidHead
from dnc.checks import check_features, check_finite, check_head, check_labels
from shared_utils.errors import InputError

INT64 = torch.int64
# Options that are all right; each test spoils one.
GOOD: dict[str, Any] = {
    "num_classes": 3,
    "embed_dim": 4,
    "num_centroids": 2,
    "momentum": 0.9,
    "temperature": 0.1,
    "memory": "queue",
    "memory_size": 8,
    "epsilon": 0.05,
    "num_iters": 3,
    "warm_start": True,
    "assignment": "sinkhorn",
    "reseed_after": 100,
    "correct_only_after": -1,
    "logit_norm": "none",
    "ignore_index": -100,
}


def refused(text: str) -> Any:
    """A context that expects exactly this message."""
    return pytest.raises(InputError, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_classes", 1, "2 or more"),
        ("num_classes", 0, "2 or more"),
        ("embed_dim", 0, "1 or more"),
        ("num_centroids", 0, "1 or more and less than 32768"),
        ("num_centroids", 2**15, "1 or more and less than 32768"),
        ("momentum", -0.1, "0 or more and less than 1"),
        ("momentum", 1, "0 or more and less than 1"),
        ("momentum", 1.5, "0 or more and less than 1"),
        ("momentum", float("nan"), "0 or more and less than 1"),
        ("temperature", 0, "more than 0"),
        ("temperature", -1.0, "more than 0"),
        ("temperature", float("inf"), "more than 0"),
        ("memory_size", -1, "0 or more"),
        ("epsilon", 0.0, "more than 0"),
        ("epsilon", float("nan"), "more than 0"),
        ("num_iters", 0, "1 or more"),
        ("reseed_after", -1, "0 or more"),
        ("correct_only_after", -2, "-1 or more"),
    ],
)
def test_numbers_out_of_range(name: str, value: float, expected: str) -> None:
    with refused(f"{name}: got {value}, expected {expected}; correct it"):
        NearestCentroidHead(**{**GOOD, name: value})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("memory", "que", "queue, batch, bank; did you mean 'queue'?"),
        ("memory", "ring", "queue, batch, bank; there are bank, batch, queue"),
        ("assignment", "sinkhornn", "sinkhorn, gumbel; did you mean 'sinkhorn'?"),
        ("assignment", "nearest", "sinkhorn, gumbel; there are gumbel, sinkhorn"),
        ("logit_norm", "affin", "none, standard, affine; did you mean 'affine'?"),
        ("logit_norm", None, "none, standard, affine; did you mean 'none'?"),
    ],
)
def test_words_that_are_none_of_the_choices(name: str, value: Any, told: str) -> None:
    with pytest.raises(InputError, match=rf"^{name}: got {value}, expected ") as caught:
        NearestCentroidHead(**{**GOOD, name: value})
    assert told.partition(";")[0] in str(caught.value)
    if value is not None:
        assert str(caught.value) == f"{name}: got {value}, expected {told}"


def test_a_bank_of_no_batches() -> None:
    with refused("memory_size: got 0, expected 1 or more batches for a bank; or use memory batch"):
        NearestCentroidHead(**{**GOOD, "memory": "bank", "memory_size": 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", 2),
        ("embed_dim", 1),
        ("num_centroids", 1),
        ("num_centroids", 2**15 - 1),
        ("momentum", 0),
        ("momentum", 0.9999),
        ("temperature", 1e-6),
        ("memory_size", 0),
        ("memory", "batch"),
        ("memory", "bank"),
        ("num_iters", 1),
        ("reseed_after", 0),
        ("correct_only_after", 0),
        ("logit_norm", "affine"),
        ("assignment", "gumbel"),
    ],
)
def test_what_is_just_allowed(name: str, value: Any) -> None:
    check_head({**GOOD, name: value})


# ---- features ----


@pytest.mark.parametrize("shape", [(4,), (5, 3), (2, 4, 3), (2, 3, 4, 4), (1, 4, 2, 2, 2), ()])
def test_features_of_another_shape(shape: tuple[int, ...]) -> None:
    text = (
        f"features: got shape {shape}, expected (N, 4) or (N, 4, H, W); "
        "pool the encoder's output to it"
    )
    with refused(text):
        check_features(torch.zeros(shape), 4)
    head = NearestCentroidHead(3, 4)
    for call in (head, head.scores, lambda x: head.loss(x, torch.zeros(5, dtype=INT64))):
        with refused(text):
            call(torch.zeros(shape))


def test_features_that_are_no_floats() -> None:
    with refused("features: got torch.int64, expected a float type; convert them"):
        check_features(torch.zeros(5, 4, dtype=INT64), 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_of_every_precision_pass(dtype: torch.dtype) -> None:
    check_features(torch.zeros(5, 4, dtype=dtype), 4)
    check_features(torch.zeros(0, 4, 2, 2, dtype=dtype), 4)


# ---- labels ----


def labels_of(*values: int, dtype: torch.dtype = INT64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (labels_of(0, 1), "(3,)"),
        (labels_of(0, 1, 2, 2), "(3,)"),
        (torch.zeros(3, 1, dtype=INT64), "(3,)"),
        (torch.zeros(3), "(3, 4)"),
        (torch.zeros(3, 5), "(3, 4)"),
        (torch.zeros(2, 4), "(3, 4)"),
    ],
)
def test_labels_that_do_not_fit(labels: Tensor, expected: str) -> None:
    text = (
        f"labels: got shape {tuple(labels.shape)}, expected {expected}, one for each feature "
        "vector; give one label, or one row of class shares, to each"
    )
    with refused(text):
        check_labels(labels, 3, 4, -100)


@pytest.mark.parametrize("shape", [(2, 4, 3), (3, 4, 2), (2, 1, 3, 4), (2, 12), (24, 1)])
def test_maps_of_labels_that_do_not_fit(shape: tuple[int, ...]) -> None:
    """As many labels as there are pixels, in an order that is not theirs."""
    head, features = NearestCentroidHead(3, 4), torch.randn(2, 4, 3, 4)
    text = (
        f"labels: got shape {shape}, expected (2, 3, 4), one for each feature vector; "
        "resize them to the features' map, or the other way round"
    )
    with refused(text):
        head.loss(features, torch.zeros(shape, dtype=INT64))
    by_map = head.loss(features, torch.zeros(2, 3, 4, dtype=INT64))["loss_dnc"]
    assert head.loss(features, torch.zeros(24, dtype=INT64))["loss_dnc"] == by_map


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_labels_of_another_type(dtype: torch.dtype) -> None:
    text = f"labels: got {dtype}, expected torch.int64; convert them with .long()"
    with refused(text):
        check_labels(labels_of(0, 1, 1, dtype=dtype), 3, 4, -100)


@pytest.mark.parametrize(
    ("values", "ignore_index", "wrong"),
    [
        ((0, 4, 1), -100, 4),
        ((0, -1, 1), -100, -1),
        ((-2, 7, 1), -100, -2),
        ((0, -100, 1), 255, -100),
        ((0, 255, 1), -100, 255),
    ],
)
def test_labels_out_of_range(values: tuple[int, ...], ignore_index: int, wrong: int) -> None:
    text = (
        f"labels: got {wrong}, expected 0 to 3, or {ignore_index} to leave a sample out; "
        "check num_classes and how the data set counts its classes"
    )
    with refused(text):
        check_labels(labels_of(*values), 3, 4, ignore_index)


def test_labels_that_are_all_right() -> None:
    check_labels(labels_of(0, 3, 255), 3, 4, 255)
    check_labels(labels_of(-100, -100), 2, 4, -100)
    check_labels(labels_of(), 0, 4, -100)
    check_labels(torch.rand(3, 4), 3, 4, -100)


def test_a_refused_loss_changes_nothing() -> None:
    head = NearestCentroidHead(3, 4)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with pytest.raises(InputError, match="labels: got 3"):
        head.loss(torch.randn(2, 4), labels_of(0, 3))
    head.update()
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


# ---- finite numbers ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite(value: float) -> None:
    features = torch.zeros(5, 4)
    check_finite(features)
    check_finite(features[:0])
    features[1, 2] = features[3, 0] = features[3, 1] = value
    text = (
        "features: got NaN or infinity in 2 of 5 vectors, expected finite numbers; "
        "lower the learning rate, or run in float32"
    )
    with refused(text):
        check_finite(features)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("memory", ["batch", "queue", "bank"])
def test_an_update_with_them_changes_nothing(memory: Any, value: float) -> None:
    torch.manual_seed(0)
    head = NearestCentroidHead(3, 4, 2, memory=memory, memory_size=2)
    features, labels = torch.randn(12, 4), torch.arange(12) % 3
    head.loss(features, labels)
    head.update()
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    features[5, 1] = value
    head.loss(features, labels)
    with pytest.raises(InputError, match="features: got NaN or infinity in 1 of 12 vectors"):
        head.update()
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    head.update()  # they are gone
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize("counts", [[4, 0, 0], [0, 4, 9]])
def test_a_class_without_any_training_sample(counts: list[int]) -> None:
    head = NearestCentroidHead(3, 4)
    missing = counts.index(0)
    with refused(
        f"labels: got no sample of class {missing}, expected at least one of each; remove the class"
    ):
        head.limit_places(torch.tensor(counts))
    assert head.active.all()
