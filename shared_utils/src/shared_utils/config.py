"""Frozen dataclasses as configuration: a command line from them, JSON out and back.

A configuration is a frozen, keyword-only dataclass of plain values and of further such classes
(its groups). A recipe is an instance. Help texts are the strings under the fields (read by tyro).
"""

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tyro

from shared_utils.checkpoint import reading, write_text
from shared_utils.errors import InputError, near_miss

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain data that JSON can hold. Raises: InputError on NaN or an infinity."""

    def refuse(constant: str) -> None:
        raise InputError("config", constant, "finite numbers", "correct it")

    text = json.dumps(dataclasses.asdict(config), default=os.fspath)
    return cast(dict[str, Any], json.loads(text, parse_constant=refuse))


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "config") -> C:
    """Build `cls` from plain data.

    Raises: InputError on an unknown or missing key or a value of another type; the message names
        the key with its path below `where`.
    """
    hints = get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise InputError(
                f"{where}.{key}", "an unknown key", "a known one", near_miss(key, hints)
            )
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        is_required = {field.default, field.default_factory} == {dataclasses.MISSING}
        if is_required and field.name not in data:
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
    if origin is tuple and isinstance(value, list):
        kinds = args[:1] * len(value) if Ellipsis in args else args
        if len(kinds) == len(value):
            return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    if (hint, type(value)) in ((Path, str), (float, int)):
        return hint(value)
    if type(value) is hint or (origin is Literal and value in args):
        return value
    raise InputError(where, repr(value), _name_of(hint), "correct it")


def _name_of(hint: Any) -> str:
    return inspect.formatannotation(hint).replace("Literal", "one of ")


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
    options = _options(cls)
    start = tyro.MISSING_NONPROP if default is None else default
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            config, unknown = tyro.cli(
                cls,
                prog=prog,
                description=about,
                args=argv,
                default=start,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, InputError):  # raised by the class, and wrapped by tyro
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        # In tyro's box: the flag, and the wrong value as 'x' or ['x', 'y'].
        flag = next((f for f in re.findall(r"--[\w.-]*\w", told.getvalue()) if f in options), "")
        got = re.search(r"\[.*?\]|'[^-].*?'", told.getvalue())
        expected, do = options.get(flag, "valid options"), f"see {prog} --help"
        raise InputError(
            flag or "command line", got[0] if got else "nothing", expected, do
        ) from None
    for word in unknown:
        flag = word.split("=")[0]
        do = near_miss(flag.replace("_", "-"), options)
        raise InputError(flag, "no option of this command", "a known one", do)
    to_dict(config)  # no NaN may pass: it is neither below nor above a limit
    return cast(C, config)


def parse_recipe(
    recipes: Mapping[str, C], argv: Sequence[str], *, prog: str, about: str = ""
) -> tuple[str, C]:
    """Parse `RECIPE --flags`, or `--resume RUN --flags`, which starts from the run's own config.

    Returns: the recipe's name (for a resumed run, the one stored as `recipe` in its config) and
        the configuration.
    """
    first, *_ = recipes
    name, *options = argv or ("",)
    if name in ("-h", "--help"):
        about += f"\nTo go on with a run: {prog} --resume RUN [OPTIONS]\n\nrecipes:\n"
        about += "".join(f"  {n:<18} {getattr(r, 'about', '')}\n" for n, r in recipes.items())
        about += f"\nThe defaults below are those of {first}."
        parse(
            type(recipes[first]), argv, prog=f"{prog} RECIPE", default=recipes[first], about=about
        )
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", nargs="?")
    if run := finder.parse_known_args(argv)[0].resume:
        start = load_json(type(recipes[first]), Path(run) / "config.json")
        stored = str(getattr(start, "recipe", ""))
        if name.startswith("-"):
            name, options = stored, argv
        if name != stored:
            do = "leave the recipe out with --resume"
            raise InputError("recipe", f"'{name}'", f"'{stored}', the recipe of {run}", do)
        return name, parse(type(start), options, prog=prog, default=start, about=about)
    if name not in recipes:
        do = f"{near_miss(name, recipes)}; e.g. {prog} {first}"
        raise InputError("recipe", f"'{name}'", "a known recipe first", do)
    return name, parse(
        type(recipes[first]), options, prog=f"{prog} {name}", default=recipes[name], about=about
    )


def _options(cls: Any, prefix: str = "--") -> dict[str, str]:
    """Every flag with the name of its type; `tyro.conf.arg(name="")` leaves out a group's name."""
    options: dict[str, str] = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        kind, *marks = get_args(hint) if hasattr(hint, "__metadata__") else [hint]
        flag = f"{prefix}{name}".replace("_", "-")
        if dataclasses.is_dataclass(kind):
            is_bare = any(getattr(mark, "name", None) == "" for mark in marks)
            options |= _options(kind, prefix if is_bare else f"{flag}.")
        elif tyro.conf.Suppress not in marks:
            options[flag] = _name_of(kind)
    return options
