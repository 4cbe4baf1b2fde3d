"""Updates of the head over many steps: against a loop, by hand, collapse, learning, resuming."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnc import NearestCentroidHead

CLASSES, WIDTH, K = 4, 8, 3


def build(num_classes: int = CLASSES, embed_dim: int = WIDTH, k: int = K, **options: Any) -> Any:
    """A head whose random start is always the same."""
    torch.manual_seed(0)
    return NearestCentroidHead(num_classes, embed_dim, k, **options)


def batch(number: int, n: int = 40) -> tuple[Tensor, Tensor]:
    """Features of three modes per class, labels at random."""
    modes = torch.randn(CLASSES, K, WIDTH, generator=torch.Generator().manual_seed(77))
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    mode = torch.randint(0, K, (n,), generator=generator)
    return modes[labels, mode] + 0.5 * torch.randn(n, WIDTH, generator=generator), labels


def step(head: NearestCentroidHead, features: Tensor, labels: Tensor) -> None:
    head.loss(features, labels)
    head.update()


def state(head: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


# ---- one update ----


class Loop:
    """The update as a loop over classes and sub-centroids in float64: the reference."""

    def __init__(self, head: NearestCentroidHead, size: int) -> None:
        self.points = head.centroids.double()
        self.updates = torch.zeros(CLASSES, K, dtype=torch.int64)
        self.usage = torch.zeros(CLASSES, K, dtype=torch.int64)
        self.queue: list[list[Tensor]] = [[] for _ in range(CLASSES)]
        self.size, self.momentum = size, head.momentum

    def update(self, features: Tensor, labels: Tensor) -> None:
        z = F.normalize(features.double(), dim=1)
        for c in labels.unique().tolist():
            own = torch.stack([*self.queue[c], *z[labels == c]])
            plan = (own @ self.points[c].T / 0.05).exp()
            for _ in range(3):
                plan = plan * (len(own) / K / plan.sum(0))
                plan = plan / plan.sum(1, keepdim=True)
            chosen = plan.argmax(1) if len(own) >= K else (own @ self.points[c].T).argmax(1)
            for k in range(K):
                mine = own[chosen == k]
                self.usage[c, k] += len(mine)
                if len(mine) == 0:
                    continue
                t = int(self.updates[c, k])
                kept = min(self.momentum, 1 - 1 / (t + 1))
                towards = kept * self.points[c, k] + (1 - kept) * F.normalize(mine.sum(0), dim=0)
                self.points[c, k] = towards / towards.norm()
                self.updates[c, k] += 1
            if self.size:
                kept_features = [*self.queue[c], *(x.half().double() for x in z[labels == c])]
                self.queue[c] = kept_features[-self.size :]


@pytest.mark.parametrize(
    "options", [{"memory": "batch"}, {"memory_size": 7}, {"memory_size": 100}, {"memory_size": 0}]
)
def test_updates_equal_a_loop_over_classes(options: dict[str, Any]) -> None:
    head = build(momentum=0.8, reseed_after=0, **options)
    size = 0 if options.get("memory") == "batch" else options["memory_size"]
    head.loss(*batch(0))  # seeds all places
    assert head.seeded.all()
    loop = Loop(head, size)
    head.update()
    loop.update(*batch(0))
    for number in range(1, 10):
        # Small batches, of which some lack a class or have fewer samples than places.
        features, labels = batch(number, n=[40, 3, 12, 1][number % 4])
        step(head, features, labels)
        loop.update(features, labels)
        torch.testing.assert_close(head.centroids.double(), loop.points, rtol=0, atol=2e-6)
        assert torch.equal(head.updates, loop.updates)
        assert torch.equal(head.usage, loop.usage)
    assert (head.centroids.norm(dim=2) - 1).abs().max() < 1e-6
    head.reset_usage()
    assert not head.usage.any()
    assert torch.equal(head.updates, loop.updates)


@pytest.mark.parametrize(
    ("momentum", "expected", "atol"),
    [
        (0.0, (0.923880, 0.382683), 1e-6),
        (0.9, (0.999257, 0.038533), 1e-6),
        (0.999, (0.99999993, 0.00038271), 1e-7),
    ],
)
def test_one_update_by_hand(momentum: float, expected: tuple[float, float], atol: float) -> None:
    head = build(2, 2, 2, momentum=momentum, warm_start=False, memory="batch")
    head.centroids[0] = torch.eye(2)
    head.seeded.fill_(True)
    other = head.centroids[1].clone()
    step(head, torch.tensor([[3.0, 1], [2, 1], [1, 2], [1, 3]]), torch.zeros(4, dtype=torch.int64))
    assert head.usage.tolist() == [[2, 2], [0, 0]]
    wanted = torch.tensor([expected, expected[::-1]])
    torch.testing.assert_close(head.centroids[0], wanted, rtol=0, atol=atol)
    assert torch.equal(head.centroids[1], other)
    assert not head.updates[1].any()


def test_a_warm_start_forgets_the_start() -> None:
    head, other = build(memory="batch"), build(memory="batch")
    features, labels = batch(0)
    for each in (head, other):
        each.loss(features, labels)
    # Far from the features, yet alike enough in order to give the same assignment.
    step_from = F.normalize(head.centroids + 0.01 * torch.randn_like(head.centroids), dim=2)
    other.centroids.copy_(step_from)
    for each in (head, other):
        each.update()
    assert torch.equal(head.usage, other.usage)
    torch.testing.assert_close(head.centroids, other.centroids, rtol=0, atol=1e-6)


def test_losses_add_up_until_the_update() -> None:
    parts, whole = build(), build()
    features, labels = batch(0)
    whole.loss(features, labels)
    parts.loss(features, labels)
    parts._pending.clear()  # seeded alike, nothing waiting
    for piece in torch.arange(40).split(17):
        parts.loss(features[piece], labels[piece], 100 + piece)
    for each in (parts, whole):
        each.update()
    torch.testing.assert_close(parts.centroids, whole.centroids, rtol=0, atol=1e-6)
    assert torch.equal(parts.usage, whole.usage)
    # The queue knows which sample of the data set each feature is.
    kept = parts.memory.indices >= 0
    assert kept.sum() == 40
    stored = parts.memory.features[kept].float()
    expected = F.normalize(features, dim=1)[parts.memory.indices[kept] - 100]
    torch.testing.assert_close(stored, expected, rtol=0, atol=1e-3)


def test_one_sub_centroid_without_momentum_is_the_mean() -> None:
    head = build(k=1, momentum=0.0, memory="bank", memory_size=4)
    parts = [batch(number, 25) for number in range(4)]
    for features, labels in parts:
        step(head, features, labels)
    features, labels = (torch.cat(x) for x in zip(*parts, strict=True))
    z = features.double() / features.double().norm(dim=1, keepdim=True)
    means = torch.stack([z[labels == c].mean(0) for c in range(CLASSES)])
    units = means / means.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head.centroids[:, 0].double(), units, rtol=0, atol=1e-6)
    distances = torch.cdist(z, units)  # to means of length 1 the nearest is the most similar
    assert torch.equal(head(features).argmax(1), distances.argmin(1))
    # To means as they are it is another rule.
    score = z @ means.T - means.square().sum(1) / 2
    assert torch.equal(torch.cdist(z, means).argmin(1), score.argmax(1))
    assert not torch.equal(score.argmax(1), distances.argmin(1))


# ---- options ----


@pytest.mark.parametrize("assignment", ["sinkhorn", "gumbel"])
def test_classes_have_no_more_places_than_samples(assignment: Any) -> None:
    head = build(3, k=4, assignment=assignment)
    features = F.normalize(torch.randn(9, WIDTH), dim=1)
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2])
    head.limit_places(torch.bincount(labels))
    for _ in range(5):
        step(head, features + 0.05 * torch.randn(9, WIDTH), labels)  # other views of the same
        assert head.seeded.sum(1).tolist() == [1, 2, 4]
        first = head.centroids[:, :1]
        # What stands for the first follows it wherever it goes, and is never the answer.
        assert torch.equal(head.centroids[0, 1:], first[0].expand(3, -1))
        assert torch.equal(head.centroids[1, 2:], first[1].expand(2, -1))
    assert not head.usage[~head.seeded].any()
    assert not head.updates[~head.seeded].any()
    nearest = head.scores(torch.randn(200, WIDTH)).nearest
    assert nearest.amax(0).tolist() == [0, 1, 3]


def alike(n: int) -> tuple[Tensor, Tensor]:
    """Samples that are all the same, of class 0: one of two places gets all of them."""
    return torch.eye(WIDTH)[:1].repeat(n, 1), torch.zeros(n, dtype=torch.int64)


def test_a_dead_sub_centroid_moves_to_the_least_similar_sample() -> None:
    head = build(2, k=2, memory="batch", reseed_after=3, momentum=0.5)
    for number in range(2):
        step(head, *alike(4))
        assert head.idle[0].tolist() == [0, number + 1]
    features, labels = alike(4)
    features[2] += torch.eye(WIDTH)[1]  # at 45 degrees to all others
    head.updates[0, 1] = 7  # as if it had lived once
    step(head, features, labels)
    expected = F.normalize(features, dim=1)[2]
    torch.testing.assert_close(head.centroids[0, 1], expected, rtol=0, atol=1e-6)
    assert head.idle[0].tolist() == [0, 0]
    assert head.updates[0].tolist() == [3, 0]
    # The next samples that it gets take its place wholly, as at the start.
    features, labels = torch.eye(WIDTH)[:2].repeat_interleave(2, 0), labels
    step(head, features, labels)
    torch.testing.assert_close(head.centroids[0, 1], features[3], rtol=0, atol=1e-6)
    assert head.updates[0].tolist() == [4, 1]


@pytest.mark.parametrize("reseed_after", [0, 3])
def test_what_does_not_count_as_dead(reseed_after: int) -> None:
    head = build(2, k=2, memory="batch", reseed_after=reseed_after)
    step(head, *alike(4))
    before = head.idle.clone()
    for _ in range(5):  # one sample cannot fill two places
        step(head, *alike(1))
    assert torch.equal(head.idle, before)
    if reseed_after == 0:
        for _ in range(5):
            step(head, *alike(4))
        assert head.idle[0].tolist() == [0, 6]
        assert head.updates[0].tolist() == [11, 0]
    assert not head.idle[1].any()  # nor does an update of another class


def test_a_sample_of_the_queue_takes_a_dead_place_at_unit_length() -> None:
    head = build(2, k=2, reseed_after=2, memory_size=8)
    features, labels = alike(4)
    step(head, features, labels)
    # Half precision shortens this one.
    far = F.normalize(torch.linspace(0.1, 1, WIDTH), dim=0)
    head.memory.push(far[None], labels[:1], labels[:1])
    assert (head.memory.features[0, 4].float().norm() - 1).abs() > 1e-5
    step(head, *alike(1))
    torch.testing.assert_close(head.centroids[0, 1], far, rtol=0, atol=1e-3)
    torch.testing.assert_close(head.centroids.norm(dim=2), torch.ones(2, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("after", "filtered_from"), [(-1, 99), (0, 0), (2, 2)])
def test_only_correct_samples_count_after_some_updates(after: int, filtered_from: int) -> None:
    head = build(memory="batch", correct_only_after=after)
    for number in range(5):
        features, labels = batch(number)
        features = features + 3 * torch.randn(features.shape)
        head.reset_usage()
        head.loss(features, labels)
        is_right = head(features).argmax(1) == labels
        head.update()
        kept = is_right if number >= filtered_from else torch.ones_like(is_right)
        expected = torch.bincount(labels[kept], minlength=CLASSES)
        assert torch.equal(head.usage.sum(1), expected)
        assert not is_right.all()


# ---- many updates ----


def modes_at_60_degrees(number: int, width: int) -> Tensor:
    """Four directions of pairwise cosine about 0.5, turned and shaken at random."""
    generator = torch.Generator().manual_seed(number)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    modes = torch.zeros(4, width)
    modes[:, 0] = 1
    modes[:, 1:5] = torch.eye(4)
    shaken = modes + 0.03 * torch.randn(4, width, generator=generator)
    return F.normalize(shaken @ turn, dim=1)


def mean_cosine(points: Tensor) -> Tensor:
    """(C, K, D) -> (C,) mean cosine of two different ones."""
    cosines = points @ points.mT
    k = points.shape[1]
    return (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (k * (k - 1))


@pytest.mark.parametrize("assignment", ["sinkhorn", "gumbel"])
def test_sub_centroids_find_the_modes_and_the_ancestors_draw_lets_them_collapse(
    assignment: Any,
) -> None:
    """Five seeds at once: classes are clustered apart from each other, so each may be one."""
    # Where samples scatter less the draw, too, may stay apart; here no sample is mistaken either.
    seeds, width, per_mode = 5, 64, 50
    modes = torch.stack([modes_at_60_degrees(number, width) for number in range(seeds)])
    head = build(seeds, width, 4, momentum=0.9, memory="batch", assignment=assignment)
    truth = torch.arange(4).repeat_interleave(per_mode).repeat(seeds)
    labels = torch.arange(seeds).repeat_interleave(4 * per_mode)
    generator = torch.Generator().manual_seed(1)
    for _ in range(500):
        noise = 0.15 * torch.randn(len(labels), width, generator=generator)
        features = modes[labels, truth] + noise
        step(head, features, labels)
    cosine = mean_cosine(head.centroids)
    if assignment == "gumbel":
        assert cosine.min() > 0.99
        return
    torch.testing.assert_close(cosine, mean_cosine(modes), rtol=0, atol=0.01)
    assert 0.4 < cosine.min()
    assert cosine.max() < 0.6
    nearest = head.scores(features).nearest[torch.arange(len(labels)), labels].long()
    for c in range(seeds):
        own = labels == c
        table = torch.zeros(4, 4).index_put((nearest[own], truth[own]), torch.ones(()), True)
        assert table.amax(1).sum() / table.sum() >= 0.99  # purity
        assert table.sum(1).min() > 0
    assert head.usage.min() > 0


def interleaved(n: int, number: int) -> tuple[Tensor, Tensor]:
    """Ten classes of four modes on a circle, taking turns, so that their means say nothing."""
    generator = torch.Generator().manual_seed(number)
    place = torch.randint(0, 40, (n,), generator=generator)
    angle = (9 * place + 1.2 * torch.randn(n, generator=generator)).deg2rad()
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    return F.pad(circle, (0, 4)) @ turn, place % 10


@pytest.mark.parametrize("memory", ["queue", "batch"])
def test_four_sub_centroids_tell_apart_what_single_means_cannot(memory: Any) -> None:
    test, truth = interleaved(2000, 999)
    accuracy = {}
    for k in (4, 1):
        head = build(10, 6, k, memory=memory)
        for number in range(30):
            step(head, *interleaved(400, number))
        accuracy[k] = float((head(test).argmax(1) == truth).double().mean())
    assert accuracy[4] >= 0.99
    assert accuracy[1] < 0.5


def test_an_encoder_learns_one_batch_by_heart() -> None:
    head = build()
    encoder = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, WIDTH))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    images, labels = torch.randn(24, 5), torch.arange(24) % CLASSES
    losses = []
    for _ in range(80):
        loss = head.loss(encoder(images), labels)["loss_dnc"]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())
        optimizer.step()
        head.update()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < losses[0]
    assert (head.eval()(encoder(images)).argmax(1) == labels).all()


# ---- resuming ----


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "queue", "memory_size": 7},  # full before the break
        {"memory": "queue", "memory_size": 200},
        {"memory": "batch", "assignment": "gumbel"},
        {"memory": "bank", "memory_size": 3},  # saved with two batches in it
        {"memory": "queue", "correct_only_after": 3, "reseed_after": 2, "logit_norm": "affine"},
    ],
)
def test_a_resumed_run_is_the_same_to_the_bit(options: dict[str, Any]) -> None:
    straight = build(**options)
    torch.manual_seed(5)
    for number in range(5):
        step(straight, *batch(number, 9))
    file = io.BytesIO()
    torch.save({"head": straight.state_dict(), "random": torch.get_rng_state()}, file)
    for number in range(5, 10):
        step(straight, *batch(number, 9))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(1234)
    resumed = NearestCentroidHead(CLASSES, WIDTH, K, **options)
    resumed.load_state_dict(saved["head"])
    torch.set_rng_state(saved["random"])
    for number in range(5, 10):
        step(resumed, *batch(number, 9))
    expected = state(straight)
    assert expected.keys() == resumed.state_dict().keys()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not torch.equal(resumed.centroids, saved["head"]["centroids"])
