"""Frozen dataclasses as configuration: a command line from them, JSON out and back.

A configuration is a frozen, keyword-only dataclass of plain values and of further such classes
(its groups). A recipe is an instance. Help texts are the strings under the fields (read by tyro).
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from inspect import formatannotation
from itertools import groupby
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tyro

from shared_utils.checkpoint import reading, write_text
from shared_utils.errors import InputError, near_miss

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain data (dict, list, str, number, bool, None), as JSON holds it."""
    text = json.dumps(dataclasses.asdict(config), default=os.fspath)
    return cast(dict[str, Any], json.loads(text))


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "config") -> C:
    """Build `cls` from plain data. Raises: InputError naming an unknown, missing or wrong key."""
    hints = get_type_hints(cls)
    for key in sorted(data.keys() - hints.keys()):
        raise InputError(f"{where}.{key}", "an unknown key", "a known one", near_miss(key, hints))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = {field.default, field.default_factory} != {dataclasses.MISSING}
        if field.name not in data and not has_default:
            raise InputError(f"{where}.{field.name}", "nothing", "a value", "add the key")
    return cls(**{key: _convert(hints[key], data[key], f"{where}.{key}") for key in data})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(cast(type[Any], hint), value, where)
    if origin in (Union, UnionType):
        for kind in args:
            with contextlib.suppress(InputError):
                return _convert(kind, value, where)
    if origin is tuple and isinstance(value, list | tuple):
        value = tuple(value)
        kinds = args[:1] * len(value) if Ellipsis in args else args
        if len(kinds) == len(value):
            return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    if (hint, type(value)) in ((Path, str), (float, int)):
        return hint(value)
    if type(value) is hint or (origin is Literal and value in args):
        return value
    kind = f"one of {', '.join(map(str, args))}" if origin is Literal else formatannotation(hint)
    raise InputError(where, repr(value), kind, "correct it")


def save_json(config: Any, path: Path) -> None:
    """Write a configuration as JSON, whole or not at all."""
    write_text(json.dumps(to_dict(config), indent=2) + "\n", path)


def load_json(cls: type[C], path: Path) -> C:
    """Read it back. Raises: MissingFileError; InputError where it is no JSON or does not fit."""
    with reading(path, "a saved configuration"):
        data = json.loads(path.read_bytes())
    return cast(C, _convert(cls, data, str(path)))


def parse(
    cls: type[C], argv: Sequence[str], *, prog: str, default: C | None = None, about: str = ""
) -> C:
    """Parse command-line flags into `cls`, starting from `default`.

    Raises: InputError for an unknown flag (with the nearest known one), a value that does not
        fit, or what the class itself finds wrong. SystemExit(0) after `--help`.
    """
    start = tyro.MISSING_NONPROP if default is None else default
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(cls, prog=prog, description=about, args=argv, default=start)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        if not stop.code:
            raise
        # The class's own error, which tyro wraps, or what tyro says of a word on the command line.
        raise cause or _reworded(told.getvalue(), f"see {prog} --help") from None


def _reworded(box: str, do: str) -> InputError:
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", box).split())
    if unknown := re.search(r"Unrecognized options: ([^ ,=]+)(?:.*? meant: (\S+))?", text):
        do = f"did you mean '{unknown[2]}'?" if unknown[2] else do
        return InputError(unknown[1], "an unknown option", "a known one", do)
    if flag := re.search(r"--[\w.-]*\w", text):
        got = re.search(r"\[.*?\]|'[^-].*?'", text) or ["nothing"]
        expected = re.search(r"(?<=helptext: )\S+ \S+|one of \(.*?\)", text) or ["a value"]
        return InputError(flag[0], got[0], re.sub(f"{flag[0]} |[()']", "", expected[0]), do)
    return InputError("command line", text, "valid options", do)


def parse_recipe(
    recipes: dict[str, C], argv: Sequence[str], *, prog: str, about: str = "", resumes: bool = True
) -> tuple[str, C]:
    """Parse `RECIPE --flags`, or if it `resumes` `--resume RUN --flags`, from the run's own config.

    Returns: the recipe's name, of a resumed run the one in its config, and the configuration.
    """
    first, cls = next((name, type(recipe)) for name, recipe in recipes.items())
    name, *options = argv or ("",)
    if name in ("-h", "--help"):
        go_on = f"To go on: {prog} --resume RUN [OPTIONS]. " * resumes
        about += f"\n{go_on}Defaults: {first}'s.\n\nrecipes:"
        wrap = textwrap.TextWrapper(98, "\n  ", " " * 4, break_on_hyphens=False)
        for told, names in groupby(recipes, lambda name: getattr(recipes[name], "about", "")):
            about += wrap.fill(f"{' '.join(names):<18} {told}")
        parse(cls, argv, prog=f"{prog} RECIPE", default=recipes[first], about=about)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", nargs="?")
    if resumes and (run := finder.parse_known_args(argv)[0].resume):
        start = load_json(cls, Path(run) / "config.json")
        stored = str(getattr(start, "recipe", ""))
        if name.startswith("-"):
            name, options = stored, list(argv)
        if name != stored:
            do = "leave the recipe out with --resume"
            raise InputError("recipe", f"'{name}'", f"'{stored}', the recipe of {run}", do)
    elif name in recipes:
        start = recipes[name]
    else:
        do = f"{near_miss(name, recipes)}; e.g. {prog} {first}"
        raise InputError("recipe", f"'{name}'", "a known recipe first", do)
    return name, parse(cls, options, prog=f"{prog} {name}", default=start, about=about)
