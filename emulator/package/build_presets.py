"""What `isthmus emulator build` makes where the user gives no options: a stand-in to tune on, or a small draft."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BuildPreset:
    """Defaults of a build.

    Attributes:
        method: See `Recipe`.
        keep: Share of the middle's layers that are kept.
        layers: How many are kept, in place of a share; None for the share.
        mse_weight: See `DistillConfig`, for this and the other weights.
    """

    method: str
    keep: float
    layers: int | None
    mse_weight: float
    lm_weight: float
    kl_weight: float

    def share(self, n_middle: int) -> float:
        """Share of a middle of so many layers that is kept."""
        return self.keep if self.layers is None else min(1.0, self.layers / n_middle)


STAND_IN = BuildPreset("uniform", 0.5, None, mse_weight=30.0, lm_weight=1.0, kl_weight=0.0)
DRAFT = BuildPreset("uniform+bridged", 0.5, 3, mse_weight=0.0, lm_weight=0.0, kl_weight=1.0)
