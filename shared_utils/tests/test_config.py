import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from shared_utils.config import (
    from_dict,
    load_json,
    parse,
    parse_recipe,
    save_json,
    to_dict,
)
from shared_utils.errors import InputError, MissingFileError


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How to train."""

    lr: float = 0.1
    """peak learning rate"""
    epochs: int = 10
    """passes over the data"""
    kind: Literal["sgd", "adamw"] = "sgd"
    """which optimiser"""

    def __post_init__(self):
        if self.lr <= 0:
            raise InputError("optim.lr", self.lr, "more than 0", "correct it")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where it goes."""

    name: str = ""
    """folder name"""
    runs_dir: Path = Path("runs")
    """folder of the runs"""
    resume: str = ""
    """run to go on with"""
    overwrite: bool = False
    """start over"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything."""

    recipe: tyro.conf.Suppress[str] = ""
    about: tyro.conf.Suppress[str] = ""
    size: tuple[int, ...] = (32, 32)
    """height and width in pixels"""
    limit: int | None = None
    """images to use"""
    optim: Optim = field(default_factory=Optim)
    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)

    def __post_init__(self):
        if self.limit is not None and self.limit > 100 * self.optim.epochs:
            raise InputError("limit", self.limit, "at most 100 per epoch", "lower it")


RECIPES = {
    "digits": Config(recipe="digits", about="a small one"),
    "pets": Config(recipe="pets", about="a larger one", optim=Optim(lr=0.5)),
}
CHANGED = Config(
    recipe="pets",
    size=(3, 4, 5),
    limit=7,
    optim=Optim(lr=2.0, kind="adamw"),
    run=Run(runs_dir=Path("a b"), overwrite=True),
)


# --- plain data and JSON


@pytest.mark.parametrize("config", [Config(), CHANGED])
def test_json_gives_back_an_equal_config(config, tmp_path):
    path = tmp_path / "config.json"
    save_json(config, path)
    assert load_json(Config, path) == config
    assert from_dict(Config, to_dict(config)) == config


def test_to_dict_holds_plain_data_only():
    data = to_dict(CHANGED)
    assert data["run"]["runs_dir"] == "a b"
    assert data["size"] == [3, 4, 5]
    assert json.loads(json.dumps(data)) == data


def test_absent_keys_take_their_defaults_and_whole_numbers_are_floats_too():
    config = from_dict(Config, {"optim": {"lr": 1}})
    assert config == Config(optim=Optim(lr=1.0))
    assert type(config.optim.lr) is float


@dataclass(frozen=True, kw_only=True)
class Needy:
    need: int
    pair: tuple[int, str] = (1, "a")
    nested: tuple[tuple[float, float], ...] = ()


