"""Scores, loss and update of the head against a loop over classes and numbers worked by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dnc import NearestCentroidHead

CLASSES, WIDTH, K = 5, 8, 3


def build(num_classes: int = CLASSES, embed_dim: int = WIDTH, k: int = K, **options: Any) -> Any:
    """A head whose random start is always the same."""
    torch.manual_seed(0)
    return NearestCentroidHead(num_classes, embed_dim, k, **options)


def placed(centroids: Tensor, **options: Any) -> NearestCentroidHead:
    """A head with sub-centroids (C, K, D) given by hand."""
    head = NearestCentroidHead(*(centroids.shape[i] for i in (0, 2, 1)), **options)
    head.centroids.copy_(centroids)
    head.seeded.fill_(True)
    return head


def samples(n: int, number: int = 0, num_classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Random features of any length, and labels that all occur."""
    generator = torch.Generator().manual_seed(number)
    features = 3 * torch.randn(n, WIDTH, generator=generator)
    return features, torch.arange(n) % num_classes


def state(head: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


def assert_same(head: torch.nn.Module, before: dict[str, Tensor]) -> None:
    now = head.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name


# ---- what it is made of ----


@pytest.mark.parametrize("memory", ["queue", "batch", "bank"])
@pytest.mark.parametrize("logit_norm", ["none", "standard"])
def test_head_has_no_parameters(memory: Any, logit_norm: Any) -> None:
    head = build(memory=memory, logit_norm=logit_norm)
    assert sum(p.numel() for p in head.parameters()) == 0
    assert head.is_faithful


def test_only_the_trained_normalisation_has_some() -> None:
    head = build(logit_norm="affine")
    assert sum(p.numel() for p in head.parameters()) == 2 * CLASSES
    assert not head.is_faithful


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"memory": "batch"}, []),
        ({"memory": "queue", "memory_size": 0}, []),
        ({"memory": "queue"}, ["features", "indices", "pushed"]),
        ({"memory": "bank"}, ["features", "indices", "labels", "num_batches"]),
    ],
)
def test_everything_is_in_the_checkpoint(options: dict[str, Any], more: list[str]) -> None:
    own = {"active", "centroids", "idle", "seeded", "updates", "usage"}
    assert set(build(**options).state_dict()) == own | {f"memory.{name}" for name in more}


# ---- scores and logits ----


def test_argmax_is_that_of_the_nearest_sub_centroid() -> None:
    features, _ = samples(10_000)
    for logit_norm in ("none", "standard"):
        head = build(logit_norm=logit_norm)
        z = features / features.norm(dim=1, keepdim=True)
        cosines = torch.einsum("nd,ckd->nck", z, head.centroids)
        logits, scores = head(features), head.scores(features)
        torch.testing.assert_close(scores.cosines, cosines.amax(2), rtol=0, atol=1e-6)
        assert torch.equal(logits.argmax(1), scores.cosines.argmax(1))
        rows, winner = torch.arange(len(z)), logits.argmax(1)
        nearest = scores.nearest.long()[rows, winner]
        assert torch.equal(winner * K + nearest, cosines.flatten(1).argmax(1))


def test_cosines_to_every_sub_centroid_in_use() -> None:
    head, (features, _) = build(), samples(9)
    z = features / features.norm(dim=1, keepdim=True)
    expected = torch.einsum("nd,ckd->nck", z, head.centroids)
    torch.testing.assert_close(head.cosines(features), expected, rtol=0, atol=1e-6)
    assert torch.equal(head.cosines(features).amax(2), head.scores(features).cosines)
    head.limit_places(torch.tensor([1, 2, 9, 9, 9]))
    found = head.cosines(features)
    assert torch.equal(found == -torch.inf, ~head.active.expand(9, -1, -1))
    assert not head.active[0, 1:].any()


def test_affine_normalisation_moves_the_answer() -> None:
    wanted = torch.tensor([0.50, 0.49, 0.10])
    head = placed(torch.eye(4)[:3, None], logit_norm="affine")
    features = torch.cat([wanted, (1 - wanted.square().sum()).sqrt()[None]])[None]
    assert head(features).argmax().item() == 0
    with torch.no_grad():
        head.norm.weight.copy_(torch.tensor([1.0, 1.2, 1.0]))
    torch.testing.assert_close(head.scores(features).cosines[0], wanted)
    assert head(features).argmax().item() == 1


