"""Intervals by the bootstrap over sequences: tokens of one sequence depend on each other, sequences do not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.privacy.measures.token_accuracy import Hits

_DRAWS = 2000


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def share_interval(hits: Hits, *, seed: int = 0) -> Interval:
    """The share of right ones, with the 2.5th and 97.5th percentile of what redrawn sequences give (Efron 1979).

    Where all or none are right, every redrawn sample says so; the interval then reaches as far as the rule of three
    allows for so many sequences (3 / n), so that ten perfect sequences are not taken for certainty.

    Args:
        hits: By sequence.
        seed: Of the draws.

    Raises:
        ConfigError: Nothing was counted.
    """
    if not len(hits.of) or float(hits.of.sum()) == 0:
        raise ConfigError("a share of nothing has no interval: give sequences with at least one token that counts")
    of_each = drawn(len(hits.of), seed)
    right, of = hits.right[of_each].sum(1), hits.of[of_each].sum(1)
    value, shares = hits.share, (right / of)[of > 0]
    low, high = (float(shares.quantile(q)) for q in (0.025, 0.975))
    room = min(1.0, 3 / int((hits.of > 0).sum()))
    return Interval(value, 1 - room if value == 1 else low, room if value == 0 else high)


def mean_interval(values: Tensor, *, seed: int = 0) -> Interval:
    """The mean of one value a sequence, `[sequences]`, with its interval.

    Raises:
        ConfigError: There is none.
    """
    if not len(values):
        raise ConfigError("no values have no mean: give one for each sequence")
    means = values.double()[drawn(len(values), seed)].mean(1)
    return Interval(float(values.double().mean()), *(float(means.quantile(q)) for q in (0.025, 0.975)))


def ratio_interval(hits: Hits, base: Hits, *, seed: int = 0) -> Interval:
    """A share over that of the same sequences in another case, both redrawn together.

    Args:
        hits, base: By sequence; `right` may be any sum, of losses say.
        seed: Of the draws.

    Raises:
        ConfigError: They are of other sequences, or the base is nothing.
    """
    if len(hits.of) != len(base.of) or float(base.right.sum()) == 0:
        raise ConfigError(
            f"{len(hits.of)} sequences cannot be compared with {len(base.of)} whose sum is {float(base.right.sum())}: "
            "give both of the same sequences"
        )
    of_each = drawn(len(hits.of), seed)
    ours, theirs = (each.right[of_each].sum(1) / each.of[of_each].sum(1) for each in (hits, base))
    ratios = ours / theirs
    return Interval(hits.share / base.share, *(float(ratios.quantile(q)) for q in (0.025, 0.975)))


def means_ratio_interval(values: Tensor, base: Tensor, *, seed: int = 0) -> Interval:
    """The mean of `values` over the mean of `base`.

    Args:
        values, base: `[n]` and `[m]`, the seconds of two runs' steps, say. With n = m they are pairs and are redrawn as
            such; else each side is redrawn by itself.
        seed: Of the draws.

    Raises:
        ConfigError: One of them is empty, or the mean of `base` is 0.
    """
    if not len(values) or not len(base) or float(base.mean()) == 0:
        raise ConfigError(f"{len(values)} values over {len(base)} others have no ratio: give some that are above 0")
    other_seed = seed if len(values) == len(base) else seed + 1
    ratios = values[drawn(len(values), seed)].mean(1) / base[drawn(len(base), other_seed)].mean(1)
    return Interval(float(values.mean() / base.mean()), *(float(ratios.quantile(q)) for q in (0.025, 0.975)))


def drawn(n: int, seed: int) -> Tensor:
    """Sequences drawn with replacement, `[draws, n]`."""
    return torch.randint(n, (_DRAWS, n), generator=torch.Generator().manual_seed(seed))
