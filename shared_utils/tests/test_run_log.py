import io
import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared_utils import run_log
from shared_utils.errors import InputError, MissingFileError
from shared_utils.run_log import RunLog, open_run, plot_curves, read_metrics, write_result


def refuse(constant):
    raise AssertionError(f"no JSON: {constant}")


def strict(text):
    return json.loads(text, parse_constant=refuse)


def lines(folder):
    return [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def fill(folder, text="{}"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    return folder


# --- the run folder


def test_the_same_command_twice_gives_two_folders(tmp_path):
    folders = [open_run("e2vpt", "digits", runs_dir=tmp_path) for _ in range(3)]
    assert len(set(folders)) == 3
    for folder in folders:
        assert folder.is_dir()
        assert folder.parent == tmp_path / "e2vpt"
        assert folder.name.startswith("digits-")


def test_a_name_is_the_folders(tmp_path):
    folder = open_run("e2vpt", "digits", runs_dir=tmp_path, name="my run")
    assert folder == tmp_path / "e2vpt" / "my run"
    assert open_run("e2vpt", "digits", runs_dir=tmp_path, name="my run") == folder  # still empty


def test_an_existing_name_is_refused(tmp_path):
    folder = fill(tmp_path / "e2vpt" / "a")
    with pytest.raises(InputError, match=r"^--name: got a, which exists .*--resume .*--overwrite"):
        open_run("e2vpt", "digits", runs_dir=tmp_path, name="a")
    assert (folder / "config.json").is_file()


def test_overwrite_empties_the_run_folder_and_nothing_beside_it(tmp_path):
    folder, other = fill(tmp_path / "e2vpt" / "a"), fill(tmp_path / "e2vpt" / "b")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").write_text("x")
    (folder / "link").symlink_to(other)
    assert open_run("e2vpt", "r", runs_dir=tmp_path, name="a", overwrite=True) == folder
    assert list(folder.iterdir()) == []
    assert (other / "config.json").is_file()


def test_overwrite_never_empties_what_is_no_run_folder(tmp_path):
    folder = tmp_path / "e2vpt" / "photos"
    folder.mkdir(parents=True)
    (folder / "a.png").write_text("mine")
    with pytest.raises(
        InputError, match=r"^--overwrite: got .*photos, which holds no config\.json"
    ):
        open_run("e2vpt", "r", runs_dir=tmp_path, name="photos", overwrite=True)
    assert (folder / "a.png").read_text() == "mine"


def test_overwrite_does_not_follow_a_link(tmp_path):
    theirs = fill(tmp_path / "theirs")
    (tmp_path / "e2vpt").mkdir()
    (tmp_path / "e2vpt" / "a").symlink_to(theirs)
    with pytest.raises(InputError, match="symbolic link"):
        open_run("e2vpt", "r", runs_dir=tmp_path, name="a", overwrite=True)
    assert (theirs / "config.json").is_file()


@pytest.mark.parametrize("name", ["..", "../theirs", "a/b", "/tmp", "./a", "a/"])
def test_a_name_cannot_leave_the_runs_folder(name, tmp_path):
    theirs = fill(tmp_path / "theirs")
    with pytest.raises(InputError, match=r"^--name: got .*, expected a plain name; use --runs-dir"):
        open_run("e2vpt", "r", runs_dir=tmp_path, name=name, overwrite=True)
    assert (theirs / "config.json").is_file()
    assert not (tmp_path / "e2vpt").exists()


def test_resume_gives_the_run_and_outranks_a_stored_overwrite(tmp_path):
    folder = fill(tmp_path / "elsewhere" / "a")
    (folder / "last.ckpt").write_text("x")
    for overwrite in (False, True):
        given = open_run(
            "e2vpt", "r", runs_dir=tmp_path, name="a", resume=str(folder), overwrite=overwrite
        )
        assert given == folder
    assert (folder / "last.ckpt").read_text() == "x"


def test_resume_of_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match=r"absent: got no such file, expected a run folder"):
        open_run("e2vpt", "r", runs_dir=tmp_path, resume=str(tmp_path / "absent"))
    with pytest.raises(MissingFileError, match="expected a run folder with config"):
        open_run("e2vpt", "r", runs_dir=tmp_path, resume=str(tmp_path))
    assert not (tmp_path / "e2vpt").exists()


def test_a_place_that_takes_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"^--runs-dir: got .*file.*, expected a folder to write"):
        open_run("e2vpt", "r", runs_dir=tmp_path / "file")


# --- metrics


