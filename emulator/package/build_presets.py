"""What `isthmus emulator build` makes where no options say it: a stand-in to tune on, a small draft, a preset."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.backbone.plan import SplitPlan
    from isthmus.emulator.compress.recipe import Recipe
    from isthmus.emulator.distill.distillation import DistillConfig
    from isthmus.emulator.package.manifest import Tuning


@dataclass(frozen=True, slots=True)
class BuildPreset:
    """Defaults of a build.

    Attributes:
        method: See `Recipe`.
        keep: Which of the middle's layers are kept: a share, or as a whole number how many.
        mse_weight: See `DistillConfig`, for this and the other weights.
        distils: Whether it is distilled also where no text for that is given.
        ridge: Of the fit of bridges, see `RidgeSums.solve`.
        name: As `--preset` has it and the manifest; a preset with a name writes its own text where there is none,
            cuts the model by `top_heavy`, measures its quality and gives advice for tuning.
        gives_not: What the data owner or the model's owner must not expect of it.
        advised: The advice for tuning, as fields of `Tuning`; see `tuning`.
    """

    method: str
    keep: float | int
    mse_weight: float
    lm_weight: float
    kl_weight: float
    distil_steps: int = 1000
    batch: int = 8
    distils: bool = False
    ridge: float = 1e-3
    name: str | None = None
    gives_not: str = ""
    advised: tuple[tuple[str, float | int | str], ...] = ()

    @property
    def tuning(self) -> Tuning:
        """The advice; only of a preset that gives any."""
        from isthmus.emulator.package.manifest import Tuning  # slow to import, and most commands need no advice

        return Tuning.model_validate(dict(self.advised))

    def distillation(self, **changed: Any) -> DistillConfig:
        """How it is distilled; what is None in `changed` stays as the preset has it."""
        from isthmus.emulator.distill.distillation import DistillConfig  # imports torch

        own = {
            "steps": self.distil_steps,
            "batch": self.batch,
            "mse_weight": self.mse_weight,
            "lm_weight": self.lm_weight,
            "kl_weight": self.kl_weight,
        }
        return DistillConfig(**own | {name: value for name, value in changed.items() if value is not None})

    def share(self, n_middle: int) -> float:
        """Share of a middle of so many layers that is kept: of one layer at least."""
        if isinstance(self.keep, int):
            return min(1.0, self.keep / n_middle)
        return self.keep if round(self.keep * n_middle) else 1 / n_middle

    def makes(self, plan: SplitPlan, recipe: Recipe, distillation: DistillConfig | None) -> bool:
        """Whether these make the emulator that the preset's name and advice stand for, and no other."""

        def weights(of: BuildPreset | DistillConfig) -> tuple[float, float, float]:
            return of.mse_weight, of.lm_weight, of.kl_weight

        made = (str(plan), str(recipe), recipe.keep, None if distillation is None else weights(distillation))
        own = (
            top_heavy(plan.n_layers),
            self.method,
            self.share(len(plan.cloud)),
            weights(self) if self.distils else None,
        )
        return self.name is not None and made == own


FOR_TUNING = BuildPreset("uniform", 0.5, mse_weight=30.0, lm_weight=0.0, kl_weight=1.0)
FOR_DRAFTING = BuildPreset("uniform+bridged", 3, mse_weight=0.0, lm_weight=0.0, kl_weight=1.0)

FIDELITY = BuildPreset(
    "kl+bridged+closed",
    0.75,
    mse_weight=30.0,
    lm_weight=0.0,
    kl_weight=1.0,
    distil_steps=130,
    batch=2,
    distils=True,
    ridge=0.1,
    name="fidelity",
    gives_not="no protection from theft is claimed: who keeps the package can tune a copy",
    advised=(("learning_rate", 3e-3), ("steps", 100), ("rank", 8), ("warmup_steps", 0)),
)
GUARDED = replace(
    FIDELITY,
    keep=0.25,
    name="guarded",
    gives_not="a thief is kept out in part alone; it is meant for an edge that fits a bridge of its own",
)
WHOLE = replace(
    FIDELITY,
    method="uniform+int4",
    keep=1.0,
    distils=False,
    name="whole",
    gives_not="no protection from theft: whoever keeps the package has the model in four bits",
    advised=(*FIDELITY.advised, ("layers", "all")),
)
PRESETS = {"fidelity": FIDELITY, "guarded": GUARDED, "whole": WHOLE}
"""What `--preset` names."""


def top_heavy(n_layers: int) -> str:
    """The split plan of a preset: above the middle a fifth of the layers, at least two; below it two, or one.

    There are always fewer below than above: adapters above an emulator learn from it, those below less.
    """
    top = max(2, round(n_layers / 5))
    return f"{min(2, top - 1)}:{top}"
