"""Scores with what is needed to tell a gain from chance: the figures of every held-out document. Pure, no torch.

A score is a ratio of two sums over documents: the losses of a document over its tokens, or right answers over
questions. Its standard error comes from the documents' linearized contributions (the delta method), and two scores on
the same documents are compared document by document, so that what is hard for both does not count as noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

METRICS = {"completion_loss": False, "accuracy": True}
"""Whether more is better, by metric."""


@dataclass(frozen=True, slots=True)
class Score:
    """A metric on held-out documents.

    Attributes:
        metric: One of `METRICS`.
        sums: Sum of the losses of each document in nats, or 1 for a right answer and 0 for a wrong one.
        counts: Tokens of each document, or 1.
    """

    metric: str
    sums: tuple[float, ...]
    counts: tuple[float, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Score:
        """The inverse of `to_json`."""
        return cls(value["metric"], tuple(value["sums"]), tuple(value["counts"]))

    def to_json(self) -> dict[str, Any]:
        """For a cell's file, with six digits of each sum."""
        sums = [float(f"{part:.6g}") for part in self.sums]
        return {"metric": self.metric, "value": self.value, "sums": sums, "counts": list(self.counts)}

    @property
    def value(self) -> float:
        """The score."""
        return sum(self.sums) / sum(self.counts)

    def contributions(self) -> list[float]:
        """How each document moves the score, to the first order: their mean is 0."""
        total = sum(self.counts)
        slope, value = len(self.sums) / total, self.value
        return [slope * (part - value * count) for part, count in zip(self.sums, self.counts, strict=True)]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float

    @property
    def is_clear(self) -> bool:
        """Whether it is above 0 by more than two standard errors."""
        return self.value > 2 * self.error


def mean(scores: Sequence[Score]) -> Estimate:
    """The mean over seeds; the error is that of the seeds and of the sample of documents together."""
    return _estimate([score.value for score in scores], [score.contributions() for score in scores])


def gain(scores: Sequence[Score], base: Sequence[Score]) -> Estimate:
    """How much better `scores` are than `base`: positive is better, whatever the metric.

    Args:
        scores: One for each seed.
        base: One for each seed, or a single one for all; of the same documents.
    """
    sign = 1.0 if METRICS[base[0].metric] else -1.0
    pairs = [(score, base[min(index, len(base) - 1)]) for index, score in enumerate(scores)]
    return _estimate(
        [sign * (ours.value - theirs.value) for ours, theirs in pairs],
        [
            [sign * (a - b) for a, b in zip(ours.contributions(), theirs.contributions(), strict=True)]
            for ours, theirs in pairs
        ],
    )


def share(scores: Sequence[Score], base: Sequence[Score], best: Sequence[Score]) -> Estimate:
    """Which part of the way from `base` to `best` the scores go, with the error of the ratio (the delta method).

    Args:
        scores, best: One for each seed, of the same documents; equal seeds are paired, and what one of the lists alone
            has is left out.
        base: One for each seed, or a single one for all.
    """
    base = base if len(base) > 1 else [*base] * len(best)
    shared = min(len(scores), len(base), len(best))
    scores, base, best = scores[:shared], base[:shared], best[:shared]
    whole = gain(best, base).value
    value = gain(scores, base).value / whole
    values, contributions = [], []
    for ours, least, theirs in zip(scores, base, best, strict=True):
        values.append((ours.value - least.value - value * (theirs.value - least.value)) / whole)
        parts = zip(ours.contributions(), least.contributions(), theirs.contributions(), strict=True)
        contributions.append([(a - b - value * (c - b)) / whole for a, b, c in parts])
    return Estimate(value, _estimate(values, contributions).error)


def _estimate(values: Sequence[float], contributions: Sequence[Sequence[float]]) -> Estimate:
    """Seeds and documents are drawn independently, so their variances add."""
    of_seeds = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
    averages = [sum(column) / len(column) for column in zip(*contributions, strict=True)]
    of_documents = statistics.variance(averages) / len(averages) if len(averages) > 1 else 0.0
    return Estimate(statistics.fmean(values), math.sqrt(of_seeds + of_documents))
