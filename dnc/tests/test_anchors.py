"""Anchors are distinct training images of their class, and stay what the network makes of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dnc
from dnc.anchors import Anchors, _pairs, content_hash
from dnc.explain import explain_features, num_comparisons
from dnc.model import NearestCentroidClassifier
from shared_utils.errors import InputError


class Net(nn.Module):
    """A small network that can move."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 6, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.linear(images.flatten(1))
        return features


class Data:
    """A map-style data set with paths."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def path(self, index: int) -> str:
        return f"image {index}"


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    return Data(torch.randn(60, 3, 2, 2, generator=generator), torch.arange(60) % 4)


@pytest.fixture
def clf(data: Data) -> NearestCentroidClassifier:
    torch.manual_seed(0)
    loader = [(data.images, data.labels)]
    return dnc.fit(Net(), loader, 4, 3, class_names=["a", "b", "c", "d"])


def test_anchors_are_distinct_images_of_their_class(
    clf: NearestCentroidClassifier, data: Data
) -> None:
    before = clf.head.centroids.clone()
    found = clf.anchor(data, batch_size=7)
    assert clf.anchors == found
    z = clf.embed(data.images)
    for c, row in enumerate(found.indices):
        assert len(set(row)) == 3
        for k, index in enumerate(row):
            assert int(data.labels[index]) == c
            assert found.paths[c][k] == f"image {index}"
            assert found.hashes[c][k] == content_hash(data.images[index])
            assert clf.head.centroids[c, k] @ z[index] >= 1 - 1e-5
            cosine = float(before[c, k] @ z[index])
            assert found.cosines[c][k] == pytest.approx(cosine, abs=1e-5)
    # The pair of highest cosine of each class was taken.
    for c in range(4):
        own = z[data.labels == c] @ before[c].T
        assert max(found.cosines[c]) == pytest.approx(float(own.max()), abs=1e-5)


def test_pairs_by_hand() -> None:
    import numpy as np

    similarity = np.array([[0.9, 0.8, 0.1], [0.9, 0.85, 0.2], [0.1, 0.7, 0.3]])
    every = np.ones(3, dtype=bool)
    # Images 0 and 1 tie for place 0: the earlier one; then 1 for place 1; 2 is left for place 2.
    assert list(_pairs(similarity, every)) == [(0, 0), (1, 1), (2, 2)]
    assert list(_pairs(similarity, np.array([False, True, True]))) == [(1, 1), (2, 2)]
    assert list(_pairs(similarity[:1], every)) == [(0, 0)]


def test_they_follow_a_network_that_moves(clf: NearestCentroidClassifier, data: Data) -> None:
    from dnc.anchors import follow

    anchors = clf.anchor(data)
    with torch.no_grad():
        clf.encoder.linear.weight.add_(torch.randn(6, 12))  # type: ignore[operator,union-attr]
    z = F.normalize(clf.encoder(data.images), dim=1)
    c, k, index = anchors.places()[5]
    assert clf.head.centroids[c, k] @ z[index] < 0.99
    follow(clf.head, clf.embed, data, anchors, batch_size=5)
    for c, k, index in anchors.places():
        assert clf.head.centroids[c, k] @ z[index] >= 1 - 1e-5


def test_a_class_with_few_images_keeps_spare_places(clf: NearestCentroidClassifier) -> None:
    images = torch.randn(9, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    found = clf.anchor(Data(images, torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3])))
    assert [sum(i >= 0 for i in row) for row in found.indices] == [3, 1, 3, 2]
    assert clf.head.active.sum(dim=1).tolist() == [3, 1, 3, 2]
    only = clf.head.centroids[1]
    assert torch.equal(only, only[clf.head.active[1]].expand(3, -1))
    e = explain_features(clf, clf.embed(images[3:4])[0])
    assert (e.predicted.class_name, e.predicted.index, len(e.own)) == ("b", 3, 1)


def test_a_class_without_an_image(clf: NearestCentroidClassifier) -> None:
    images = torch.randn(3, 3, 2, 2)
    with pytest.raises(InputError, match=r"^dataset: got no image of d, expected one at least"):
        clf.anchor(Data(images, torch.tensor([0, 1, 2])))


def test_plain_and_back(clf: NearestCentroidClassifier, data: Data) -> None:
    import json
    from dataclasses import asdict

    found = clf.anchor(data)
    assert Anchors.from_plain(json.loads(json.dumps(asdict(found)))) == found


# ---- explanations ----------------------------------------------------------------------------


def test_the_rule_is_the_decision(clf: NearestCentroidClassifier, data: Data) -> None:
    clf.anchor(data)
    x = torch.randn(200, 3, 2, 2, generator=torch.Generator().manual_seed(5))
    answers = clf(x).argmax(dim=1).tolist()
    probabilities = clf(x).softmax(dim=1)
    for i, (z, answer) in enumerate(zip(clf.embed(x), answers, strict=True)):
        e = explain_features(clf, z, top=4)
        cosines = torch.einsum("ckd,d->ck", clf.head.centroids, z)
        c, k = divmod(int(cosines.argmax()), 3)
        assert (e.predicted.class_index, e.predicted.centroid) == (c, k)
        assert e.predicted.class_index == answer
        # Full rule: greater than every anchor of every other class, by one of its own at least.
        others = torch.cat([cosines[:c], cosines[c + 1 :]]).flatten()
        assert any(bool((own > others).all()) for own in cosines[c])
        assert e.margin == pytest.approx(float(cosines[c, k] - others.max()), abs=1e-6)
        assert [a.cosine for a in e.rivals] == sorted((a.cosine for a in e.rivals), reverse=True)
        assert [a.cosine for a in e.own] == sorted((a.cosine for a in e.own), reverse=True)
        assert e.probability == pytest.approx(float(probabilities[i, answer]), abs=1e-5)


def test_the_counterfactual_flips_the_decision(clf: NearestCentroidClassifier, data: Data) -> None:
    clf.anchor(data)
    x = torch.randn(50, 3, 2, 2, generator=torch.Generator().manual_seed(6))
    for z in clf.embed(x):
        e = explain_features(clf, z)
        cosines = torch.einsum("ckd,d->ck", clf.head.centroids, z)
        for anchor in e.flips_without:
            assert int(cosines.argmax()) // 3 == e.predicted.class_index
            cosines[anchor.class_index, anchor.centroid] = -2
        assert clf.class_names[int(cosines.argmax()) // 3] == e.flips_to != e.predicted.class_name


def test_an_anchor_explains_itself(clf: NearestCentroidClassifier, data: Data) -> None:
    anchors = clf.anchor(data)
    for c, k, index in anchors.places():
        found = clf.explain(data.images[index])
        assert (found["winner"]["class_index"], found["winner"]["index"]) == (c, index)
        assert found["winner"]["centroid"] == k
        assert found["score"] == pytest.approx(1, abs=1e-5)
        assert found["rule"]["comparisons"] == 3 * 3 * 3


def test_comparisons_of_a_full_rule() -> None:
    head = dnc.NearestCentroidHead(1000, 4, 4, memory_size=0)
    big = NearestCentroidClassifier(nn.Identity(), head, [str(i) for i in range(1000)])
    assert num_comparisons(big, 0) == 15_984
    four = dnc.NearestCentroidHead(4, 4, 4, memory_size=0)
    assert num_comparisons(NearestCentroidClassifier(nn.Identity(), four, list("abcd")), 2) == 48


def test_unfaithful_logits_are_not_explained(data: Data) -> None:
    head = dnc.NearestCentroidHead(4, 6, 3, logit_norm="affine", memory_size=0)
    clf = NearestCentroidClassifier(Net(), head, list("abcd"))
    clf.anchor(data)
    match = r"^logit_norm: got affine, under which logits do not rise with the cosines, .* expected"
    with pytest.raises(InputError, match=match):
        clf.explain(data.images[0])
    # The case that shows why: cosines and scales under which another class wins.
    narrow = dnc.NearestCentroidHead(3, 2, 1, logit_norm="affine", memory_size=0)
    with torch.no_grad():
        narrow.norm.weight.copy_(torch.tensor([1.0, 1.2, 1.0]))  # type: ignore[union-attr]
    assert narrow.logits_of(torch.tensor([[0.50, 0.49, 0.10]])).argmax() == 1


def test_means_are_not_explained(clf: NearestCentroidClassifier, data: Data) -> None:
    with pytest.raises(InputError, match=r"^anchors: got none: sub-centroids are means of feature"):
        clf.explain(data.images[0])


def test_a_class_that_came_later_has_no_image(clf: NearestCentroidClassifier, data: Data) -> None:
    clf.anchor(data)
    clf.add_class("zebra", data.images[:5])
    with pytest.raises(InputError, match=r"^anchors: got no training image of zebra, expected one"):
        clf.explain(data.images[0])
    clf.remove_class("zebra")
    assert clf.explain(data.images[0])["class"] in list("abcd")


@pytest.mark.parametrize("top", [0, 1])
def test_one_class_explains_nothing(clf: NearestCentroidClassifier, data: Data, top: Any) -> None:
    clf.anchor(data)
    with pytest.raises(InputError, match=rf"^top: got {top}, expected 2 or more; "):
        clf.explain(data.images[0], top=top)
