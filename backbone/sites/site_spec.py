"""The description of a site that edge and cloud share: where it is, and where its adapter runs."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from isthmus.common.errors import PlanError


class Placement(enum.IntEnum):
    """Where the adapter of a site runs, and so what crosses the wire for it."""

    EDGE = 1
    """On the edge: the site's input goes down, the contribution comes up (DLoRA, Gao & Zhang 2024)."""
    LOW_RANK = 2
    """Its trainable core on the edge, between two frozen matrices of the cloud: r numbers each way (PrivateLoRA, Wang
    et al. 2023)."""
    LEASED = 3
    """On the cloud, with weights that the edge leases to it; the weights' gradients come back, and nothing crosses for
    a token."""
    TAP = 4
    """Nowhere: the layer's output goes down as it is, for a network beside the backbone (LST, Sung et al. 2022)."""
    LEASED_FROZEN = 5
    """As `LEASED`, but the weights are not trained, and no gradients come back."""


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
        rank: The rank of a low-rank site; of a tap its width, or 0 for hidden states as they are; else 0.
        seed: The seed of a low-rank site's matrices or of a tap's projection.
        basis: What a low-rank site's matrices are made of.

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
        at_linear = bool(self.part)
        fits = {
            Placement.EDGE: not (self.rank or self.seed),
            Placement.LOW_RANK: at_linear and self.rank >= 1,
            Placement.LEASED: at_linear and not (self.rank or self.seed),
            Placement.LEASED_FROZEN: at_linear and not (self.rank or self.seed),
            Placement.TAP: not at_linear,
        }
        if not fits[self.placement]:
            raise PlanError(
                f"site {self} of placement {self.placement.name} with rank {self.rank} makes no sense: a tap is behind "
                "a layer, a low-rank or leased site at a linear"
            )

    @property
    def asks(self) -> bool:
        """Whether a call pauses to ask the edge about it."""
        return self.placement in (Placement.EDGE, Placement.LOW_RANK)

    @property
    def is_leased(self) -> bool:
        """Whether the edge leases the adapter's weights to the cloud."""
        return self.placement in (Placement.LEASED, Placement.LEASED_FROZEN)

    def __str__(self) -> str:
        return f"{self.layer}.{self.part}" if self.part else f"layer {self.layer}"
