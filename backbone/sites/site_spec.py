"""What both sides say about a site: where it is, and where its adapter runs."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from isthmus.common.errors import PlanError


class Placement(enum.IntEnum):
    """Where the adapter of a site runs, and so what crosses the strip for it."""

    EDGE = 1
    """On the edge: the site's input goes down, the contribution comes up (DLoRA, Gao & Zhang 2024)."""
    LOW_RANK = 2
    """Its trainable core on the edge, between two frozen matrices of the cloud: r numbers each way (PrivateLoRA, Wang
    et al. 2023)."""
    LEASED = 3
    """On the cloud, with weights that the edge lends it; their gradients come back. Nothing crosses for a token."""
    TAP = 4
    """Nowhere: what comes out of the layer goes down as it is, for a network beside the backbone (LST, Sung et al.
    2022)."""
    LENT = 5
    """On the cloud, with weights that the edge lends it and does not train: the site adds what it has learned, and
    nothing comes back."""


class Basis(enum.IntEnum):
    """What the frozen matrices of a low-rank site are made of."""

    SEEDED = 0
    """Random numbers that both sides know."""
    SVD = 1
    """The linear's own weight, which only the cloud has (LoRA-XS, Bałazy et al. 2024)."""


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """One site.

    Attributes:
        layer: The decoder layer's index in the whole model.
        part: The module's name inside the layer; empty for what comes out of the layer as a whole.
        placement: Where its adapter runs.
        rank: Of a low-rank site; of a tap its width, or 0 for hidden states as they are.
        seed: Of a low-rank site's matrices, or of a tap's projection.
        basis: Of a low-rank site.

    Raises:
        PlanError: The values do not fit each other.
    """

    layer: int
    part: str
    placement: Placement = Placement.EDGE
    rank: int = 0
    seed: int = 0
    basis: Basis = Basis.SEEDED

    def __post_init__(self) -> None:
        on_layer = not self.part
        wrong = (
            (self.placement == Placement.TAP and not on_layer)
            or ((self.placement == Placement.LOW_RANK or self.on_loan) and on_layer)
            or (self.placement == Placement.LOW_RANK and self.rank < 1)
            or ((self.placement == Placement.EDGE or self.on_loan) and (self.rank or self.seed))
        )
        if wrong:
            raise PlanError(
                f"site {self} of placement {self.placement.name} with rank {self.rank} makes no sense: a tap is behind "
                "a layer, a low-rank or leased site at a linear"
            )

    @property
    def asks(self) -> bool:
        """Whether a call pauses for it."""
        return self.placement in (Placement.EDGE, Placement.LOW_RANK)

    @property
    def on_loan(self) -> bool:
        """Whether the cloud has its weights for a while."""
        return self.placement in (Placement.LEASED, Placement.LENT)

    def __str__(self) -> str:
        return f"{self.layer}.{self.part}" if self.part else f"layer {self.layer}"
