"""What all groups of settings share: how they are checked, and under which heading `--help` shows them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from isthmus.common.machine import usable_cores

PANELS = (
    "Connection",
    "Package",
    "Data",
    "Adapter",
    "Sites",
    "Generation",
    "Optimization",
    "Computation",
    "Draft",
    "Privacy",
    "Audit",
    "Output",
)
"""The headings of `--help`, in their order."""


# What a number of a run may be at most, whoever gives it: a flag, a file, or a stranger's job.
MOST_WIDTH = 1 << 14
"""Of a rank, or a width inside the model: the widest models have as many. A job's rank is at most its model's width."""
MOST_TOKENS = 1 << 20
"""Of a text: the longest models take as many. A job's texts have at most the positions of its model."""
MOST_TEXTS = 1 << 12
"""At a time: of 64 tokens, they are more than a cloud takes in a call."""
MOST_STEPS = 1 << 24
"""Steps, or passes: at a second each, half a year."""
MOST_MIB = 1 << 24
"""Of a disk: 16 TiB."""
MOST_SECONDS = 366 * 86_400.0
MOST_FACTOR = 1e38
"""Of rates, scales and ratios: fp32 has no larger ones. They take neither time nor room."""


def within_cores(value: int | None) -> int | None:
    """Threads that have a core each: others only take turns, and a machine has so many for all of its users."""
    if value is not None and value > (cores := usable_cores()):
        raise ValueError(f"this process has {cores} cores, and more threads than cores only wait: give {cores} at most")
    return value


class Settings(BaseModel):
    """A group of settings; a command's configuration inherits from the groups that it needs.

    Names are flat: a TOML file and the flags have the names of the fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    panel: ClassVar[str]


def panel_of(cls: type[Settings], name: str) -> str:
    """The heading of a field: that of the group which declares it."""
    owners = [base for base in cls.__mro__ if issubclass(base, Settings) and name in base.model_fields]
    return owners[-1].panel


def field_names(cls: type[Settings]) -> list[str]:
    """The fields of a configuration, heading by heading."""
    return sorted(cls.model_fields, key=lambda name: PANELS.index(panel_of(cls, name)))
