"""From the data of explanations to their JSON form and to one page that a browser shows.

Plain functions of plain data: nothing here knows the network or reads a file. An anchor is a
sub-centroid that is a real training image. Wording is made here, once, for both forms; names that
users gave are escaped and set apart from their surroundings wherever they stand on the page.

Paper: "Visual Recognition with Deep Nearest Centroids", W. Wang, C. Han, T. Zhou, D. Liu, ICLR
2023, Sec. 3 and its figures of rules and nearest images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dnc.inline import Picture, inline

# Longer sides in pixels: of a decision's two pictures, which page.css draws up to 256 of its pixels
# wide, and of the others, in rows of 64 and in the list of classes from 112 on.
LARGE, SMALL = 256, 96
MOST_LISTED = 400  # anchors with a picture in the list of classes; of photographs some 12 MB
MIN_DIGITS, MAX_DIGITS = 3, 8  # float32 has no more
LONG_NAME = 14  # characters from which on a class's name gets a smaller heading


@dataclass(frozen=True)
class Anchor:
    """A training image that stands for a class.

    Attributes:
        class_index: its class, in [0, C).
        class_name: as the user calls it; any text.
        centroid: which of its class's sub-centroids it is, in [0, K).
        index: its place in the training set.
        path: its file, where it has one.
        cosine: to the explained image, in [-1, 1]; not used of the anchors in a list of classes.
        image: the picture as PNG, of any size: the page holds it no larger than it draws it. Empty
            of an anchor in a list of classes that is not `pictured`.
        pixel: row and column, where the anchor is a pixel of the training image.
    """

    class_index: int
    class_name: str
    centroid: int
    index: int
    path: str | None
    cosine: float
    image: bytes = field(repr=False)
    pixel: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """What a text calls it."""
        place = "" if self.pixel is None else " at row {}, column {}".format(*self.pixel)
        return f"training image {self.index}{place}"


@dataclass(frozen=True)
class Explanation:
    """One decision and what it rests on.

    Attributes:
        image: the explained picture as PNG, of any size.
        source: the path or name that the user gave for it.
        predicted: the anchor closest to it, whose class is the decision.
        probability: of the decision, in [0, 1].
        rivals: the best anchor of each of the next classes, best first; at least one.
        own: all anchors of the predicted class, best first, `predicted` included.
        margin: cosine of `predicted` less that of the best rival.
        flips_without: the anchors of the predicted class without which it decides otherwise: all
            those above the best rival, best first.
        flips_to: the class that wins then.
        true_class: the right answer, where it is known.
        kind: what is explained, in one word: image, or region or pixel of one.
        similarity: PNG of how similar each place of the image is to `predicted`; none: b"".
    """

    image: bytes = field(repr=False)
    source: str
    predicted: Anchor
    probability: float
    rivals: tuple[Anchor, ...]
    own: tuple[Anchor, ...]
    margin: float
    flips_without: tuple[Anchor, ...]
    flips_to: str
    true_class: str | None = None
    kind: str = "image"
    similarity: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if not (self.rivals and self.own and self.flips_without):
            raise ValueError("rivals, own, flips_without: got none, expected at least one of each")

    @property
    def is_right(self) -> bool | None:
        """None where the true class is not known."""
        return None if self.true_class is None else self.true_class == self.predicted.class_name

    @property
    def digits(self) -> int:
        """Decimals with which the winner and its best rival read differently."""
        for digits in range(MIN_DIGITS, MAX_DIGITS):
            if round(self.predicted.cosine, digits) != round(self.rivals[0].cosine, digits):
                return digits
        return MAX_DIGITS if self.margin else MIN_DIGITS


class Sentence:
    """A text with names in it: `str` gives it plain, a template escaped, each name isolated.

    Isolated (`<bdi>`), a name in right-to-left script leaves the order of the rest alone.
    """

    def __init__(self, text: str, *names: str) -> None:
        """Take a text with a `{}` for each name."""
        self.text, self.names = text, names

    def __str__(self) -> str:
        return self.text.format(*self.names)

    def __html__(self) -> str:
        return Markup(self.text).format(*(Markup("<bdi>{}</bdi>").format(n) for n in self.names))


def short_rule(e: Explanation) -> Sentence:
    """The rule that decided, in one comparison.

    It is exact: to be greater than each of many is to be greater than the greatest of them.
    """
    winner, rival = e.predicted, e.rivals[0]
    own, other = number(winner.cosine, e.digits), number(rival.cosine, e.digits)
    names = (winner.name, winner.class_name, rival.name, rival.class_name)
    if e.margin == 0:
        tie = "a tie, which goes to the class that comes first"
        text = f"as close to {{}} of class {{}} ({own}) as to {{}} of class {{}} ({other}): {tie}"
        return Sentence(text, *names)
    text = f"closer to {{}} of class {{}} ({own}) than to its strongest rival, {{}} of class {{}}"
    return Sentence(f"{text} ({other})", *names)


def full_rule(e: Explanation, num_comparisons: int) -> Sentence:
    """The rule as the paper writes it: one clause for each anchor of the class."""
    others = num_comparisons // len(e.own)
    clause = f"(closer to {{}} than to each of the {others:,} anchors of other classes)"
    text = f"IF {' OR '.join([clause] * len(e.own))} THEN {{}}"
    return Sentence(text, *(anchor.name for anchor in e.own), e.predicted.class_name)


def counterfactual(e: Explanation) -> Sentence:
    """Which anchors would have to be missing for another decision, and for which."""
    without, own, count = e.flips_without, e.predicted.class_name, len(e.flips_without)
    if count == 1:
        text, names = "Without {} it would be class {}", [without[0].name, e.flips_to]
        if len(e.own) > 1:
            text += f"; the next of class {{}} comes to {number(e.own[1].cosine, e.digits)}"
            names.append(own)
        return Sentence(f"{text}.", *names)
    if count == len(e.own):
        all_of = "both" if count == 2 else f"all {count}"
        text = f"Only without {all_of} anchors of class {{}} would it be class {{}}."
        return Sentence(text, own, e.flips_to)
    all_of = "both" if count == 2 else "all of"
    listed = f"{', '.join(['{}'] * (count - 1))} and {{}}"
    text = f"Only without {all_of} {listed} would it be class {{}}."
    return Sentence(text, *(anchor.name for anchor in without), e.flips_to)


def explanation_dict(e: Explanation, num_comparisons: int) -> dict[str, Any]:
    """The JSON form of an explanation, without pictures.

    Args:
        e: the explanation.
        num_comparisons: of the full rule, K (C - 1) K.
    """
    return {
        "source": e.source,
        "class": e.predicted.class_name,
        "class_index": e.predicted.class_index,
        "score": e.predicted.cosine,
        "probability": e.probability,
        "true_class": e.true_class,
        "winner": _anchor_dict(e.predicted),
        "rivals": [_anchor_dict(anchor) for anchor in e.rivals],
        "anchors": [_anchor_dict(anchor) for anchor in e.own],
        "margin": e.margin,
        "rule": {
            "short": str(short_rule(e)),
            "full": str(full_rule(e, num_comparisons)),
            "comparisons": num_comparisons,
        },
        "counterfactual": {
            "without": [_anchor_dict(anchor) for anchor in e.flips_without],
            "class": e.flips_to,
            "text": str(counterfactual(e)),
        },
    }


def pictured(explanations: Sequence[Explanation], counts: Sequence[int]) -> set[int]:
    """The classes whose anchors the page shows as pictures; of the others it tells the numbers.

    Args:
        explanations: what the page explains.
        counts: anchors of each class.

    Returns: all, as long as they have no more than `MOST_LISTED` anchors together; otherwise those
        named by the explanations, decisions before rivals, up to that number.
    """
    if sum(counts) <= MOST_LISTED:
        return set(range(len(counts)))
    named = [e.predicted for e in explanations] + [r for e in explanations for r in e.rivals]
    found: set[int] = set()
    left = MOST_LISTED
    for anchor in named:
        c = anchor.class_index
        if c not in found and c < len(counts) and counts[c] <= left:
            found.add(c)
            left -= counts[c]
    return found


def render_explanations(
    explanations: Sequence[Explanation],
    classes: Sequence[tuple[str, Sequence[Anchor]]],
    title: str,
    about: str,
) -> str:
    """One page that needs nothing but itself: each decision and why, then all classes.

    Args:
        explanations: at least one.
        classes: name and anchors of each class, in the order of their indices.
        title: the page's heading.
        about: a sentence or two below it: which model, which data.

    Returns: HTML to be written as UTF-8. What UTF-8 cannot say, as in file names of unknown
        encoding, is spelt out with a backslash.
    Raises: ValueError where a picture is no PNG.
    """
    known = {_key(anchor) for _, anchors in classes for anchor in anchors}
    counts = [len(anchors) for _, anchors in classes]
    num_anchors, shown = sum(counts), pictured(explanations, counts)
    won: dict[tuple[int, int], list[int]] = {}
    for at, e in enumerate(explanations, 1):
        won.setdefault(_key(e.predicted), []).append(at)
    judged = [e.is_right for e in explanations if e.is_right is not None]
    html = _environment().get_template("explanation.html").render(
        title=title,
        about=about,
        decisions=[_decision(e, at, num_anchors) for at, e in enumerate(explanations, 1)],
        num_judged=len(judged),
        num_right=sum(judged),
        classes=[_class(i, *classes[i], won) for i in sorted(shown)],
        others=[(i, *named) for i, named in enumerate(classes) if i not in shown],
        known=known,
        num_anchors=num_anchors,
        num_classes=len(classes),
    )  # fmt: skip
    return html.encode("utf-8", "backslashreplace").decode("utf-8")


def number(value: float, digits: int) -> str:
    """A cosine as text, with a real minus sign and no negative zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """A probability as text; what is not certain does not read as certain."""
    if 0.999 < share < 1:
        return "over 99.9%"
    if 0 < share < 0.001:
        return "under 0.1%"
    return f"{100 * share:.1f}%"


