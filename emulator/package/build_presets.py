"""What `isthmus emulator build` makes where the user gives no options: a stand-in to tune on, or a small draft."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BuildPreset:
    """Defaults of a build.

    Attributes:
        method: See `Recipe`.
        keep: Which of the middle's layers are kept: a share, or as a whole number how many.
        mse_weight: See `DistillConfig`, for this and the other weights.
    """

    method: str
    keep: float | int
    mse_weight: float
    lm_weight: float
    kl_weight: float

    def share(self, n_middle: int) -> float:
        """Share of a middle of so many layers that is kept."""
        return min(1.0, self.keep / n_middle) if isinstance(self.keep, int) else self.keep


FOR_TUNING = BuildPreset("uniform", 0.5, mse_weight=30.0, lm_weight=1.0, kl_weight=0.0)
FOR_DRAFTING = BuildPreset("uniform+bridged", 3, mse_weight=0.0, lm_weight=0.0, kl_weight=1.0)
