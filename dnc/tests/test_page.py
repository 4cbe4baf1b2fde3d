"""What the page of explanations and its JSON form say, and that names cannot harm it."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

import dnc.page
from dnc.page import (
    Explanation,
    counterfactual,
    explanation_dict,
    full_rule,
    number,
    percent,
    render_explanations,
    short_rule,
)

from .page_data import ABOUT, TITLE, all_classes, anchor, explain, png

COSINES = [[0.2, 0.71], [0.5, 0.64], [0.1, -0.3]]
EVIL = "<script>alert(1)</script> & \"quoted\" 'too' {{ 7*7 }}"
VOID = {"meta", "link", "img", "br", "col"}


class Page(HTMLParser):
    """Its elements as (tag, attributes), its text, and whether every element was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("dt", "dd"):
            self.words.append(" ")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def all(self, tag: str, name: str) -> list[str | None]:
        """An attribute's values, of all elements with this tag and attribute."""
        return [found[name] for kind, found in self.elements if kind == tag and name in found]


def render(*explanations: Explanation, title: str = TITLE, about: str = ABOUT) -> Page:
    return Page(render_explanations(explanations, all_classes(), title, about))


def test_the_page_says_what_was_decided_and_why() -> None:
    page = render(explain(COSINES, "a"))
    assert "Image 1 is a because it is closest to training image 1 of class a." in page.text
    rule = (
        "It is closer to training image 1 of class a (0.710) than to its strongest rival, training "
        "image 11 of class b (0.640)."
    )
    assert f"Why a and not b {rule} Without training image 1 it would be class b" in page.text
    assert "Probability 87.0% Margin 0.070 True class a right" in page.text
    assert "1 of 1 right" in page.text
    assert "8 comparisons" in page.text  # K (C - 1) K
    for cosine in ("0.710", "0.640", "0.200", "0.100"):
        assert cosine in page.text


def test_a_wrong_decision_is_called_wrong_and_an_unknown_one_is_not_judged() -> None:
    wrong, unknown = explain(COSINES, "c"), explain(COSINES)
    page = render(wrong, unknown)
    assert "True class c wrong" in page.text
    assert "0 of 1 right of those whose class is known" in page.text
    assert "True class" not in render(unknown).text
    assert "right" not in render(unknown).text


def test_headings_descend_and_every_image_has_its_size_and_alternative() -> None:
    page = render(explain(COSINES), explain(COSINES))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    images = [found for tag, found in page.elements if tag == "img"]
    assert all(found["width"] == found["height"] == "8" for found in images)
    assert all(found["class"] == "tiny" for found in images)
    alternatives = {found["alt"] for found in images}
    assert {"the explained image, new/image.png", "training image 1 of class a"} <= alternatives
    assert page.all("html", "lang") == ["en"]


def test_links_go_both_ways_and_none_dangles() -> None:
    page = render(explain(COSINES), explain([[0.1, 0.2], [0.3, 0.4], [0.9, 0.5]]))
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    links = page.all("a", "href")
    assert {f"#{name}" for name in ids} >= set(links)
    assert {"#class-0", "#anchor-0-1", "#image-1", "#class-2", "#anchor-2-0", "#image-2"} <= {
        *links
    }
    assert "Training image 1train/1.pngclosest to image 1" in page.text
    for tag, found in page.elements:
        for name in ("aria-labelledby", "for", "headers"):
            assert found.get(name) is None or found[name] in ids, tag


def test_an_anchor_that_the_list_of_classes_lacks_is_no_link() -> None:
    html = render_explanations([explain(COSINES)], all_classes()[1:], TITLE, ABOUT)
    assert "#anchor-0-" not in html
    assert "#anchor-1-1" in html


