"""Standard errors against what repeated sampling gives, and pairs that share their noise."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from isthmus.experiments.scoring.scores import Score, gain, mean, share


def source(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311  # numbers for a test


def drawn(generator: random.Random, n: int, shift: float = 0.0) -> Score:
    counts = [float(generator.randint(1, 9)) for _ in range(n)]
    sums = [count * (2.0 + shift + generator.gauss(0, 0.5)) for count in counts]
    return Score("completion_loss", tuple(sums), tuple(counts))


def test_the_standard_error_is_the_spread_of_repeated_samples() -> None:
    generator = source(0)
    samples = [drawn(generator, 50) for _ in range(400)]
    spread = statistics.stdev(sample.value for sample in samples)
    assert mean(samples[:1]).error == pytest.approx(spread, rel=0.25)


def test_a_gain_counts_shared_noise_once_and_points_the_right_way() -> None:
    base = drawn(source(2), 50)
    better = Score(base.metric, tuple(s - 0.1 * c for s, c in zip(base.sums, base.counts, strict=True)), base.counts)
    assert gain([better], [base]).value == pytest.approx(0.1)
    assert gain([better], [base]).error < 0.01 * mean([base]).error
    right, wrong = Score("accuracy", (1.0, 1.0), (1.0, 1.0)), Score("accuracy", (1.0, 0.0), (1.0, 1.0))
    assert gain([right], [wrong]).value == 0.5
    assert gain([wrong], [right]).value == -0.5


def test_seeds_add_their_own_error() -> None:
    base = Score("completion_loss", (2.0, 2.0), (1.0, 1.0))
    seeds = [Score("completion_loss", (value, value), (1.0, 1.0)) for value in (1.0, 1.2, 1.4)]
    found = gain(seeds, [base])
    assert found.value == pytest.approx(0.8)
    assert found.error == pytest.approx(0.2 / math.sqrt(3))
    assert found.is_clear


def test_a_share_is_of_the_seeds_that_all_have() -> None:
    def of(*values: float) -> list[Score]:
        return [Score("completion_loss", (value - 0.1, value + 0.1), (1.0, 1.0)) for value in values]

    zero, best, few = of(3.0), of(1.0, 2.0, 0.1, 0.2, 0.3), of(2.0, 2.5)
    half = share(few, zero, best)  # (1.0 + 0.5) / (2.0 + 1.0): half of the way in each seed, so without an error
    assert (half.value, half.error) == (pytest.approx(0.5), pytest.approx(0))
    assert share(few, of(4.0, 3.0, 9.0), best).value == pytest.approx((2.0 + 0.5) / (3.0 + 1.0))
    assert share(best, zero, few).value == pytest.approx((2.0 + 1.0) / (1.0 + 0.5))


def test_a_score_survives_its_file() -> None:
    score = drawn(source(3), 5)
    assert Score.from_json(json.loads(json.dumps(score.to_json()))).sums == pytest.approx(score.sums, rel=1e-5)
