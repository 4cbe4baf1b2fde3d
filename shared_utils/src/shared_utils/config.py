"""Frozen dataclasses as configuration: a command line from them, JSON out and back.

A configuration is a frozen, keyword-only dataclass of plain values and of further such classes
(its groups). A recipe is an instance. Help texts are the strings under the fields (read by tyro).
"""

import contextlib
import dataclasses
import io
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tyro

from shared_utils.errors import InputError, MissingFileError, near_miss

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain data (dict, list, str, number, bool, None) that JSON can hold."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    result: dict[str, Any] = plain(config)
    return result


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "config") -> C:
    """Build `cls` from plain data.

    Raises: InputError on an unknown or missing key or a value of another type; the message names
        the key with its path below `where`.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise InputError(f"{where}.{key}", "an unknown key", "a known one", near_miss(key, fields))
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}.{name}", "nothing", "a value", "add the key")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return from_dict(hint, value, where)
    elif origin is Literal:
        if value in args:
            return value
        raise InputError(where, repr(value), f"one of {', '.join(map(str, args))}", "correct it")
    elif origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise InputError(where, repr(value), f"a value of type {name}", "correct it")


def save_json(config: Any, path: Path) -> None:
    """Write a configuration as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load_json(cls: type[C], path: Path) -> C:
    """Read a configuration back, strictly.

    Raises: MissingFileError; InputError where the file is no JSON or does not fit `cls`.
    """
    if not path.is_file():
        raise MissingFileError(str(path), "no such file", "a saved configuration", "check the path")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(str(path), f"no JSON ({error})", "JSON", "restore the file") from error
    return from_dict(cls, data, str(path))


def parse(cls: type[C], argv: Sequence[str], *, prog: str, default: C | None = None,
          about: str = "") -> C:  # fmt: skip
    """Parse command-line flags into `cls`, starting from `default`.

    Raises: InputError for an unknown flag (with the nearest known one) or a value that does not
        fit. SystemExit(0) after `--help`.
    """
    known = _flags(cls)
    for word in argv:
        flag = word.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known and flag != "--help":
            raise InputError(word.split("=")[0], "an unknown option", "a known one",
                             near_miss(flag, known))  # fmt: skip
    kwargs = {} if default is None else {"default": default}
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(cls, args=list(argv), prog=prog, description=about, **kwargs)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError("command line", _one_line(told.getvalue()), "valid options",
                         f"see {prog} --help") from None  # fmt: skip


def parse_recipe(recipes: Mapping[str, C], argv: Sequence[str], *, prog: str,
                 about: str = "") -> tuple[str, C]:  # fmt: skip
    """Parse `RECIPE --flags`, or `--resume RUN --flags`, which starts from the run's own config.

    Returns: the recipe's name (for a resumed run, the one stored as `recipe` in its config) and
        the configuration.
    """
    cls = type(next(iter(recipes.values())))
    if not argv or argv[0] in ("-h", "--help"):
        if not argv:
            raise InputError("recipe", "nothing", f"one of {', '.join(recipes)}",
                             f"name one, e.g. {prog} {next(iter(recipes))}")  # fmt: skip
        print(f"usage: {prog} RECIPE [OPTIONS]\n       {prog} --resume RUN [OPTIONS]\n\nrecipes:")
        for name, recipe in recipes.items():
            print(f"  {name:<18} {getattr(recipe, 'about', '')}")
        print("\nThe defaults below are those of the first recipe.\n")
        sys.stdout.flush()
        parse(cls, ["--help"], prog=f"{prog} {next(iter(recipes))}", default=recipes[next(iter(recipes))], about=about)
    name, rest = (argv[0], list(argv[1:])) if not argv[0].startswith("-") else ("", list(argv))
    if name and name not in recipes:
        raise InputError("recipe", f"'{name}'", "a known recipe", near_miss(name, recipes))
    resumed = _value_of("--resume", rest)
    if resumed:
        stored = load_json(cls, Path(resumed) / "config.json")
        stored_name = str(getattr(stored, "recipe", ""))
        if name and stored_name != name:
            raise InputError("recipe", f"'{name}'", f"'{stored_name}', the recipe of {resumed}",
                             "leave the recipe out with --resume")  # fmt: skip
        return stored_name, parse(cls, rest, prog=prog, default=stored, about=about)
    if not name:
        raise InputError("recipe", f"'{rest[0]}'", f"one of {', '.join(recipes)} first",
                         f"e.g. {prog} {next(iter(recipes))}")  # fmt: skip
    return name, parse(cls, rest, prog=f"{prog} {name}", default=recipes[name], about=about)


def _value_of(flag: str, argv: Sequence[str]) -> str:
    for i, word in enumerate(argv):
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
    return ""


def _flags(cls: Any, prefix: str = "") -> set[str]:
    """Every `--flag` of a configuration class; a group marked `tyro.conf.arg(name="")` adds none."""
    flags: set[str] = set()
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if any(mark is tyro.conf.Suppress or mark is tyro.conf.Fixed for mark in marks):
            continue
        inner = get_args(hint)[0] if marks else hint
        bare = any(getattr(mark, "name", None) == "" for mark in marks)
        if dataclasses.is_dataclass(inner):
            flags |= _flags(inner, prefix if bare else f"{prefix}{name}.")
            continue
        flags.add(f"--{prefix}{name}".replace("_", "-"))
        if inner is bool:
            flags.add(f"--{prefix}no-{name}".replace("_", "-"))
    return flags


def _one_line(box: str) -> str:
    lines = (line.strip("│╭╮╰╯─┃━ \n") for line in box.splitlines())
    words = [line for line in lines if line and not line.startswith(("For full helptext", "Parsing"))]
    return " ".join(words)