def test_a_line_holds_step_epoch_seconds_and_the_values(tmp_path):
    log = RunLog(tmp_path)
    log.log(1, 0, {"loss_ce": torch.tensor(2.5), "lr": 1})
    log.log(2, 0, {"loss_ce": 2.0})
    log.close()
    first, second = lines(tmp_path)
    assert first.keys() == {"step", "epoch", "seconds", "loss_ce", "lr"}
    assert (first["step"], first["epoch"], first["loss_ce"], first["lr"]) == (1, 0, 2.5, 1.0)
    assert 0 <= first["seconds"] <= second["seconds"]
    assert scalars(tmp_path, "loss_ce") == [(1, 2.5), (2, 2.0)]
    assert read_metrics(tmp_path) == [first, second]


def test_a_line_is_on_the_disk_at_once(tmp_path):
    log = RunLog(tmp_path)
    log.log(1, 0, {"loss": 1.0})
    assert len(lines(tmp_path)) == 1
    log.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_what_json_lacks_becomes_null(value, tmp_path, caplog):
    log = RunLog(tmp_path)
    log.log(1, 0, {"bad": value, "good": 1.0})
    log.close()
    assert lines(tmp_path)[0]["bad"] is None
    assert lines(tmp_path)[0]["good"] == 1.0
    assert caplog.text == ""


def write_steps(folder, steps, **kwargs):
    log = RunLog(folder, **kwargs)
    for step in steps:
        log.log(step, 0, {"loss": step + (0.5 if kwargs else 0)})
    log.close()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, range(1, 7))
    write_steps(tmp_path, range(5, 9), resume_step=4)
    rows = lines(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [
        *((step, step) for step in (1, 2, 3, 4)),
        *((step, step + 0.5) for step in (5, 6, 7, 8)),
    ]
    assert scalars(tmp_path, "loss") == [(row["step"], row["loss"]) for row in rows]


def test_the_seconds_of_a_resumed_run_go_on(tmp_path, clock):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        clock.seconds += 10
        log.log(step, 0, {})
    log.close()
    clock.seconds = 5000
    log = RunLog(tmp_path, resume_step=2)
    clock.seconds += 1
    log.log(3, 0, {})
    log.close()
    assert [row["seconds"] for row in lines(tmp_path)] == [10, 20, 21]


def test_a_run_resumed_from_its_very_start_drops_all(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1], resume_step=0)
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(1, 1.5)]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3, "loss": 3', "\0\0", "{", "\xff"])
@pytest.mark.parametrize("resume_step", [-1, 2])
def test_a_line_cut_off_by_a_kill_does_no_harm(rest, resume_step, tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(rest)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, [3], resume_step=resume_step)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]


def test_a_line_that_lacks_only_its_end_is_kept_apart_from_the_next(tmp_path):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(tmp_path, [3])
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]


def test_a_folder_without_metrics_has_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_process_that_is_not_the_writer_does_nothing(tmp_path, capfd):
    log = RunLog(tmp_path, is_writer=False, resume_step=3)
    log.log(1, 0, {"loss": 1.0})
    log.say("hello")
    with log.progress("train", 2) as bar:
        bar.tick("note")
        bar.tick()
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# --- the terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now.seconds)
    return now


def test_lines_are_printed_as_they_are(tmp_path, capsys):
    log = RunLog(tmp_path)
    text = "a [bold]word[/bold] [/x] " + "long " * 60
    log.say(text)
    log.close()
    assert capsys.readouterr().out == text + "\n"


def test_plain_output_gets_a_first_line_one_every_ten_seconds_and_a_last(tmp_path, capsys, clock):
    log = RunLog(tmp_path)
    told = []
    with log.progress("train", 100) as bar:
        for _ in range(100):
            clock.seconds += 0.5
            bar.tick("loss [0.3]")
            if said := capsys.readouterr().out:
                told.append((clock.seconds, said))
    log.close()
    assert [seconds for seconds, _ in told] == [0.5, 10.5, 20.5, 30.5, 40.5, 50.0]
    assert told[0][1].startswith("train 1/100  loss [0.3]  left")
    assert told[1][1] == "train 21/100  loss [0.3]  left 0:00:40\n"
    assert told[-1][1] == "train 100/100  loss [0.3]  left 0:00:00\n"


def test_the_time_left_ignores_a_slow_start(tmp_path, capsys, clock):
    log = RunLog(tmp_path)
    with log.progress("train", 1000) as bar:
        for step in range(700):
            clock.seconds += 60 if step < 3 else 1
            bar.tick()
    log.close()
    last = capsys.readouterr().out.splitlines()[-1]
    done = int(last.split()[1].split("/")[0])
    assert last.endswith(f"left 0:{(1000 - done) // 60:02}:{(1000 - done) % 60:02}")