class _Row(NamedTuple):
    """An anchor with its bar: from `start` on, `length` wide, in percent of the scale."""

    anchor: Anchor
    picture: Picture
    cosine: str
    start: float
    length: float
    is_winner: bool


class _Scale(NamedTuple):
    """The range that bars are drawn in: up to 1, from 0 or a tenth below the lowest cosine."""

    low: float

    def __str__(self) -> str:
        return (
            f"Bars from {number(self.low, 1)}, starting at 0, to 1."
            if self.low
            else "Bars from 0 to 1."
        )

    def at(self, value: float) -> float:
        return round(100 * (min(1.0, max(self.low, value)) - self.low) / (1 - self.low), 2)


def _decision(e: Explanation, at: int, num_anchors: int) -> dict[str, Any]:
    """What the template shows of an explanation, the one of number `at`."""
    shown = (e.predicted, *e.rivals, *e.own)
    scale = _Scale(min(0.0, math.floor(10 * min(anchor.cosine for anchor in shown)) / 10))
    num_comparisons = len(e.own) * (num_anchors - len(e.own))
    return {
        "id": f"image-{at}",
        "at": at,
        "e": e,
        "small": inline(e.image, SMALL),
        "picture": inline(e.image, LARGE),
        "winner_picture": inline(e.predicted.image, LARGE),
        "similarity": inline(e.similarity, LARGE) if e.similarity else None,
        "is_long": len(e.predicted.class_name) >= LONG_NAME,
        "cosine": number(e.predicted.cosine, MIN_DIGITS),
        "file": _file(e.predicted),
        "rivals": [_row(anchor, e, scale) for anchor in (e.predicted, *e.rivals)],
        "own": [_row(anchor, e, scale) for anchor in e.own],
        "scale": str(scale),
        "winner_at": scale.at(e.predicted.cosine),
        "rival_at": scale.at(e.rivals[0].cosine),
        "margin": number(e.margin, e.digits),
        "probability": percent(e.probability),
        "rule": short_rule(e),
        "counterfactual": counterfactual(e),
        "num_comparisons": num_comparisons,
        "num_others": num_anchors - len(e.own),
    }


