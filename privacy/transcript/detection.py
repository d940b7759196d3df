"""How likely an audit is to catch a cloud that alters some of its answers."""

from __future__ import annotations

import math

from isthmus.common.errors import ConfigError

_NORMAL = 1.959964
"""Standard deviations of a normal distribution on either side that hold 95 % of it."""


def probability_of_catching(calls: int, altered: int, replayed: int) -> float:
    """The probability that a sample has an altered call: 1 - C(n - a, m) / C(n, m).

    The sample is drawn without replacement, each of equal size with equal probability, after the answers came; a
    replayed call that was altered is caught for certain, where the comparison is of bits.

    Args:
        calls: n, of the run.
        altered: a, of them, which the cloud has altered.
        replayed: m, of them, which are computed again elsewhere.

    Raises:
        ConfigError: More calls are altered or replayed than there are.
    """
    if not 0 <= altered <= calls or not 0 <= replayed <= calls:
        raise ConfigError(f"{altered} altered and {replayed} replayed calls do not fit {calls}: give at most as many")
    if replayed > calls - altered:
        return 1.0
    # The logarithm of the ratio, factor by factor: the binomials themselves have thousands of digits.
    missed = sum(math.log1p(-altered / (calls - drawn)) for drawn in range(replayed))
    return 0.0 - math.expm1(missed)


def share_interval(found: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score (1927).

    Args:
        found: Of `asked`, which is 1 or more.
    """
    share, spread = found / asked, _NORMAL**2 / asked
    middle, half = share + spread / 2, _NORMAL * math.sqrt(share * (1 - share) / asked + spread / (4 * asked))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))
