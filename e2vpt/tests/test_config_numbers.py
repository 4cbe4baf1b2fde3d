"""No option that takes a number takes one that is not finite."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_type_hints

import pytest

from e2vpt.cli import main
from e2vpt.config import TrainConfig
from e2vpt.pretrain_config import PretrainConfig
from shared_utils.errors import InputError


def float_fields(cls: type[Any]) -> list[tuple[type[Any], str]]:
    """Every field of a configuration and its groups that holds a float."""
    found: list[tuple[type[Any], str]] = []
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found += float_fields(hint)  # type: ignore[arg-type]
        elif hint is float:
            found.append((cls, name))
    return found


FIELDS = float_fields(TrainConfig) + float_fields(PretrainConfig)


def test_there_are_some() -> None:
    names = [name for _, name in FIELDS]
    assert {"lr", "weight_decay", "prompt_dropout", "lora_alpha", "mix_prob"} <= set(names)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_a_value_that_is_not_finite_is_refused(cls: type[Any], name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^\w+\.{name}: got {value}, expected .*; correct it$"):
        cls(**{name: value})


@pytest.mark.parametrize("command", [("train", "digits"), ("pretrain", "tiny-imagenet-32")])
@pytest.mark.parametrize(
    "option", ["optim.lr", "optim.weight-decay", "optim.warmup-epochs", "data.batch-size"]
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_on_the_command_line_it_is_one_line(
    capsys: pytest.CaptureFixture[str], command: Sequence[str], option: str, value: str
) -> None:
    assert main([*command, f"--{option}", value]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert option.replace("-", "_") in error.replace("-", "_")
    assert error.count("\n") == 1
