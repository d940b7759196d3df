"""The schedule of the learning rate."""

from __future__ import annotations

import math

import pytest

from isthmus.training.rate_schedule import Schedule, scheduled_rate

PARTS = (0, 0.25, 0.5, 0.75)


@pytest.mark.parametrize(
    ("schedule", "last", "after"),
    [
        ("constant", 0.0, [1.0] * 4),
        ("linear", 0.0, [1 - part for part in PARTS]),
        ("linear", 0.2, [1 - 0.8 * part for part in PARTS]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * part)) / 2 for part in PARTS]),
        ("cosine", 0.1, [0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2 for part in PARTS]),
    ],
)
def test_it_rises_along_a_line_and_then_takes_its_shape(schedule: Schedule, last: float, after: list[float]) -> None:
    rates = [scheduled_rate(1.0, schedule, step, 6, 2, last=last) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, *after])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_it_ends_where_it_is_told(schedule: Schedule) -> None:
    assert scheduled_rate(3.0, schedule, 10, 10, 4, last=0.1) == pytest.approx(0.3)


def test_a_run_of_warm_up_alone_divides_by_nothing() -> None:
    assert scheduled_rate(1.0, "linear", 5, 5, 5) == 1.0
