"""Frozen dataclasses as configuration: a command line from them, JSON out and back.

A configuration is a frozen, keyword-only dataclass of plain values and of further such classes
(its groups). A recipe is an instance. Help texts are the strings under the fields (read by tyro).
"""

import contextlib
import dataclasses
import io
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tyro

from shared_utils.atomic import write_text
from shared_utils.errors import InputError, MissingFileError, near_miss

C = TypeVar("C")
KINDS = {
    float: "a number",
    int: "a whole number",
    str: "a text",
    bool: "true or false",
    Path: "a path",
}


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain data (dict, list, str, number, bool, None) that JSON can hold.

    Raises: InputError on NaN or an infinity, which JSON does not have.
    """
    result: dict[str, Any] = _plain(config, "")
    return result


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {n: _plain(getattr(value, n), f"{where}.{n}".lstrip(".")) for n in names}
    if isinstance(value, list | tuple):
        return [_plain(v, where) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(where, value, "a finite number", "correct it")
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "config") -> C:
    """Build `cls` from plain data.

    Raises: InputError on an unknown or missing key or a value of another type; the message names
        the key with its path below `where`.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise InputError(
                f"{where}.{key}", "an unknown key", "a known one", near_miss(key, fields)
            )
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}.{name}", "nothing", "a value", "add the key")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return from_dict(hint, value, where)
    if origin in (Union, types.UnionType):
        for kind in args:
            with contextlib.suppress(InputError):
                return _convert(kind, value, where)
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if Ellipsis in args else args
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in pairs)
    elif origin is Literal and value in args:
        return value
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise InputError(where, repr(value), _expected(hint), "correct it")


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    return KINDS.get(hint) or "a value of type " + (
        hint.__name__ if type(hint) is type else str(hint)
    )


def save_json(config: Any, path: Path) -> None:
    """Write a configuration as JSON, whole or not at all."""
    write_text(json.dumps(to_dict(config), indent=2) + "\n", path)


def load_json(cls: type[C], path: Path) -> C:
    """Read a configuration back, strictly.

    Raises: MissingFileError; InputError where the file is no JSON or does not fit `cls`.
    """
    if not path.is_file():
        raise MissingFileError(str(path), "no such file", "a saved configuration", "check the path")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(str(path), f"no JSON ({error})", "JSON", "restore the file") from error
    result: C = _convert(cls, data, str(path))
    return result


def parse(
    cls: type[C], argv: Sequence[str], *, prog: str, default: C | None = None, about: str = ""
) -> C:
    """Parse command-line flags into `cls`, starting from `default`.

    Raises: InputError for an unknown flag (with the nearest known one), a value that does not
        fit, or what the class itself finds wrong. SystemExit(0) after `--help`.
    """
    options = _options(cls)
    start = {} if default is None else {"default": default}
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            config, unknown = tyro.cli(
                cls, args=argv, prog=prog, description=about, return_unknown_args=True, **start
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _explain(stop, told.getvalue(), options, argv, prog) from None
    if unknown and unknown[0].startswith("-"):
        flag = unknown[0].split("=")[0]
        do = near_miss(flag.replace("_", "-"), options)
        raise InputError(flag, "an unknown option", "a known one", do)
    if unknown:
        do = f"remove it or see {prog} --help"
        raise InputError("command line", f"'{unknown[0]}'", "options that start with --", do)
    to_dict(config)  # no NaN may pass: it is neither smaller nor larger than a limit
    return config


def _explain(
    stop: SystemExit, told: str, options: Mapping[str, Any], argv: Sequence[str], prog: str
) -> InputError:
    """The error behind tyro's exit: one raised by the class, or about the first flag it names."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        cause = cause.__cause__ or cause.__context__
    flag = next((word for word in re.findall(r"--[\w.-]*\w", told) if word in options), "")
    if not flag:
        text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", told).split())
        return InputError("command line", text, "valid options", f"see {prog} --help")
    got = " ".join(_values_of(flag, argv))
    return InputError(
        flag, f"'{got}'" if got else "nothing", _expected(options[flag]), "correct it"
    )


def parse_recipe(
    recipes: Mapping[str, C], argv: Sequence[str], *, prog: str, about: str = ""
) -> tuple[str, C]:
    """Parse `RECIPE --flags`, or `--resume RUN --flags`, which starts from the run's own config.

    Returns: the recipe's name (for a resumed run, the one stored as `recipe` in its config) and
        the configuration.
    """
    first, *_ = recipes
    cls = type(recipes[first])
    names = ", ".join(recipes)
    if argv and argv[0] in ("-h", "--help"):
        lines = [f"  {name:<18} {getattr(recipe, 'about', '')}" for name, recipe in recipes.items()]
        about = "\n".join(
            [
                f"{about}\nTo go on with a run: {prog} --resume RUN [OPTIONS]\n\nrecipes:",
                *lines,
                f"\nThe defaults below are those of {first}.",
            ]
        )
        parse(cls, argv, prog=f"{prog} RECIPE", default=recipes[first], about=about)
    name, options = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if name and name not in recipes:
        raise InputError("recipe", f"'{name}'", "a known recipe", near_miss(name, recipes))
    if resumed := "".join(_values_of("--resume", options)[:1]):
        start = load_json(cls, Path(resumed) / "config.json")
        stored = str(getattr(start, "recipe", ""))
        if name and stored != name:
            got = f"'{stored}', the recipe of {resumed}"
            raise InputError("recipe", f"'{name}'", got, "leave the recipe out with --resume")
        return stored, parse(cls, options, prog=prog, default=start, about=about)
    if not name:
        got = f"'{argv[0]}'" if argv else "nothing"
        raise InputError("recipe", got, f"one of {names} first", f"try {prog} {first}")
    return name, parse(cls, options, prog=f"{prog} {name}", default=recipes[name], about=about)


def _values_of(flag: str, argv: Sequence[str]) -> list[str]:
    """The words that follow the last `flag` (or `flag=`) up to the next option."""
    values: list[str] = []
    taking = False
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            taking = name.replace("_", "-") == flag
            if taking:
                values = [value] if equals else []
        elif taking:
            values.append(word)
    return values


def _options(cls: Any, prefix: str = "--") -> dict[str, Any]:
    """Every flag of a configuration class with the type of its value.

    A group marked `tyro.conf.arg(name="")` adds nothing to the flags of its fields.
    """
    options: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if any(mark is tyro.conf.Suppress or mark is tyro.conf.Fixed for mark in marks):
            continue
        kind = get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(kind):
            bare = any(getattr(mark, "name", None) == "" for mark in marks)
            options |= _options(kind, prefix if bare else f"{prefix}{name}.".replace("_", "-"))
            continue
        options[f"{prefix}{name}".replace("_", "-")] = kind
        if kind is bool:
            options[f"{prefix}no-{name}".replace("_", "-")] = kind
    return options