def test_nothing_is_fetched() -> None:
    html = render_explanations([explain(COSINES)], all_classes(), TITLE, ABOUT)
    page = Page(html)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "iframe", "base", "form"})
    assert all(str(uri).startswith("data:image/png;base64,") for uri in page.all("img", "src"))
    assert page.all("link", "href") == ["data:,"]
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    "name", [EVIL, "x" * 300, "صورة", "a\u202eb", "tab\there", "鳥", "{0} %s {{"]
)
def test_names_are_shown_as_they_are(name: str) -> None:
    e = explain(COSINES, name, class_name=name, path=f"/{name}/1.png", source=name)
    classes = all_classes(class_name=name, path=f"/{name}/1.png")
    html = render_explanations([e], classes, title=name, about=name)
    page = Page(html)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script"})
    assert [key for _, found in page.elements for key in found if key.startswith("on")] == []
    shown = re.sub(r"\s+", " ", name)
    assert f"closer to training image 1 of class {shown} (0.710)" in page.text
    assert f"the explained image, {name}" in page.all("img", "alt")
    assert page.text.count(shown) > 20


def test_names_are_isolated_from_the_text_around_them() -> None:
    name = "صورة"
    e = explain(COSINES, class_name=name, path=None)
    html = render_explanations([e], all_classes(class_name=name), TITLE, ABOUT)
    html = re.sub(r'alt="[^"]*"', "", html)  # an attribute has no markup
    assert html.count(name) == len(re.findall(f"<bdi[^>]*>{name}</bdi>", html)) > 10


def test_a_path_that_utf8_cannot_say_is_spelt_out() -> None:
    html = render_explanations([explain(COSINES, source="a\udcffb")], all_classes(), TITLE, ABOUT)
    assert "a\\udcffb" in html
    html.encode("utf-8")


def test_bars_reach_as_far_as_their_cosine() -> None:
    bars = re.findall(r"--start: ([\d.]+)%; --length: ([\d.]+)%; --mark: ([\d.]+)%", _html(COSINES))
    rivals = [tuple(float(part) for part in bar) for bar in bars]
    assert rivals == [(0, 71, 71), (0, 64, 71), (0, 10, 71), (0, 71, 64), (0, 20, 64)]


def test_bars_leave_room_for_negative_cosines() -> None:
    html = _html([[0.52, -0.18], [0.28, 0.1], [-0.08, -0.2]])
    bars = re.findall(r"--start: ([\d.]+)%; --length: ([\d.]+)%", html)
    # From -0.2 to 1: zero is a sixth of the way.
    assert [bar[0] for bar in bars] == ["16.67", "16.67", "10.0", "16.67", "1.67"]
    assert [bar[1] for bar in bars] == ["43.33", "23.33", "6.67", "43.33", "15.0"]
    assert "Bars from \N{MINUS SIGN}0.2, starting at 0, to 1." in html
    assert "\N{MINUS SIGN}0.080" in html


def _html(cosines: list[list[float]]) -> str:
    return render_explanations([explain(cosines)], all_classes(), TITLE, ABOUT)


def test_the_rule_shows_as_many_digits_as_it_needs() -> None:
    near = explain([[0.712341, 0.1], [0.712339, 0.2], [0.0, 0.0]])
    assert "(0.712341) than" in str(short_rule(near))
    nearer = explain([[0.5 + 2**-24, 0.1], [0.5, 0.2], [0.0, 0.0]])
    assert "(0.5000001) than" in str(short_rule(nearer))
    assert "class b (0.5000000)" in str(short_rule(nearer))
    assert "(0.7124) than" in str(short_rule(explain([[0.7124, 0.1], [0.7121, 0.2], [0.0, 0.0]])))


def test_a_tie_is_called_one() -> None:
    tie = explain([[0.7, 0.1], [0.7, 0.2], [0.0, 0.0]])
    text = str(short_rule(tie))
    assert text.startswith(
        "as close to training image 0 of class a (0.700) as to training image 10"
    )
    assert text.endswith("a tie, which goes to the class that comes first")


def test_the_full_rule_has_a_clause_for_each_anchor() -> None:
    clause = "(closer to training image {} than to each of the 4 anchors of other classes)"
    rule = f"IF {clause.format(1)} OR {clause.format(0)} THEN a"
    assert str(full_rule(explain(COSINES), 8)) == rule


