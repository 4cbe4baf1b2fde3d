"""What a person sees of long work."""

import io

import pytest
from rich.console import Console

from yolop_mtl import progress
from yolop_mtl.progress import Meter, say, show_progress


def test_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 1000.0)
    assert list(show_progress(range(5), 5, "drawn")) == list(range(5))
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("drawn 1/5, ")
    assert last == "drawn 5/5, 0 s left"
    meter = Meter("predict", 6)
    for _ in range(3):
        meter.tick(2)
    meter.say("skipped [a]")
    meter.close()
    first, last, note = capsys.readouterr().out.splitlines()
    assert first.startswith("predict 2/6, ")
    assert first.endswith(" s left")
    assert last.startswith("predict 6/6, ")
    assert " images/s, 0 s left" in last
    assert note == "skipped [a]"


def test_without_a_known_end(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter("predict", None)
    meter.tick(1)
    meter.close()
    assert capsys.readouterr().out.startswith("predict 1, ")
    assert meter.done == 1
    assert meter.rate > 0


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, force_interactive=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda: terminal)
    meter = Meter("predict", 4)
    meter.tick(4)
    meter.close()
    say("done [b]")
    assert "images/s" in screen.getvalue()
    assert "━" in screen.getvalue()
    assert screen.getvalue().endswith("done [b]\n")
