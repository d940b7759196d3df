"""Membership inference: how well scores tell texts that were trained on from texts that were not."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.privacy.measures.bootstrap import Interval, drawn


def membership_auc(members: Tensor, others: Tensor) -> float:
    """The chance that a member scores higher than a non-member, ties counted half: the area under the ROC curve.

    Args:
        members: Scores of members, `[n]`; higher for what is likelier to be one.
        others: Scores of non-members, `[m]`.

    Raises:
        ConfigError: One of both is empty.
    """
    _check(members, others)
    ordered = others.double().sort().values
    scores = members.double()
    below = torch.searchsorted(ordered, scores)
    up_to = torch.searchsorted(ordered, scores, right=True)
    return float((below + up_to).double().mean() / (2 * len(others)))


def true_positive_rate(members: Tensor, others: Tensor, *, at: float = 0.01) -> float:
    """The largest share of members above a threshold that at most the share `at` of non-members lies above.

    Args:
        members: As for `membership_auc`.
        others: As for `membership_auc`; fewer than `1 / at` of them tell nothing.
        at: False positive rate.

    Raises:
        ConfigError: There are no members, or too few non-members.
    """
    _check(members, others)
    if not 0 < at < 1 or len(others) < 1 / at:
        raise ConfigError(
            f"{len(others)} non-members cannot show a false positive rate of {at}: give at least {math.ceil(1 / at)}"
            if 0 < at < 1
            else f"a false positive rate of {at} makes no sense; use a number between 0 and 1"
        )
    allowed = int(at * len(others) + 1e-9)
    threshold = others.double().sort(descending=True).values[allowed]
    return float((members.double() > threshold).double().mean())


def membership_interval(
    measure: Callable[[Tensor, Tensor], float], members: Tensor, others: Tensor, *, seed: int = 0
) -> Interval:
    """A measure of this file with its 95 % interval, by the bootstrap over members and non-members.

    Where it is 0 or 1, the interval reaches as far as the rule of three allows: 3 / n, n being the number of members or
    that of non-members, whichever is smaller.

    Args:
        measure: Of members' and others' scores.
        members, others: As for `membership_auc`.
        seed: Of the draws.

    Raises:
        ConfigError: What `measure` raises.
    """
    value = measure(members, others)
    pairs = zip(drawn(len(members), seed), drawn(len(others), seed + 1), strict=True)
    found = torch.tensor([measure(members[ours], others[theirs]) for ours, theirs in pairs], dtype=torch.float64)
    low, high = (float(found.quantile(q)) for q in (0.025, 0.975))
    room = min(1.0, 3 / min(len(members), len(others)))
    return Interval(value, 1 - room if value == 1 else low, room if value == 0 else high)


def _check(members: Tensor, others: Tensor) -> None:
    if not len(members) or not len(others):
        raise ConfigError(
            f"{len(members)} members and {len(others)} non-members cannot be told apart; give some of both"
        )
