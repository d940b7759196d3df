"""The learning rate of each step: a linear warm-up, then a constant, linear or cosine schedule."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def scheduled_rate(peak: float, schedule: Schedule, step: int, total: int, warmup: int, *, last: float = 0.0) -> float:
    """The learning rate of the step after `step` applied ones.

    It rises linearly to `peak`, which it reaches in the last step of the warm-up. Then it stays, or falls linearly or
    along half a cosine (Loshchilov & Hutter 2017, without restarts) towards `last` of the peak after the last step.

    Args:
        last: Where it ends, as a share of the peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (last + (1 - last) * (1 - progress))
        case "cosine":
            return peak * (last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2)
