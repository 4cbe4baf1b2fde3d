"""The page of explanations in a real headless Chromium, spoken to over its debugging pipe.

Debian's `chromium` will do; CHROMIUM names another. Without any the tests are skipped.
"""

import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dnc.page import render_explanations

from .page_data import ABOUT, TITLE, all_classes, explain, png

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120  # seconds; a start takes one, or many on a busy machine
LONG = "x" * 300
EVIL = (
    "<script>document.title='owned'</script>\"'><img src=http://evil.test/a.png onerror=alert(1)>"
)


class Browser:
    """A headless Chromium: its DevTools protocol, one JSON object between two NULs."""

    def __init__(self, program: str, folder: Path) -> None:
        """Start it with `folder` as its home; nothing is asked of the network."""
        ours, theirs = os.pipe(), os.pipe()
        # Above 4, so that neither is overwritten while they become its 3 and 4.
        read = fcntl.fcntl(ours[0], fcntl.F_DUPFD_CLOEXEC, 10)
        write = fcntl.fcntl(theirs[1], fcntl.F_DUPFD_CLOEXEC, 10)
        self._log = folder / "chromium.log"
        options = (
            "--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --no-first-run "
            "--disable-dev-shm-usage --disable-extensions --disable-background-networking "
            "--disable-component-update --disable-sync --hide-scrollbars"
        )
        self._pid = os.posix_spawn(
            program,
            [program, *options.split(), f"--user-data-dir={folder / 'profile'}", "about:blank"],
            {**os.environ, "HOME": str(folder)},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, read, 3),
                (os.POSIX_SPAWN_DUP2, write, 4),
                (os.POSIX_SPAWN_OPEN, 1, str(self._log), os.O_WRONLY | os.O_CREAT, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setpgroup=0,
        )
        for file in (ours[0], theirs[1], read, write):
            os.close(file)
        self._to, self._from = ours[1], theirs[0]
        self._rest, self._count = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", session="", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", session="", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A method's result; events that come before it are kept."""
        self._count += 1
        request = {"id": self._count, "method": method, "params": params}
        session = self._session if session is None else session
        request |= {"sessionId": session} if session else {}
        os.write(self._to, json.dumps(request).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while (answer := self._message(until)).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def wait(self, method: str) -> None:
        """Until an event of this name is there."""
        until = time.monotonic() + PATIENCE
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._message(until))

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, file: Path, width: int, scheme: str = "light") -> None:
        """Load a page as a screen of this width (CSS pixels) and colour scheme shows it."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=800, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.scheme(scheme)
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        self.wait("Page.loadEventFired")

    def scheme(self, scheme: str) -> None:
        """`light` or `dark`, as a person's system has it."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def press_tab(self) -> None:
        """One press of the tab key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Tab", windowsVirtualKeyCode=9)

    def close(self) -> None:
        """End it and all that it started."""
        for file in (self._to, self._from):
            os.close(file)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = until - time.monotonic()
            ready = left > 0 and select.select([self._from], [], [], left)[0]
            more = os.read(self._from, 1 << 20) if ready else b""
            assert more, f"Chromium is silent; its log: {self._log.read_text()[-2000:]}"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


def find_chromium() -> str | None:
    """The path of a Chromium, or None."""
    named = os.environ.get("CHROMIUM")
    candidates = (named,) if named else PROGRAMS
    return next((found for name in candidates if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip(f"no Chromium: none of {', '.join(PROGRAMS)}, or CHROMIUM is wrong")
    started = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of ordinary names."""
    explanations = [
        explain([[0.2, 0.9], [0.5, 0.8], [0.1, -0.3]], "a"),
        explain([[0.4, 0.3], [0.5, 0.6], [0.1, 0.2]], "c", image=png(5, 28, 28)),
        explain([[0.4, 0.3], [0.5, 0.6], [0.1, 0.2]], image=png(6, 90, 40)),
        explain([[0.71, 0.3], [0.5, 0.71 + 2**-24], [-0.1, -0.2]]),
    ]
    html = render_explanations(explanations, all_classes(), TITLE, ABOUT)
    file = tmp_path_factory.mktemp("page") / "ordinary.html"
    file.write_text(html, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose names are markup, have no spaces, or run from right to left."""
    cosines = [[0.2, 0.9], [0.5, 0.8], [0.1, -0.3]]
    explanations = [
        explain(cosines, name, class_name=name, path=f"/{name}/{LONG}.png", source=name)
        for name in (LONG, EVIL, "صورة \u202e كبيرة", "鳥" * 80)
    ]
    classes = all_classes(class_name=LONG, path=f"/{EVIL}/{LONG}.png")
    html = render_explanations(explanations, classes, EVIL + LONG, LONG + EVIL)
    file = tmp_path_factory.mktemp("page") / "hostile.html"
    file.write_text(html, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def many_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with room for the pictures of one of three classes; the others have a long name."""
    cosines = [[0.2, 0.9], [0.5, 0.8], [0.1, -0.3]]
    first, *others = all_classes()
    classes = [first, *((LONG, anchors) for _, anchors in others)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dnc.page.MOST_LISTED", 2)
        html = render_explanations([explain(cosines)] * 2, classes, TITLE, ABOUT)
    assert html.count("<li id=") == 2
    file = tmp_path_factory.mktemp("page") / "many.html"
    file.write_text(html, encoding="utf-8")
    return file


@pytest.mark.parametrize("width", [320, 360, 1280])
@pytest.mark.parametrize("which", ["page", "hostile_page", "many_page"])
def test_nothing_is_wider_than_the_screen(
    browser: Browser, request: pytest.FixtureRequest, which: str, width: int
) -> None:
    browser.open(request.getfixturevalue(which), width)
    # Against the screen: where a page is too wide, a phone's innerWidth grows with it.
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
    assert browser.evaluate("innerWidth") == width
    wide = (
        "[...document.querySelectorAll('body *:not(.unseen)')].filter(e => "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))"
    )
    assert browser.evaluate(wide) == []


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_the_page_asks_for_nothing_and_complains_of_nothing(
    browser: Browser, request: pytest.FixtureRequest, which: str
) -> None:
    file = request.getfixturevalue(which)
    browser.open(file, 1280)
    asked = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert file.as_uri() in asked
    assert [url for url in asked if url != file.as_uri() and not url.startswith("data:")] == []
    loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [event for event in browser.events if event["method"] in loud] == []
    assert browser.evaluate("document.title") != "owned"
    assert browser.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_every_image_is_loaded_and_has_an_alternative(
    browser: Browser, request: pytest.FixtureRequest, which: str
) -> None:
    browser.open(request.getfixturevalue(which), 360)
    images = browser.evaluate(
        "[...document.images].map(i => [i.naturalWidth, i.clientWidth, i.hasAttribute('alt')])"
    )
    assert len(images) > 20
    assert all(natural > 0 and drawn >= 40 and has_alt for natural, drawn, has_alt in images)
    # Without words of its own only where the link around it has them.
    silent = "[...document.images].filter(i => !i.alt && !i.closest('a')?.innerText.trim()).length"
    assert browser.evaluate(silent) == 0


