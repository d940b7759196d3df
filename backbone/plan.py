"""Split plans: which decoder layers the edge holds and which the cloud holds. Pure, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from isthmus.common.errors import PlanError


@dataclass(frozen=True, slots=True)
class Span:
    """A run of consecutive decoder layers, `[start, stop)`, by their indices in the whole model.

    Raises:
        PlanError: `start` is negative, or `stop` lies before `start`.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise PlanError(f"a span of layers {self.start}:{self.stop} runs backwards; use 0 <= start <= stop")

    def cut(self, count: int) -> list[Span]:
        """So many runs of layers, whose lengths differ by one at most.

        Raises:
            ValueError: There are fewer layers.
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"{len(self)} layers cannot be cut into {count} stages: choose 1 to {len(self)}")
        cuts = [self.start + len(self) * number // count for number in range(count + 1)]
        return [Span(start, stop) for start, stop in pairwise(cuts)]

    def __len__(self) -> int:
        return self.stop - self.start

    def covers(self, other: Span) -> bool:
        """Whether all layers of another run are among these."""
        return self.start <= other.start and other.stop <= self.stop

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.start <= layer < self.stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The edge holds layers `[0, bottom)` and `[n_layers - top, n_layers)`; the cloud holds those between.

    The edge also holds the embedding, the final norm and the head, whatever the plan. The cloud keeps at least one
    layer.

    Raises:
        PlanError: a number is negative, or `bottom + top` leaves the cloud nothing.
    """

    n_layers: int
    bottom: int
    top: int

    def __post_init__(self) -> None:
        if self.bottom < 0 or self.top < 0:
            raise PlanError(f"split plan {self.bottom}:{self.top} has a negative number; use 0 or more on both sides")
        if self.bottom + self.top >= self.n_layers:
            raise PlanError(
                f"split plan {self} gives the edge {self.bottom + self.top} of the model's {self.n_layers} layers and "
                f"leaves the cloud none; keep the two numbers' sum at {max(self.n_layers - 1, 0)} or less"
            )

    @classmethod
    def parse(cls, text: str, n_layers: int) -> SplitPlan:
        """The plan that a flag names.

        Args:
            text: `"BOTTOM:TOP"`, the number of layers that the edge holds at either end, such as `"2:2"` or `"0:3"`.
            n_layers: Number of decoder layers of the whole model.

        Raises:
            PlanError: `text` is not two numbers with a colon between them, or the plan does not fit the model.
        """
        match = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", text)
        if match is None:
            raise PlanError(f"{text!r} is not a split plan; write BOTTOM:TOP, two numbers of layers, such as 2:2")
        return cls(n_layers, int(match[1]), int(match[2]))

    def check_layers(self, n_layers: int) -> None:
        """Make sure that the plan is for a model of so many layers. Raises PlanError."""
        if self.n_layers != n_layers:
            raise PlanError(
                f"split plan {self} is for {self.n_layers} layers, but the model has {n_layers}; parse it again"
            )

    @property
    def cloud(self) -> Span:
        """The layers that the cloud holds."""
        return Span(self.bottom, self.n_layers - self.top)

    @property
    def edge_layers(self) -> tuple[int, ...]:
        """The indices of the layers that the edge holds, ascending."""
        return (*range(self.bottom), *range(self.n_layers - self.top, self.n_layers))

    def __str__(self) -> str:
        return f"{self.bottom}:{self.top}"
