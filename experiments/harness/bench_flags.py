"""How the flags of measurements are read that name several things. Imports nothing heavy."""

from __future__ import annotations

import math
from typing import Literal

from isthmus.common.errors import ConfigError


def precision_of(text: str, flag: str) -> Literal["fp32", "bf16"]:
    """The precision that a flag names. Raises ConfigError if it is none."""
    if text == "fp32":
        return "fp32"
    if text == "bf16":
        return "bf16"
    raise ConfigError(f"--{flag} {text!r} is not known; use fp32 or bf16")


def names_of(text: str, flag: str) -> tuple[str, ...]:
    """Names with commas between. Raises ConfigError if one is empty or comes twice."""
    names = tuple(name.strip() for name in text.split(","))
    if "" in names:
        raise ConfigError(f"--{flag} {text!r} has an empty name; write them with commas between")
    if len(set(names)) < len(names):
        raise ConfigError(f"--{flag} {text!r} names something twice")
    return names


def numbers_of(text: str, flag: str) -> tuple[float, ...]:
    """Positive numbers with commas between. Raises ConfigError if they are something else."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise ConfigError(f"--{flag} {text!r} is not a list of positive numbers; write 1e-4,3e-4 for example")
    return values