def test_tuples_are_converted_item_by_item():
    config = from_dict(Needy, {"need": 1, "pair": [2, "b"], "nested": [[1, 2], [3, 4.5]]})
    assert config == Needy(need=1, pair=(2, "b"), nested=((1.0, 2.0), (3.0, 4.5)))


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (Config, {"sizes": [1]}, r"^config\.sizes: got an unknown key, .*did you mean 'size'\?$"),
        (Config, {"optim": {"l": 1.0}}, r"^config\.optim\.l: got an unknown key, .*'lr'\?$"),
        (Config, {"optim": {"lr": "1"}}, r"^config\.optim\.lr: got '1', expected float; "),
        (Config, {"optim": {"lr": True}}, r"^config\.optim\.lr: got True, expected float; "),
        (Config, {"optim": {"epochs": 1.5}}, r"^config\.optim\.epochs: got 1.5, expected int; "),
        (Config, {"optim": {"epochs": True}}, r"^config\.optim\.epochs: got True, expected int; "),
        (Config, {"optim": {"kind": "adam"}}, r"got 'adam', expected one of sgd, adamw; "),
        (Config, {"optim": [1]}, r"^config\.optim: got \[1\], expected .*Optim; "),
        (Config, {"optim": {"lr": -1.0}}, r"^optim\.lr: got -1.0, expected more than 0; "),
        (Config, {"run": {"overwrite": 1}}, r"^config\.run\.overwrite: got 1, expected bool; "),
        (Config, {"limit": "x"}, r"^config\.limit: got 'x', expected .*int.*None.*; "),
        (Config, {"size": [1, "2"]}, r"^config\.size: got '2', expected int; "),
        (Config, {"size": 1}, r"^config\.size: got 1, expected tuple\[int, \.\.\.\]; "),
        (Needy, {}, r"^config\.need: got nothing, expected a value; add the key$"),
        (
            Needy,
            {"need": 1, "pair": [1]},
            r"^config\.pair: got \(1,\), expected tuple\[int, str\]; ",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused_by_name(cls, data, message):
    with pytest.raises(InputError, match=message):
        from_dict(cls, data)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(MissingFileError, match=r"config\.json: got no such file, expected a saved"):
        load_json(Config, path)
    path.write_text('{"optim": ')
    with pytest.raises(InputError, match=r"config\.json: got a damaged or unreadable file"):
        load_json(Config, path)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: got \[\], expected "):
        load_json(Config, path)
    path.write_text('{"lr": 1}')
    with pytest.raises(InputError, match=r"config\.json\.lr: got an unknown key"):
        load_json(Config, path)


# --- the command line


def test_flags_change_the_default_and_nothing_else():
    argv = ["--optim.lr", "3", "--size", "8", "9", "--limit", "4", "--optim.kind=adamw"]
    config = parse(Config, [*argv, "--overwrite", "--runs-dir", "x y"], prog="p", default=CHANGED)
    assert config == dataclasses.replace(
        CHANGED,
        size=(8, 9),
        limit=4,
        optim=Optim(lr=3.0, kind="adamw"),
        run=Run(runs_dir=Path("x y"), overwrite=True),
    )
    assert parse(Config, [], prog="p", default=CHANGED) == CHANGED
    assert parse(Config, ["--runs_dir", "x"], prog="p").run.runs_dir == Path("x")
    assert parse(Config, ["--no-overwrite"], prog="p", default=CHANGED).run.overwrite is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optim.lr -3", "optim.lr: got -3.0, expected more than 0; correct it"),
        ("--optim.lr=-3", "optim.lr: got -3.0, expected more than 0; correct it"),
        ("--limit 5000", "limit: got 5000, expected at most 100 per epoch; lower it"),
        ("--optim.lr abc", "--optim.lr: got 'abc', expected FLOAT; see p --help"),
        ("--optim.lr 1 --optim.lr abc", "--optim.lr: got 'abc', expected FLOAT; see p --help"),
        ("--optim.epochs 1.5", "--optim.epochs: got '1.5', expected INT; see p --help"),
        ("--optim.lr", "--optim.lr: got nothing, expected a value; see p --help"),
        (
            "--optim.kind x",
            "--optim.kind: got 'x', expected one of sgd, adamw; see p --help",
        ),
        ("foo", "foo: got an unknown option, expected a known one; see p --help"),
        ("--overwrite yes", "yes: got an unknown option, expected a known one; see p --help"),
        (
            "--optim.lrr 3",
            "--optim.lrr: got an unknown option, expected a known one; did you mean '--optim.lr'?",
        ),
        (
            "--optim.epoch=3",
            "--optim.epoch: got an unknown option, expected a known one; "
            "did you mean '--optim.epochs'?",
        ),
        ("--recipe x", "--recipe: got an unknown option, expected a known one; see p --help"),
        ("-q", "-q: got an unknown option, expected a known one; see p --help"),
    ],
)
def test_a_wrong_word_gives_exactly_one_clean_line(argv, message, capfd):
    with pytest.raises(InputError) as caught:
        parse(Config, argv.split(), prog="p")
    assert str(caught.value) == message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("width", ["20", "40", "200"])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "1", "x"], r"^--size: got \['1', 'x'\], expected \[INT.*; see p --help$"),
        (["--limit", "x"], r"^--limit: got \['x'\], expected {None}\|INT; see p --help$"),
        (["--optim.kind", "word " * 40], r"^--optim\.kind: got 'word.*expected one of sgd, "),
        (["--optim.lr", "-3"], r"^optim\.lr: got -3\.0, expected more than 0; correct it$"),
        (["--nothing-like-it"], r"^--nothing-like-it: got an unknown option, "),
    ],
)
def test_no_rest_of_a_box_whatever_the_width_of_the_terminal(argv, message, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(InputError, match=message) as caught:
        parse(Config, argv, prog="p")
    said = str(caught.value)
    assert not set(said) & set("│╭╮╰╯─\n")
    assert "helptext" not in said
    assert said.count(": got ") == said.count(", expected ") == 1


def test_a_required_value_that_is_not_given_is_named():
    with pytest.raises(InputError, match=r"^--need: got nothing, expected a value; see p --help$"):
        parse(Needy, [], prog="p")


def test_a_message_that_tyro_words_anew_is_still_one_line(monkeypatch):
    def cli(*args, **kwargs):
        import sys

        print("╭─ New ─╮\n│ odd   │\n│ words │\n╰───────╯", file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr(tyro, "cli", cli)
    with pytest.raises(InputError, match=r"^command line: got New odd words, expected valid opt"):
        parse(Config, [], prog="p")


def flags_with_defaults(text):
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_goes_to_stdout_and_exits_with_0(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, [flag], prog="my prog", default=CHANGED, about="Does a thing.")
    said = capsys.readouterr()
    assert not stop.value.code
    assert said.err == ""
    assert "my prog" in said.out
    assert "Does a thing." in said.out
    text = flags_with_defaults(said.out)
    assert "--optim.lr FLOAT peak learning rate (default: 2.0)" in text
    assert "--size [INT [INT ...]] height and width in pixels (default: 3 4 5)" in text
    assert "--recipe" not in text


def test_help_after_a_wrong_value_is_still_help():
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help", "--optim.lr", "1"], prog="p")
    assert not stop.value.code


# --- recipes


def test_a_recipe_comes_first():
    name, config = parse_recipe(RECIPES, ["pets", "--optim.epochs", "3"], prog="p")
    assert name == "pets"
    assert config == dataclasses.replace(RECIPES["pets"], optim=Optim(lr=0.5, epochs=3))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["digit"],
            r"^recipe: got 'digit', expected a known recipe first; did you mean 'digits'\?",
        ),
        (["zzz"], r"^recipe: got 'zzz', .*; there are digits, pets"),
        ([], r"^recipe: got '', .*; there are digits, pets; e\.g\. p digits$"),
        (["--optim.lr", "1"], r"^recipe: got '--optim\.lr', .*; there are digits, pets"),
        (["pets", "--optim.lr", "x"], r"^--optim\.lr: got 'x', .*; see p pets --help$"),
        (["pets", "digits"], r"^digits: got an unknown option"),
        (["--resume"], r"^recipe: got '--resume', "),
        (["pets", "--resume"], r"^--resume: got nothing, "),
    ],
)
def test_a_wrong_recipe_gives_one_line(argv, message):
    with pytest.raises(InputError, match=message):
        parse_recipe(RECIPES, argv, prog="p")


