"""Why an image got its class: the training images it was compared with.

Paper: Sec. 3.3 and its figures of rules. Everything follows from the cosines to the sub-centroids
in use, which are training images (`dnc.anchors`), so it is exact: the reported winner is the
largest of the numbers that decide.

Shapes: C classes, K sub-centroids of a class, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dnc.anchors import NONE, Anchors
from dnc.classifier import NearestCentroidHead
from dnc.model import NearestCentroidClassifier
from dnc.page import Anchor, Explanation
from shared_utils.errors import InputError

Picture = Callable[[int], bytes]


def explainable(classifier: NearestCentroidClassifier) -> Anchors:
    """The images that decide.  Raises: InputError where the nearest training image does not."""
    head: Any = classifier.head
    if not isinstance(head, NearestCentroidHead):
        raise InputError(
            "head",
            f"a learned one ({type(head).__name__})",
            "sub-centroids, whose cosines decide",
            "train with --model.head dnc, or turn the network into one with dnc fit",
        )
    if not head.is_faithful:
        raise InputError(
            "logit_norm",
            "affine, under which logits do not rise with the cosines, so that the class of the "
            "nearest image need not win",
            "none or standard",
            "train without it",
        )
    if classifier.anchors is None:
        raise InputError(
            "anchors",
            "none: sub-centroids are means of features, not images",
            "an anchored classifier",
            "call anchor(dataset), or train without --anchor.skip",
        )
    unknown = [
        classifier.class_names[c]
        for c, row in enumerate(classifier.anchors.indices)
        if all(index == NONE for index in row)
    ]
    if unknown:
        raise InputError(
            "anchors",
            f"no training image of {unknown[0]}",
            "one at least of each class",
            "call anchor(dataset) with images of the classes that were added",
        )
    return classifier.anchors


@torch.no_grad()
def explain_features(
    classifier: NearestCentroidClassifier,
    z: Tensor,
    *,
    image: bytes = b"",
    source: str = "",
    picture: Picture = lambda index: b"",
    top: int = 5,
    true_class: str | None = None,
) -> Explanation:
    """The explanation of one unit vector.

    Args:
        classifier: anchored.
        z: (D,).
        image: PNG of what is explained.
        source: what the user calls it.
        picture: place in the training set -> PNG.
        top: classes to name, the predicted one included; 2 or more.
        true_class: where it is known.

    Raises: InputError where the classifier cannot be explained.
    """
    head, anchors = classifier.head, explainable(classifier)

    def anchor(c: int, k: int, cosine: float) -> Anchor:
        index = anchors.indices[c][k]
        return Anchor(
            class_index=c,
            class_name=classifier.class_names[c],
            centroid=k,
            index=index,
            path=anchors.paths[c][k],
            cosine=cosine,
            image=picture(index),
        )

    return decision(
        head,
        head.cosines(z[None])[0],
        anchor,
        top=top,
        image=image,
        source=source,
        true_class=true_class,
    )


@torch.no_grad()
def decision(
    head: NearestCentroidHead,
    cosines: Tensor,
    anchor: Callable[[int, int, float], Anchor],
    *,
    top: int,
    **shown: Any,
) -> Explanation:
    """The explanation of a decision by cosines.

    Args:
        head: made them.
        cosines: (C, K) to the sub-centroids, which are training data; -inf to those not in use.
        anchor: class, sub-centroid and cosine -> what is shown of it.
        top: classes to name, the predicted one included; 2 or more.
        **shown: further fields of `Explanation`.

    Raises: InputError where `top` is too small.
    """
    if top < 2:
        raise InputError("top", top, "2 or more", "correct it")
    best = cosines.amax(dim=1)
    probabilities = head.logits_of(best[None])[0].softmax(dim=0)
    order = sorted(range(len(best)), key=lambda c: (-float(best[c]), c))

    def place(c: int, k: int) -> Anchor:
        return anchor(c, k, float(cosines[c, k]))

    winner, rival = order[0], order[1]
    places = sorted(
        (k for k in range(cosines.shape[1]) if bool(cosines[winner, k].isfinite())),
        key=lambda k: (-float(cosines[winner, k]), k),
    )
    own = tuple(place(winner, k) for k in places)
    rivals = tuple(place(c, int(cosines[c].argmax())) for c in order[1:top])
    # Of equals the class of the lower number wins.
    bar = (float(best[rival]), -rival)
    above = tuple(a for a in own if (a.cosine, -winner) > bar)
    return Explanation(
        predicted=own[0],
        probability=float(probabilities[winner]),
        rivals=rivals,
        own=own,
        margin=own[0].cosine - rivals[0].cosine,
        flips_without=above,
        flips_to=rivals[0].class_name,
        **shown,
    )


def num_comparisons(classifier: NearestCentroidClassifier, class_index: int) -> int:
    """Comparisons of the full rule of a class: its anchors times those of all others."""
    active = classifier.head.active.sum(dim=1)
    return int(active[class_index] * (active.sum() - active[class_index]))