def _row(anchor: Anchor, e: Explanation, scale: _Scale) -> _Row:
    start, end = sorted((scale.at(0), scale.at(anchor.cosine)))
    return _Row(
        anchor=anchor,
        picture=inline(anchor.image, SMALL),
        cosine=number(anchor.cosine, e.digits),
        start=start,
        length=round(end - start, 2),
        is_winner=_key(anchor) == _key(e.predicted),
    )


def _class(
    index: int, name: str, anchors: Sequence[Anchor], won: dict[tuple[int, int], list[int]]
) -> dict[str, Any]:
    """What the template shows of a class; `won` has the images each anchor was closest to."""
    shown = [
        {"anchor": anchor, "picture": inline(anchor.image, SMALL), "won": won.get(_key(anchor), [])}
        for anchor in anchors
    ]
    return {"id": f"class-{index}", "name": name, "anchors": shown}


def _anchor_dict(anchor: Anchor) -> dict[str, Any]:
    names = ("class_index", "class_name", "centroid", "index", "path", "cosine")
    pixel = {} if anchor.pixel is None else dict(zip(("row", "column"), anchor.pixel, strict=True))
    return {name: getattr(anchor, name) for name in names} | pixel


def _key(anchor: Anchor) -> tuple[int, int]:
    return anchor.class_index, anchor.centroid


def _file(anchor: Anchor) -> str:
    return PurePath(anchor.path).name if anchor.path else ""


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("dnc"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
