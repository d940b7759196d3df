"""The probability of catching, against counting all samples."""

from __future__ import annotations

from itertools import combinations

import pytest

from isthmus.common.errors import ConfigError
from isthmus.privacy.transcript.detection import probability_of_catching


@pytest.mark.parametrize(("calls", "altered", "replayed"), [(6, 1, 2), (7, 3, 2), (5, 5, 1), (8, 2, 7), (6, 2, 0)])
def test_it_is_the_share_of_samples_with_an_altered_call(calls: int, altered: int, replayed: int) -> None:
    samples = list(combinations(range(calls), replayed))
    meeting = sum(any(each < altered for each in sample) for sample in samples) / len(samples)
    assert probability_of_catching(calls, altered, replayed) == pytest.approx(meeting)


def test_large_runs_and_the_ends() -> None:
    assert probability_of_catching(10**6, 10**4, 300) == pytest.approx(1 - 0.99**300, rel=1e-3)
    assert probability_of_catching(100, 0, 100) == 0.0
    assert probability_of_catching(100, 1, 100) == 1.0
    assert probability_of_catching(0, 0, 0) == 0.0


@pytest.mark.parametrize("bad", [(5, 6, 1), (5, 1, 6), (5, -1, 1)])
def test_more_than_there_are_is_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="do not fit 5"):
        probability_of_catching(*bad)