def test_small_images_keep_their_pixels(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    drawn = browser.evaluate(
        "[...document.querySelectorAll('.pair figure:first-child img')].map(i => "
        "[i.naturalWidth, getComputedStyle(i).imageRendering, i.clientWidth])"
    )
    assert [image[:2] for image in drawn] == [
        [8, "pixelated"],
        [28, "pixelated"],
        [90, "auto"],
        [8, "pixelated"],
    ]
    assert all(width >= 192 for _, _, width in drawn)


def test_dark_is_dark(browser: Browser, page: Path) -> None:
    """Text lighter than its ground in one scheme, darker in the other, on the body and the rule."""
    script = (
        "['body', '.rule'].map(s => getComputedStyle(document.querySelector(s)))"
        ".map(s => [s.backgroundColor, s.color])"
    )
    seen = {}
    for scheme in ("light", "dark"):
        browser.open(page, 360, scheme)
        seen[scheme] = [
            [sum(int(part) for part in re.findall(r"\d+", color)[:3]) for color in pair]
            for pair in browser.evaluate(script)
        ]
    assert all(ground > 600 and text < 150 for ground, text in seen["light"])
    assert all(ground < 200 and text > 600 for ground, text in seen["dark"])


def test_tab_reaches_every_link_and_shows_where_it_is(browser: Browser, page: Path) -> None:
    browser.open(page, 360)
    browser.evaluate("document.querySelectorAll('a[href], summary').forEach((e, i) => e.x = i)")
    count = browser.evaluate("document.querySelectorAll('a[href], summary').length")
    assert count > 20
    reached = []
    for _ in range(count):
        browser.press_tab()
        reached.append(
            browser.evaluate(
                "[document.activeElement.x, getComputedStyle(document.activeElement).outlineStyle]"
            )
        )
    assert reached == [[i, "solid"] for i in range(count)]


def test_links_lead_somewhere_and_back(browser: Browser, page: Path) -> None:
    browser.open(page, 360)
    dangling = "[...document.links].filter(a => !document.querySelector(a.hash)).length"
    assert browser.evaluate(dangling) == 0
    browser.evaluate("document.querySelector('#image-2 .because a').click()")
    assert browser.evaluate("location.hash") == "#anchor-1-1"
    assert browser.evaluate("document.querySelector(':target').tagName") == "FIGURE"
    browser.evaluate("[...document.querySelectorAll(':target a')][0].click()")
    assert browser.evaluate("location.hash") == "#image-2"


def test_a_class_without_pictures_is_found_by_its_link(browser: Browser, many_page: Path) -> None:
    browser.open(many_page, 360)
    browser.evaluate("document.querySelectorAll('.why tbody tr')[1].querySelector('a').click()")
    assert browser.evaluate("location.hash") == "#class-1"
    top = browser.evaluate("document.querySelector(':target').getBoundingClientRect().top")
    assert 0 <= top < 800  # in sight
    plain = "getComputedStyle(document.querySelector('#class-2 bdi')).color"
    assert browser.evaluate("getComputedStyle(document.querySelector(':target bdi')).color") != (
        browser.evaluate(plain)
    )


def test_the_full_rule_opens_without_a_script(browser: Browser, page: Path) -> None:
    browser.open(page, 360)
    height = "document.querySelector('details').getBoundingClientRect().height"
    closed = browser.evaluate(height)
    browser.evaluate("document.querySelector('summary').click()")
    assert browser.evaluate(height) > closed + 50
