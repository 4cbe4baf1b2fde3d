"""The learned classifiers that ours is compared with, and which of them a configuration gives."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnc import NearestCentroidHead
from dnc.config import ModelConfig
from dnc.heads import CosineHead, SoftmaxHead, build_head
from dnc.memory import Bank, Queue
from shared_utils.errors import InputError

CLASSES, WIDTH = 5, 8
KINDS = ["softmax", "cosine", "dnc"]
# Fields that say what the encoder is, not what classifies its features.
OF_THE_ENCODER = {"encoder", "pretrained", "stem", "embed_norm", "head"}


def build(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_head(ModelConfig(head=kind, **options), CLASSES, WIDTH)


def samples(n: int = 20) -> tuple[Tensor, Tensor]:
    """Features of any length, and labels that all occur."""
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(n, WIDTH, generator=generator), torch.arange(n) % CLASSES


# ---- which head ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cls", "count"),
    [
        ("softmax", SoftmaxHead, CLASSES * WIDTH + CLASSES),
        ("cosine", CosineHead, CLASSES * WIDTH),
        ("dnc", NearestCentroidHead, 0),
    ],
)
def test_the_head_that_is_asked_for(kind: Any, cls: type[nn.Module], count: int) -> None:
    head = build(kind)
    assert type(head) is cls
    assert (head.num_classes, head.embed_dim) == (CLASSES, WIDTH)
    assert sum(p.numel() for p in head.parameters()) == count
    assert head.is_faithful is (kind == "dnc")
    assert head(samples()[0]).shape == (20, CLASSES)


def test_trained_normalisation_has_a_weight_and_a_bias_per_class() -> None:
    assert sum(p.numel() for p in build("dnc", logit_norm="affine").parameters()) == 2 * CLASSES


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_centroids", 3),
        ("momentum", 0.9),
        ("warm_start", False),
        ("temperature", 0.5),
        ("memory_size", 7),
        ("epsilon", 0.2),
        ("num_iters", 5),
        ("assignment", "gumbel"),
        ("reseed_after", 9),
        ("correct_only_after", 4),
        ("logit_norm", "standard"),
    ],
)
def test_each_option_reaches_the_head(option: str, value: Any) -> None:
    own = {"memory_size": lambda head: head.memory.size}.get(option, lambda h: getattr(h, option))
    assert own(build("dnc")) == getattr(ModelConfig(), option) != value
    assert own(build("dnc", **{option: value})) == value


@pytest.mark.parametrize(
    ("memory", "kind"), [("queue", Queue), ("bank", Bank), ("batch", type(None))]
)
def test_the_memory_reaches_the_head(memory: Any, kind: type) -> None:
    assert type(build("dnc", memory=memory).memory) is kind


def test_no_option_is_left_out() -> None:
    """Whatever is not of the encoder changes the head or one of the tests above is missing it."""
    table = next(
        mark.args[1]
        for mark in test_each_option_reaches_the_head.pytestmark  # type: ignore[attr-defined]
        if mark.name == "parametrize"
    )
    tested = {option for option, _ in table} | {"memory"}
    assert tested == {field.name for field in fields(ModelConfig)} - OF_THE_ENCODER


def test_an_option_out_of_range() -> None:
    with pytest.raises(InputError, match=r"^num_centroids: got 0, expected 1 or more"):
        build("dnc", num_centroids=0)
    for kind in ("cosine", "dnc"):
        with pytest.raises(InputError, match=r"^temperature: got 0\.0, expected more than 0; "):
            build(kind, temperature=0.0)
    build("softmax", temperature=0.0)  # it has none


# ---- logits and losses -----------------------------------------------------------------------


def test_softmax_is_a_linear_layer_and_cross_entropy() -> None:
    head = build("softmax")
    features, labels = samples()
    weight, bias = head.linear.weight, head.linear.bias
    logits = torch.stack([weight @ row + bias for row in features])
    torch.testing.assert_close(head(features), logits)
    told = -torch.stack([row.log_softmax(0)[y] for row, y in zip(logits, labels, strict=True)])
    loss = head.loss(features, labels, torch.arange(20))
    assert loss.keys() == {"loss_ce"}
    torch.testing.assert_close(loss["loss_ce"], told.mean())


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_cosines_are_of_unit_vectors(temperature: float) -> None:
    head = build("cosine", temperature=temperature)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([3.0, 4.0, *[0.0] * 6]).roll(1).repeat(5, 1))
        head.linear.weight[1:] *= torch.tensor([0.1, 1.0, -1.0, 7.0])[:, None]
    one = torch.zeros(1, WIDTH)
    one[0, 2] = 9.0
    cosines = torch.tensor([[0.8, 0.8, 0.8, -0.8, 0.8]])
    torch.testing.assert_close(head(one), cosines / temperature)
    torch.testing.assert_close(head(one * 1e-3), cosines / temperature)
    loss = head.loss(one, torch.tensor([3]))["loss_ce"]
    expected = torch.log(4 * torch.exp(torch.tensor(1.6 / temperature)) + 1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_learned_head_learns(kind: Any) -> None:
    head = build(kind)
    features, labels = samples()
    features.requires_grad_()
    sum(head.loss(features, labels).values()).backward()
    assert features.grad is not None
    assert float(features.grad.norm()) > 0
    for parameter in head.parameters():
        assert float(parameter.grad.norm()) > 0
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head.update()
    head.drop_pending()
    same = [torch.equal(value, before[name]) for name, value in head.state_dict().items()]
    assert all(same) == (kind != "dnc")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_labels(kind: Any, dtype: torch.dtype) -> None:
    features, labels = samples()
    hard, soft = build(kind), build(kind)
    certain = F.one_hot(labels, CLASSES).to(dtype)
    (told,), (found,) = hard.loss(features, labels).values(), soft.loss(features, certain).values()
    torch.testing.assert_close(found, told)
    mixed = 0.7 * certain + 0.3 * certain.roll(1, 0)
    log_p = soft(features).log_softmax(dim=1)
    (found,) = soft.loss(features, mixed).values()
    torch.testing.assert_close(found, -(mixed.float() * log_p).sum(1).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((20,), CLASSES), r"^labels: got "),
        (torch.full((20,), -1), r"^labels: got "),
        (torch.zeros(19, dtype=torch.int64), r"^labels: got shape \(19,\), expected "),
        (torch.zeros(20, CLASSES + 1), r"^labels: got shape \(20, 6\), expected "),
    ],
    ids=["too high", "negative", "too few", "too wide"],
)
def test_wrong_labels(kind: Any, labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(kind).loss(samples()[0], labels)


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_another_width(kind: Any) -> None:
    head = build(kind)
    with pytest.raises(InputError, match=r"^features: got shape \(3, 9\), expected \(N, 8\)"):
        head(torch.zeros(3, WIDTH + 1))
    with pytest.raises(InputError, match=r"^features: got shape \(3, 9\), expected \(N, 8\)"):
        head.loss(torch.zeros(3, WIDTH + 1), torch.zeros(3, dtype=torch.int64))


# ---- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cosine", "dnc"])
def test_autocast_does_not_lower_the_precision_of_cosines(kind: Any, dtype: torch.dtype) -> None:
    head, same = (build(kind, temperature=0.01) for _ in range(2))
    features, labels = samples()
    half = features.to(dtype)
    exact, told = head(half.float()), head.loss(half.float(), labels)
    with torch.autocast("cpu", dtype=dtype):
        logits = same(half)
        (loss,) = same.loss(half, labels).values()
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(loss, *told.values(), rtol=1e-6, atol=0)
    assert not torch.equal(logits.to(dtype).float(), logits)  # rounded it would be another


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_under_autocast_has_its_loss_in_float32(dtype: torch.dtype) -> None:
    head = build("softmax")
    features, labels = samples()
    exact = head.loss(features, labels)["loss_ce"]
    with torch.autocast("cpu", dtype=dtype):
        loss = head.loss(features.to(dtype), labels)["loss_ce"]
        soft = head.loss(features.to(dtype), F.one_hot(labels, CLASSES).float())["loss_ce"]
    assert loss.dtype == soft.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    torch.testing.assert_close(soft, loss)
    assert head.to(dtype).loss(features.to(dtype), labels)["loss_ce"].dtype == torch.float32