def test_help_lists_the_recipes_and_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_recipe(RECIPES, ["--help"], prog="p", about="Tunes.")
    said = capsys.readouterr()
    assert not stop.value.code
    assert said.err == ""
    assert "Tunes." in said.out
    assert "p --resume RUN" in said.out
    lines = [line.split(maxsplit=1) for line in said.out.splitlines()]
    assert ["digits", "a small one"] in lines
    assert ["pets", "a larger one"] in lines
    text = flags_with_defaults(said.out)
    for option in (
        "--size [INT [INT ...]] height and width in pixels (default: 32 32)",
        "--limit {None}|INT images to use (default: None)",
        "--optim.lr FLOAT peak learning rate (default: 0.1)",
        "--optim.epochs INT passes over the data (default: 10)",
        "--optim.kind {sgd,adamw} which optimiser (default: sgd)",
        "--runs-dir PATH folder of the runs (default: runs)",
        "--overwrite, --no-overwrite start over (default: False)",
    ):
        assert option in text


def test_help_lists_recipes_of_one_description_together(capsys):
    many = {f"task-{i:02}": replace(RECIPES["pets"], recipe=f"task-{i:02}") for i in range(30)}
    with pytest.raises(SystemExit):
        parse_recipe({**RECIPES, **many}, ["--help"], prog="p")
    said = capsys.readouterr().out
    listed = said[said.index("recipes:") : said.index("a larger one")]
    assert [word for word in listed.split() if word in many] == list(many)
    assert said.count("a larger one") == 1
    assert max(map(len, listed.splitlines())) < 100


def test_what_does_not_resume_offers_no_resume(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_recipe(RECIPES, ["--help"], prog="p", resumes=False)
    said = capsys.readouterr().out
    assert "To go on" not in said
    assert "Defaults: digits's.\n" in said
    # The option is like any other then: of a config that has it, a mere value.
    _, config = parse_recipe(RECIPES, ["pets", "--resume", "x"], prog="p", resumes=False)
    assert config == replace(RECIPES["pets"], run=replace(RECIPES["pets"].run, resume="x"))
    with pytest.raises(InputError, match=r"^recipe: got '--resume', expected a known recipe first"):
        parse_recipe(RECIPES, ["--resume", "x"], prog="p", resumes=False)


def test_help_of_one_recipe_shows_its_own_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(RECIPES, ["pets", "--help"], prog="p")
    assert "(default: 0.5)" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["--resume {}", "--resume={}", "pets --resume {}"])
def test_a_resumed_run_starts_from_its_own_config(form, tmp_path):
    save_json(CHANGED, tmp_path / "config.json")
    argv = form.format(tmp_path).split()
    name, config = parse_recipe(RECIPES, [*argv, "--optim.epochs", "99"], prog="p")
    assert name == "pets"
    assert config.optim == dataclasses.replace(CHANGED.optim, epochs=99)
    assert config.size == CHANGED.size
    assert config.run.resume == str(tmp_path)


def test_the_wrong_recipe_for_a_resumed_run_is_refused(tmp_path):
    save_json(CHANGED, tmp_path / "config.json")
    with pytest.raises(InputError, match=r"^recipe: got 'digits', expected 'pets', the recipe of"):
        parse_recipe(RECIPES, ["digits", "--resume", str(tmp_path)], prog="p")
    with pytest.raises(MissingFileError, match=r"nowhere.config\.json: got no such file"):
        parse_recipe(RECIPES, ["--resume", "nowhere"], prog="p")