def test_a_resumed_count_starts_where_it_was(tmp_path, capsys, clock):
    log = RunLog(tmp_path)
    with log.progress("train", 100, start=90) as bar:
        for _ in range(2):
            clock.seconds += 10
            bar.tick()
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "train 91/100  left ?",
        "train 92/100  left 0:01:20",
    ]


def on_a_terminal(log):
    screen = io.StringIO()
    log.console = Console(file=screen, force_terminal=True, force_interactive=True, width=120)
    return screen


def test_a_terminal_gets_a_bar_with_note_and_time_left(tmp_path, clock):
    log = RunLog(tmp_path)
    screen = on_a_terminal(log)
    with log.progress("train [1]", 4) as bar:
        for _ in range(3):
            clock.seconds += 2
            bar.tick("loss [red]")
        log.say("epoch done")
    log.close()
    said = screen.getvalue()
    assert "train [1] 3/4  loss [red]" in said
    assert "75%" in said
    assert "0:00:02" in said
    assert "epoch done\n" in said


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_terminal_is_sane_after_an_interrupt(error, tmp_path, capsys):
    log = RunLog(tmp_path)
    screen = on_a_terminal(log)
    stdout = sys.stdout
    with pytest.raises(error), log.progress("train", 10) as bar:  # noqa: PT012
        bar.tick()
        assert sys.stdout is not stdout  # rich redirects prints while the bar is live
        raise error
    log.close()
    hide, show = "\x1b[?25l", "\x1b[?25h"  # the cursor
    said = screen.getvalue()
    assert said.rindex(show) > said.rindex(hide)
    assert said.endswith("\n" + show) or said.rstrip(show).endswith("\n")
    assert sys.stdout is stdout
    with log.progress("again", 1) as bar:  # nothing of the first bar is left
        bar.tick()


# --- curves and the result


def test_curves_are_a_picture_with_a_panel_per_group(tmp_path):
    log = RunLog(tmp_path)
    for step in range(5):
        log.log(step, 0, {"loss": math.nan if step == 2 else 1 / (step + 1), "lr": 0.1})
    log.log(5, 0, {"val_top1": 0.5})
    log.close()
    path = plot_curves(tmp_path, {"loss": ["loss", "absent"], "accuracy": ["val_top1"]})
    assert path == tmp_path / "curves.png"
    with Image.open(path) as two:
        assert two.format == "PNG"
        two_size = two.size
    plot_curves(tmp_path, {"loss": ["loss"]})
    with Image.open(path) as one:
        assert one.size == (two_size[0] // 2, two_size[1])


def test_curves_of_an_empty_run_are_empty_panels(tmp_path):
    RunLog(tmp_path).close()
    assert plot_curves(tmp_path, {"loss": ["loss"]}).is_file()


def test_the_drawn_points_are_the_logged_ones(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def spy(axes, xs, ys, **kwargs):
        drawn[kwargs["label"]] = list(zip(xs, ys, strict=True))
        return plot(axes, xs, ys, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    log = RunLog(tmp_path)
    for step, loss in ((1, 3.0), (2, math.inf), (3, 1.0)):
        log.log(step, 0, {"loss": loss})
    log.close()
    plot_curves(tmp_path, {"loss": ["loss", "absent"]})
    assert drawn == {"loss": [(1, 3.0), (3, 1.0)]}


def test_the_result_is_strict_json_with_command_and_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["e2vpt", "train", "digits"])
    given = {"project": "e2vpt", "metrics": {"top1": 0.5, "bad": math.nan, "list": [math.inf, 1]}}
    write_result(tmp_path, given)
    result = strict((tmp_path / "result.json").read_text())
    assert result["command"] == ["e2vpt", "train", "digits"]
    assert result["metrics"] == {"top1": 0.5, "bad": None, "list": [None, 1]}
    assert result["project"] == "e2vpt"
    assert result["seconds"] > 0
    assert math.isnan(given["metrics"]["bad"])


def test_seconds_count_from_the_start_of_the_process(monkeypatch):
    fake = SimpleNamespace(create_time=lambda: 1000.0)
    monkeypatch.setattr(run_log.psutil, "Process", lambda: fake)
    monkeypatch.setattr(time, "time", lambda: 1042.5)
    assert run_log.seconds_since_start() == 42.5
