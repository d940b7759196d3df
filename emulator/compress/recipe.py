"""What an emulator is made by: which layers are kept, and how each is made smaller. Pure, no torch.

A recipe is written as a selection and what is done to the layers that it keeps, joined by `+`:

    uniform             layers at even distances (Xiao et al. 2023, "Offsite-Tuning")
    importance          the layers that matter least on public text are dropped, one after another
    kl                  the same order by what counts in the end: the next-token distribution above the middle
    crash               similar neighbours form a cluster, its centre stands for all of them, as often as they were
                        (Zhang et al. 2023, "CRaSh": clustering, removal, sharing)
    crash-drop          the same without the repetition
    +bridged            a linear map, fitted on public text, stands in for each run of layers that is dropped (not with
                        crash, which drops none)
    +closed             after +bridged: a linear map stands at the emulator's end even where its last layer is kept
    +lowrank:F          each linear layer of the kept ones becomes two of rank F * min(outputs, inputs)
    +int8, +int4        the linear weights are rounded to 8 or 4 bits when the emulator is saved
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from isthmus.common.errors import ConfigError, PlanError

EMULATOR_FILE, EMULATOR_INFO = "emulator.safetensors", "emulator.json"
"""An emulator's weights, and what made them."""

SELECTIONS = ("uniform", "importance", "kl", "crash", "crash-drop")
BITS = (8, 4)
_FORM = (
    f"{' | '.join(SELECTIONS)}, then optionally +bridged or +bridged+closed, then +lowrank:F with 0 < F < 1, "
    "then +int8 or +int4"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an emulator is made of the middle layers, of which it keeps the share `keep`; the module says the rest.

    `str(recipe)` and `Recipe.parse` are inverse to each other.

    Raises:
        ConfigError: A value is out of its range.
    """

    selection: str
    keep: float
    bridged: bool = False
    low_rank: float | None = None
    bits: int | None = None
    closed: bool = False

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ConfigError(f"{self.selection!r} is no way to choose layers; write {_FORM}")
        if not (math.isfinite(self.keep) and 0 <= self.keep <= 1):
            raise ConfigError(f"keep {self.keep} is no share of the middle's layers; use more than 0 and up to 1")
        if self.bridged and self.shares:
            raise ConfigError("crash drops no layer that a bridge could stand in for; use crash-drop+bridged")
        if self.closed and not self.bridged:
            raise ConfigError(f"+closed adds a bridge at the end, so it comes after +bridged; write {_FORM}")
        if self.low_rank is not None and not (math.isfinite(self.low_rank) and 0 < self.low_rank < 1):
            raise ConfigError(f"lowrank:{self.low_rank} is out of range; use more than 0 and less than 1")
        if self.bits is not None and self.bits not in BITS:
            raise ConfigError(f"int{self.bits} is not a way to store weights; use int8 or int4")

    @classmethod
    def parse(cls, text: str, keep: float) -> Recipe:
        """The recipe that a flag names, such as `"importance+bridged+int8"`.

        Raises:
            ConfigError: `text` has another form, or a value is out of its range.
        """
        selection, *parts = text.strip().split("+")
        bridged = parts[:1] == ["bridged"]
        closed = bridged and parts[1:2] == ["closed"]
        low_rank: float | None = None
        bits: int | None = None
        for part in parts[bridged + closed :]:
            name, colon, value = part.partition(":")
            if name == "lowrank" and colon and low_rank is None and bits is None:
                try:
                    low_rank = float(value)
                except ValueError:
                    raise ConfigError(f"{value!r} in {text!r} is not a number; write {_FORM}") from None
            elif part in ("int8", "int4") and bits is None:
                bits = int(part.removeprefix("int"))
            else:
                raise ConfigError(f"{part!r} in {text!r} is not understood; write {_FORM}")
        return cls(selection, keep, bridged, low_rank, bits, closed)

    def __str__(self) -> str:
        bridged = ("+bridged" if self.bridged else "") + ("+closed" if self.closed else "")
        rank = "" if self.low_rank is None else f"+lowrank:{self.low_rank}"
        return self.selection + bridged + rank + ("" if self.bits is None else f"+int{self.bits}")

    @property
    def shares(self) -> bool:
        """Whether a kept layer stands for its whole cluster and runs several times."""
        return self.selection == "crash"

    @property
    def chooses_by_text(self) -> bool:
        """Whether the selection is made by what the layers do to public text."""
        return self.selection != "uniform"

    @property
    def needs_text(self) -> bool:
        """Whether public text is needed: to choose the layers, or to fit bridges."""
        return self.bridged or self.chooses_by_text

    def layers_kept(self, n_middle: int) -> int:
        """How many of the middle's layers are kept: `round(keep * n_middle)`.

        Raises:
            PlanError: None would be.
        """
        kept = round(self.keep * n_middle)
        if kept == 0:
            smallest = next(n for n in range(1, 1001) if round(n / 1000 * n_middle)) / 1000
            raise PlanError(
                f"keep {self.keep:g} of {n_middle} middle layers leaves none; use {smallest:g} or more, which keeps one"
            )
        return kept
