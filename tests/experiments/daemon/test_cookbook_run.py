"""When the loss of a run of tinker_cookbook is said to fall."""

from __future__ import annotations

import math

import pytest

from isthmus.experiments.daemon.cookbook_run import loss_falls


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        ([3.0, 2.0], True),
        ([3.0, 3.5, 2.0, 2.5, 1.0], True),
        ([2.0, 3.0], False),
        ([2.0, 2.0], False),
        ([2.0, math.nan], False),
        ([2.0], False),
        ([], False),
    ],
)
def test_the_second_half_is_below_the_first(losses: list[float], falls: bool) -> None:
    assert loss_falls(losses) == falls