@pytest.mark.parametrize(
    ("cosines", "told"),
    [
        (
            [[0.71, 0.2]],
            "Without training image 0 it would be class b; the next of class a comes to 0.200.",
        ),
        ([[0.71]], "Without training image 0 it would be class b."),
        ([[0.71, 0.7]], "Only without both anchors of class a would it be class b."),
        ([[0.71, 0.7, 0.7]], "Only without all 3 anchors of class a would it be class b."),
        (
            [[0.71, 0.65, 0.1]],
            "Only without both training image 0 and training image 1 would it be class b.",
        ),
        (
            [[0.7, 0.71, 0.65, 0.1]],
            "Only without all of training image 1, training image 0 and training image 2 would it "
            "be class b.",
        ),
    ],
)  # fmt: skip
def test_the_counterfactual_names_all_that_would_have_to_go(
    cosines: list[list[float]], told: str
) -> None:
    assert str(counterfactual(explain([*cosines, [0.64]]))) == told


def test_the_json_form_has_everything_but_pictures() -> None:
    e = explain(COSINES, "a")
    data = json.loads(json.dumps(explanation_dict(e, 8)))
    assert data["class"] == "a"
    assert data["class_index"] == 0
    assert data["score"] == 0.71
    assert data["probability"] == 0.87
    assert data["source"] == "new/image.png"
    assert data["true_class"] == "a"
    assert data["margin"] == pytest.approx(0.07)
    winner = {
        "class_index": 0,
        "class_name": "a",
        "centroid": 1,
        "index": 1,
        "path": "train/1.png",
        "cosine": 0.71,
    }
    assert data["winner"] == winner
    assert [(r["class_name"], r["cosine"]) for r in data["rivals"]] == [("b", 0.64), ("c", 0.1)]
    assert [(a["centroid"], a["cosine"]) for a in data["anchors"]] == [(1, 0.71), (0, 0.2)]
    assert data["rule"]["comparisons"] == 8
    assert data["rule"]["short"] == str(short_rule(e))
    assert data["rule"]["full"] == str(full_rule(e, 8))
    assert data["counterfactual"] == {
        "without": [winner],
        "class": "b",
        "text": str(counterfactual(e)),
    }


def test_an_explanation_has_a_rival() -> None:
    with pytest.raises(ValueError, match="rivals, own, flips_without: got none"):
        Explanation(png(), "x", anchor(0, 0, 0.5), 1.0, (), (anchor(0, 0, 0.5),), 0.0, (), "b")


def test_a_picture_is_a_png() -> None:
    with pytest.raises(ValueError, match="4 bytes that are no PNG"):
        render(explain(COSINES, image=b"JFIF"))


def test_numbers() -> None:
    assert [number(v, 3) for v in (0.5, -0.0001, 1)] == ["0.500", "0.000", "1.000"]
    assert number(-0.5, 2) == "\N{MINUS SIGN}0.50"
    shares = (0, 0.0004, 0.5, 0.9989, 0.9996, 1)
    assert [percent(share) for share in shares] == [
        "0.0%", "under 0.1%", "50.0%", "99.9%", "over 99.9%", "100.0%"
    ]  # fmt: skip


# WCAG 2.2: 1.4.3 asks 4.5 of text, 1.4.11 asks 3 of bars, outlines and the line on them.
TEXT = [*((text, "paper") for text in ("ink", "soft", "accent", "wrong"))]
TEXT += [("ink", "tint"), ("accent", "tint")]
GRAPHICS = [
    ("bar", "wash"),
    ("accent", "wash"),
    ("ink", "paper"),
    ("accent", "paper"),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_sufficient(scheme: str) -> None:
    css = (Path(dnc.page.__file__).parent / "templates/page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in blocks)
    assert light.keys() == dark.keys()
    colors = {"light": light, "dark": dark}[scheme]
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", css)) <= {*light.values(), *dark.values()}
    for pairs, least in ((TEXT, 4.5), (GRAPHICS, 3)):
        ratios = {pair: contrast(*(colors[name] for name in pair)) for pair in pairs}
        assert {pair: ratio for pair, ratio in ratios.items() if ratio < least} == {}


def contrast(one: str, other: str) -> float:
    """Of two colours `#rrggbb`, by WCAG's formula: 1 for equal, 21 for black on white."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_formula_of_contrast() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
