"""What all groups of settings share: how they are checked, and under which heading `--help` shows them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

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
