"""A page of many classes and large pictures stays one that a browser opens and a person sends."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dnc.commands
import dnc.page
from dnc.cli import main
from dnc.page import (
    LARGE,
    MOST_LISTED,
    SMALL,
    Anchor,
    Explanation,
    pictured,
    render_explanations,
)

from .page_data import ABOUT, TITLE, png

MOST_BYTES = 20_000_000
NUM_CLASSES, K = 1000, 4
NOISE = png(1, LARGE, LARGE)  # of nothing is a PNG larger


def anchor(c: int, k: int, image: bytes, cosine: float = 0.5) -> Anchor:
    return Anchor(c, f"class {c}", k, K * c + k, f"train/{c}/{k}.png", cosine, image)


def explain(image: bytes, *ranked: int) -> Explanation:
    """Decided for the first of these classes, the others are rivals."""
    own = tuple(anchor(ranked[0], k, image, 0.9 - 0.1 * k) for k in range(K))
    rivals = tuple(anchor(c, 0, image, 0.85 - 0.01 * i) for i, c in enumerate(ranked[1:]))
    return Explanation(
        image, "new.png", own[0], 0.7, rivals, own, 0.05, own[:1], rivals[0].class_name
    )


def classes(image: bytes, count: int = NUM_CLASSES) -> list[tuple[str, list[Anchor]]]:
    return [(f"class {c}", [anchor(c, k, image) for k in range(K)]) for c in range(count)]


def shown(html: str) -> list[int]:
    """The classes whose anchors have pictures, in the order of the page."""
    return [int(c) for c in re.findall(r'<article class="class-of" id="class-(\d+)"', html)]


def sizes(html: str, start: str, end: str) -> set[int]:
    """Widths of the pictures between two places of the page, as they are told and as they are."""
    part = html[html.index(start) : html.index(end)]
    found = set()
    for data, width in re.findall(r'src="data:image/png;base64,([^"]+)"[^>]* width="(\d+)"', part):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.width == int(width)
        found.add(int(width))
    return found


def test_a_thousand_classes_of_large_pictures() -> None:
    """All of them inlined as they are would be a gigabyte."""
    decisions = [explain(NOISE, 7, 3, 999), explain(NOISE, 500, 7, 12)]
    html = render_explanations(decisions, classes(NOISE), TITLE, ABOUT)
    assert NUM_CLASSES * K * len(NOISE) * 4 / 3 > 1e9
    assert len(html) < MOST_BYTES / 5
    assert shown(html) == [3, 7, 12, 500, 999]
    others = html[html.index('<ul class="others">') :]
    assert others.count("<li ") == NUM_CLASSES - 5
    assert '<li id="class-4"><bdi>class 4</bdi>' in others
    assert '<span id="anchor-4-3">19</span>' in others
    assert "These 4,000 training images" in html
    assert "those of the\nother 995 <a" in html
    assert "All 1000 classes and their anchors" in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {*re.findall(r'href="#([^"]+)"', html)} <= set(ids)
    assert "These are 15,984 comparisons." in html  # K (C - 1) K


def test_a_hundred_classes_are_all_shown() -> None:
    html = render_explanations([explain(NOISE, 7, 3)], classes(NOISE, 100), TITLE, ABOUT)
    assert MOST_LISTED == 100 * K
    assert shown(html) == list(range(100))
    assert "others" not in html[html.index("</style>") :]
    assert len(html) < MOST_BYTES


def test_many_decisions_do_not_bring_the_pictures_back() -> None:
    tiny = png()
    decisions = [explain(tiny, c, c + 1, c + 2, c + 3) for c in range(0, 600, 4)]
    html = render_explanations(decisions, classes(tiny), TITLE, ABOUT)
    assert len(shown(html)) == MOST_LISTED // K
    assert shown(html) == [e.predicted.class_index for e in decisions[:100]]  # decisions first
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    assert {*re.findall(r'href="#([^"]+)"', html)} <= ids


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([4] * 100, set(range(100))),
        ([4] * 101, {7, 3, 9}),
        ([401], set()),
        ([1] * 8 + [399], {7, 3}),  # class 9 is not there
        ([1] * 7 + [399, 1, 1], {7, 3}),  # 399 and 1, and no room for more
    ],
    ids=["as many as may be", "too many", "one of too many", "absent", "full"],
)
def test_which_classes_have_pictures(counts: list[int], expected: set[int]) -> None:
    assert pictured([explain(b"", 7, 3, 9)], counts) == expected


def test_pictures_are_as_large_as_they_are_drawn() -> None:
    html = render_explanations([explain(NOISE, 0, 1)] * 2, classes(NOISE, 2), TITLE, ABOUT)
    assert sizes(html, '<ol class="overview">', "</ol>") == {SMALL}
    assert sizes(html, '<div class="pair">', '<div class="why">') == {LARGE}
    assert sizes(html, '<div class="why">', '<section class="rule"') == {SMALL}
    assert sizes(html, '<section id="classes"', "</body>") == {SMALL}


def test_only_pictures_that_are_shown_are_made(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 anchors, room for 8 of them: those of 4 classes."""
    made: list[tuple[int, int]] = []
    png_of = dnc.commands._png

    def watched(image: Image.Image) -> bytes:
        made.append(image.size)
        return png_of(image)

    monkeypatch.setattr(dnc.page, "MOST_LISTED", 8)
    monkeypatch.setattr(dnc.commands, "_png", watched)
    page = tmp_path / "why.html"
    argv = ["explain", "--run", str(digits_run), "--output", str(page), "--from-test", "2"]
    assert main([*argv, "--top", "2"]) == 0
    html = page.read_text()
    assert 2 <= len(shown(html)) <= 4
    assert html.count("<li id=") == 10 - len(shown(html))
    assert len(made) <= 2 + 8
    assert len(json.loads(page.with_suffix(".json").read_text())) == 2


def test_large_training_images_are_reduced_before_the_page() -> None:
    pixels = np.zeros((600, 1000, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(dnc.commands._png(Image.fromarray(pixels)))) as image:
        assert image.size == (LARGE, round(LARGE * 0.6))