@pytest.mark.parametrize("temperature", [0.1, 1.0, 0.02])
def test_logits_are_cosines_over_the_temperature(temperature: float) -> None:
    features, _ = samples(9)
    head = build(temperature=temperature)
    expected = head.scores(features).cosines / temperature
    torch.testing.assert_close(head(features), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("logit_norm", ["standard", "affine"])
def test_normalised_logits(logit_norm: Any) -> None:
    features, _ = samples(9)
    head = build(logit_norm=logit_norm)
    c = head.scores(features).cosines
    expected = (c - c.mean(1, keepdim=True)) / (c.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(head(features), expected, rtol=0, atol=1e-5)


def test_length_of_features_does_not_matter() -> None:
    features, _ = samples(9)
    head = build()
    torch.testing.assert_close(head(features), head(features * 1e-4), rtol=0, atol=1e-5)


def test_maps_are_scored_pixel_by_pixel() -> None:
    head, maps = build(), torch.randn(2, WIDTH, 3, 4)
    logits = head(maps)
    assert logits.shape == (2, CLASSES, 3, 4)
    for n in range(2):
        for row in range(3):
            for column in range(4):
                one = head(maps[n, :, row, column][None])[0]
                torch.testing.assert_close(logits[n, :, row, column], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("memory", ["queue", "bank"])
def test_scoring_changes_no_buffer(memory: Any, is_training: bool) -> None:
    head, (features, labels) = build(memory=memory), samples(30)
    head.loss(features, labels)
    head.update()
    head.train(is_training)
    before = state(head)
    head(features)
    head.scores(features)
    assert_same(head, before)
    with torch.no_grad():
        head.loss(features, labels)
    head.eval()
    head.loss(features, labels)
    head.update()
    assert_same(head, before)


def test_losses_without_training_seed_nothing() -> None:
    head, (features, labels) = build().eval(), samples(30)
    before = state(head)
    head.loss(features, labels)
    with torch.no_grad():
        head.train().loss(features, labels)
    head.update()
    assert_same(head, before)


# ---- loss ----


@pytest.mark.parametrize(
    ("num_classes", "temperature", "own_is_opposite", "expected", "atol"),
    [
        (10, 0.1, False, 0.00041, 5e-6),
        (150, 0.1, False, 0.00674, 5e-6),
        (1000, 0.1, False, 0.04436, 5e-6),
        (10, 1.0, False, 1.4612, 5e-5),
        (1000, 1.0, False, 5.9095, 5e-5),
        (2, 1.0, True, 0.1269, 5e-5),
        (10, 1.0, True, 0.7966, 5e-5),
        (19, 1.0, True, 1.2343, 5e-5),
        (100, 1.0, True, 2.6671, 5e-5),
        (150, 1.0, True, 3.0523, 5e-5),
        (1000, 1.0, True, 4.9141, 5e-5),
    ],
)
def test_loss_of_a_certain_sample(
    num_classes: int, temperature: float, own_is_opposite: bool, expected: float, atol: float
) -> None:
    """Own cosine 1 and all others 0, or -1, which is the least loss there can be."""
    centroids = torch.eye(num_classes)[:, None]
    if own_is_opposite:
        centroids = torch.full((num_classes, 1, 1), -1.0)
        centroids[0] = 1
    head = placed(centroids, temperature=temperature).eval()
    features = 3 * centroids[0]
    losses = head.loss(features, torch.tensor([0]))
    assert list(losses) == ["loss_dnc"]
    assert losses["loss_dnc"].shape == ()
    assert losses["loss_dnc"].item() == pytest.approx(expected, abs=atol)


def test_gradient_is_tangential_and_of_features_only() -> None:
    head = build()
    features, labels = samples(20)
    z = F.normalize(features, dim=1).requires_grad_()
    head.loss(z, labels)["loss_dnc"].backward()
    assert z.grad is not None
    assert (z.grad.norm(dim=1) > 1e-4).all()
    assert (z.grad * z).sum(1).abs().max() < 1e-6
    assert head.centroids.grad is None
    assert not head.centroids.requires_grad


@pytest.mark.parametrize("logit_norm", ["none", "standard", "affine"])
def test_gradient_is_a_finite_difference(logit_norm: Any) -> None:
    head = build(logit_norm=logit_norm).eval().double()
    features, labels = samples(6)
    wrong = features.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head.loss(x, labels)["loss_dnc"], (wrong,))


def test_float64_features_are_scored_in_float64() -> None:
    features, labels = samples(6)
    head = build().eval()
    assert head(features.double()).dtype == torch.float64
    assert head.loss(features.double(), labels)["loss_dnc"].dtype == torch.float64


@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_ignored_pixels_count_for_nothing(ignore_index: int) -> None:
    head, whole = build(ignore_index=ignore_index), build(ignore_index=ignore_index)
    maps = torch.randn(2, WIDTH, 5, 6, requires_grad=True)
    labels = torch.randint(0, CLASSES, (2, 5, 6))
    labels[0, :2] = ignore_index
    labels[1, 3, 1:] = ignore_index
    rows = maps.detach().movedim(1, -1).reshape(-1, WIDTH)
    kept = labels.flatten() != ignore_index
    loss = head.loss(maps, labels)["loss_dnc"]
    expected = whole.loss(rows[kept], labels.flatten()[kept])["loss_dnc"]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    assert maps.grad is not None
    is_used = maps.grad.ne(0).any(1)
    assert torch.equal(is_used, labels != ignore_index)
    for each in (head, whole):
        each.update()
    assert_same(head, state(whole))
    assert head.usage.sum() == kept.sum()


def test_all_ignored_is_a_loss_of_nothing_and_no_update() -> None:
    head, (features, labels) = build(), samples(8)
    head.loss(features, labels)
    head.update()
    before = state(head)
    features.requires_grad_()
    loss = head.loss(features, torch.full_like(labels, -100))["loss_dnc"]
    assert loss.item() == 0
    loss.backward()
    assert features.grad is not None
    assert not features.grad.any()
    head.update()
    assert_same(head, before)


@pytest.mark.parametrize(("share", "taken"), [(0.8, "own"), (0.3, "other"), (0.5, "none")])
def test_soft_labels(share: float, taken: str) -> None:
    """Mixed samples are of the class that has more than half of them, or of none."""
    features, labels = samples(20)
    other = labels.roll(7)
    soft = share * F.one_hot(labels, CLASSES) + (1 - share) * F.one_hot(other, CLASSES)
    head, hard = build(), build()
    loss = head.loss(features, soft)["loss_dnc"]
    chosen = {"own": labels, "other": other, "none": torch.full_like(labels, -100)}[taken]
    hard.loss(features, chosen)
    log_p = (head.scores(features).cosines.double() / 0.1).log_softmax(1)
    assert loss.item() == pytest.approx(-(soft * log_p).sum(1).mean().item(), rel=1e-5)
    for each in (head, hard):
        each.update()
    assert_same(head, state(hard))
    assert head.usage.sum() == (0 if taken == "none" else 20)


def test_smoothed_labels_count_as_their_class() -> None:
    features, labels = samples(20)
    head, hard = build(), build()
    head.loss(features, 0.9 * F.one_hot(labels, CLASSES) + 0.1 / CLASSES)
    hard.loss(features, labels)
    for each in (head, hard):
        each.update()
    assert_same(head, state(hard))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logit_norm", ["none", "standard", "affine"])
def test_half_precision_features_under_autocast(dtype: torch.dtype, logit_norm: Any) -> None:
    head, exact = (build(logit_norm=logit_norm, temperature=0.01) for _ in range(2))
    features, labels = samples(40)
    half, full = features.to(dtype).requires_grad_(), features.to(dtype).float().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        assert head(half).dtype == torch.float32
        loss = head.loss(half, labels)["loss_dnc"]
        loss.backward()
        head.update()
    wanted = exact.loss(full, labels)["loss_dnc"]
    wanted.backward()
    exact.update()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    assert half.grad is not None
    assert full.grad is not None
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, full.grad.to(dtype), rtol=1e-2, atol=1e-5)
    assert_same(head, state(exact))


def test_empty_batches() -> None:
    head = build()
    before = state(head)
    features = torch.zeros(0, WIDTH, requires_grad=True)
    for labels in (torch.zeros(0, dtype=torch.int64), torch.zeros(0, CLASSES)):
        loss = head.loss(features, labels)["loss_dnc"]
        assert loss.item() == 0
        loss.backward()
    assert head(features).shape == (0, CLASSES)
    head.update()
    assert_same(head, before)


def test_two_losses_of_one_backward_pass() -> None:
    """Two views of a batch: the second brings classes that the first did not have."""
    head, (features, labels) = build(), samples(20)
    features.requires_grad_()
    few = labels < 2
    loss = head.loss(features[few], labels[few])["loss_dnc"]
    (loss + head.loss(features, labels)["loss_dnc"]).backward()
    assert features.grad is not None
    assert features.grad.ne(0).any(1).all()


def test_an_update_before_backward_is_noticed() -> None:
    head, (features, labels) = build(), samples(20)
    features.requires_grad_()
    for _ in range(2):
        loss = head.loss(features, labels)["loss_dnc"]
        head.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_samples_that_wait_can_be_dropped() -> None:
    head, (features, labels) = build(), samples(20)
    head.loss(features, labels)
    before = state(head)
    head.drop_pending()
    head.update()
    assert_same(head, before)


def test_nothing_that_waits_or_stays_has_a_gradient() -> None:
    head, (features, labels) = build(), samples(20)
    features.requires_grad_()
    head.loss(features, labels)
    assert not any(part.requires_grad for waiting in head._pending for part in waiting)
    head.update()
    assert not any(buffer.requires_grad for buffer in head.buffers())


def test_deep_copies_go_their_own_way() -> None:
    head, (features, labels) = build(), samples(20)
    head.loss(features, labels)
    other = copy.deepcopy(head)  # with samples that wait, as an averaged model would be made
    before = state(head)
    other.update()
    assert_same(head, before)
    head.update()
    assert_same(head, state(other))
    assert head.usage.sum() == 20
