"""A trained network becomes a classifier: one pass, exact means, classes that come and go."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import dnc
from dnc.fitter import CentroidFitter
from shared_utils.errors import InputError


class Flat(nn.Module):
    """The pixels themselves are the features."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def modes(num_classes: int = 3, num_modes: int = 2, width: int = 12) -> Tensor:
    """Unit vectors far from each other."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(num_classes * num_modes, width, generator=generator)
    q, _ = torch.linalg.qr(points.T)
    return q.T[: num_classes * num_modes].view(num_classes, num_modes, width)


def samples(count: int, seed: int = 0, **how: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of classes with modes: (N, D), labels, modes."""
    points = modes(**how)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(points), (count,), generator=generator)
    own = torch.randint(points.shape[1], (count,), generator=generator)
    noise = 0.05 * torch.randn(count, points.shape[2], generator=generator)
    return points[labels, own] + noise, labels, own


def batches(features: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(features.view(-1, 3, 2, 2).split(size), labels.split(size), strict=True)


# ---- the pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 500])
def test_one_centroid_is_the_mean_of_normalised_features(size: int) -> None:
    features, labels, _ = samples(500)
    clf = dnc.fit(Flat(), batches(features, labels, size), 3, num_centroids=1)
    z = F.normalize(features, dim=1)
    means = torch.stack([F.normalize(z[labels == c].mean(dim=0), dim=0) for c in range(3)])
    torch.testing.assert_close(clf.head.centroids[:, 0], means, atol=1e-5, rtol=0)
    expected = (z @ means.T).argmax(dim=1)
    assert torch.equal(clf(features.view(-1, 3, 2, 2)).argmax(dim=1), expected)


@pytest.mark.parametrize("is_sorted", [False, True])
def test_modes_are_found_whatever_the_order(is_sorted: bool) -> None:
    features, labels, _ = samples(600)
    order = labels.argsort(stable=True) if is_sorted else torch.arange(600)
    clf = dnc.fit(Flat(), batches(features[order], labels[order], 50), 3, num_centroids=2)
    cosines = torch.einsum("ckd,cmd->ckm", clf.head.centroids, modes())
    assert (cosines.amax(dim=2) > 0.99).all()
    assert (cosines.amax(dim=1) > 0.99).all()  # each mode has one
    assert torch.equal(clf(features.view(-1, 3, 2, 2)).argmax(dim=1), labels)
    assert sum(p.numel() for p in clf.head.parameters()) == 0


def test_memory_does_not_grow_with_the_data() -> None:
    fitter = CentroidFitter(3, 12, 2)

    def held() -> int:
        tensors = [value for value in vars(fitter).values() if isinstance(value, Tensor)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    before = held()
    for seed in range(5):
        features, labels, _ = samples(400, seed)
        fitter.add(features, labels)
        assert held() == before
    assert int(fitter.counts.sum()) == 2000


def test_few_samples_leave_spare_places() -> None:
    features, labels, _ = samples(100)
    places = [torch.nonzero(labels == c)[:count, 0] for c, count in enumerate((20, 1, 3))]
    few = torch.cat(places)
    fitter = CentroidFitter(3, 12, 4)
    fitter.add(features[few], labels[few])
    points, active = fitter.finish()
    assert active.sum(dim=1).tolist() == [4, 1, 3]
    assert torch.equal(points[1], points[1, :1].expand(4, -1))
    torch.testing.assert_close(points.norm(dim=2), torch.ones(3, 4))
    torch.testing.assert_close(points[1, 0], F.normalize(features[places[1][0]], dim=0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("class", r"^labels: got no sample of class 2, expected one at least; remove the class"),
        ("label", r"^labels: got 3, expected 0 to 2"),
        ("nan", r"^features: got NaN or infinity in 1 of 100 vectors, expected finite numbers; "),
        ("empty", r"^loader: got no batch, expected at least one; "),
    ],
)
def test_what_cannot_be_fitted(wrong: str, message: str) -> None:
    features, labels, _ = samples(100)
    if wrong == "class":
        features, labels = features[labels < 2], labels[labels < 2]
    elif wrong == "label":
        labels = labels.clone()
        labels[5] = 3
    elif wrong == "nan":
        features[7, 0] = torch.nan
    found: Any = [] if wrong == "empty" else batches(features, labels, 1000)
    with pytest.raises(InputError, match=message):
        dnc.fit(Flat(), found, 3)


def test_names_are_one_per_class() -> None:
    features, labels, _ = samples(100)
    with pytest.raises(InputError, match=r"^class_names: got 2 names, expected 3, num_classes; "):
        dnc.fit(Flat(), batches(features, labels, 50), 3, class_names=["a", "b"])


def test_the_encoder_stays_as_it_was() -> None:
    encoder = nn.Sequential(Flat(), nn.BatchNorm1d(12)).train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    features, labels, _ = samples(100)
    dnc.fit(encoder, batches(features, labels, 50), 3)
    assert encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


# ---- classes come and go ---------------------------------------------------------------------


@pytest.fixture
def clf() -> Any:
    features, labels, _ = samples(300)
    return dnc.fit(Flat(), batches(features, labels, 60), 3, 2, class_names=["a", "b", "c"])


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_class_is_added(clf: Any, count: int) -> None:
    x = samples(50, seed=9)[0].view(-1, 3, 2, 2)
    before, old = clf(x), clf.head.centroids.clone()
    new = torch.ones(12) + 0.1 * torch.randn(count, 12, generator=torch.Generator().manual_seed(1))
    clf.add_class("zebra", new.view(-1, 3, 2, 2))
    assert clf.class_names == ["a", "b", "c", "zebra"]
    assert clf.head.centroids.shape == (4, 2, 12)
    assert torch.equal(clf.head.centroids[:3], old)
    assert torch.equal(clf(x)[:, :3], before)  # to the bit
    assert clf(torch.ones(1, 3, 2, 2)).argmax() == 3
    assert clf.head.active[3].sum() == min(count, 2)


def test_a_class_is_removed(clf: Any) -> None:
    x = samples(50, seed=9)[0].view(-1, 3, 2, 2)
    before = clf(x)
    clf.remove_class("b")
    assert clf.class_names == ["a", "c"]
    assert torch.equal(clf(x), before[:, [0, 2]])  # to the bit


@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_scores_of_others_stay_to_the_bit(num_classes: int, width: int) -> None:
    torch.manual_seed(0)
    many = dnc.NearestCentroidHead(num_classes + 1, width, memory_size=0).eval()
    few = dnc.NearestCentroidHead(num_classes, width, memory_size=0).eval()
    few.centroids.copy_(many.centroids[:-1])
    for count in (1, 5, 64):
        x = torch.randn(count, width)
        assert torch.equal(few(x), many(x)[:, :-1])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda c: c.add_class("a", torch.ones(1, 3, 2, 2)),
            r"^name: got a, expected a class that",
        ),
        (
            lambda c: c.add_class("d", torch.ones(0, 3, 2, 2)),
            r"^images: got none of d, expected one",
        ),
        (lambda c: c.remove_class("aa"), r"^name: got aa, expected a class; did you mean 'a'\?"),
        (
            lambda c: (c.remove_class("a"), c.remove_class("b")),
            r"^name: got b, expected a class amo",
        ),
    ],
)
def test_classes_that_cannot_change(clf: Any, act: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        act(clf)


# ---- images ----------------------------------------------------------------------------------


def test_paths_and_pictures_need_a_transform(clf: Any, tmp_path: Any) -> None:
    picture = Image.new("RGB", (2, 2), (255, 0, 0))
    picture.save(tmp_path / "red.png")
    match = r"^images: got paths or PIL images without a transform, expected a tensor"
    with pytest.raises(InputError, match=match):
        clf([picture])
    clf.transform = lambda image: torch.from_numpy(np.asarray(image) / np.float32(255)).movedim(
        2, 0
    )
    expected = clf(torch.tensor([1.0, 0, 0])[None, :, None, None].expand(1, 3, 2, 2))
    assert torch.equal(clf([picture]), expected)
    assert torch.equal(clf([tmp_path / "red.png"]), expected)
    assert torch.equal(clf([str(tmp_path / "red.png")]), expected)
    with pytest.raises(FileNotFoundError, match=r"blue\.png: got no such file, expected an image"):
        clf([tmp_path / "blue.png"])
