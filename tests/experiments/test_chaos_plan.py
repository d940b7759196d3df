"""What falls when, and the figures of it."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from isthmus.backbone.errors import ConfigError, IsthmusError
from isthmus.cloud.fault_points import POINTS
from isthmus.experiments.chaos_figures import soaked
from isthmus.experiments.chaos_plan import (
    AT_POINT,
    KINDS,
    NEED_NAMESPACES,
    NOBODY_FEELS,
    ChaosPlan,
    percentile_95,
    pooled_slope,
    warmed_up,
)


def falls(count: int, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> list[object]:
    plan = ChaosPlan(kinds, 3, seed)
    return [plan.next() for _ in range(count)]


def test_every_kind_falls_before_one_falls_again_and_the_seed_decides() -> None:
    drawn = falls(2 * len(KINDS))
    for half in (drawn[: len(KINDS)], drawn[len(KINDS) :]):
        assert {fall.kind for fall in half} == set(KINDS)
    assert drawn == falls(2 * len(KINDS))
    assert drawn != falls(2 * len(KINDS), seed=1)
    assert {fall.victim for fall in drawn} == {0, 1, 2}
    assert {fall.recovered for fall in drawn} == {True, False}
    assert {fall.point for fall in drawn} <= set(POINTS)


def test_a_worker_dies_at_every_point() -> None:
    assert set(AT_POINT.values()) == set(POINTS)
    assert set(NEED_NAMESPACES) | set(NOBODY_FEELS) < set(KINDS)


@pytest.mark.parametrize("kinds", [(), ("meteor",), ("worker_killed", "meteor")])
def test_a_kind_that_does_not_exist_is_refused(kinds: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"no fault '.*worker_killed"):
        ChaosPlan(kinds, 3, 0)


@given(
    st.floats(-1e3, 1e3),
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.sets(st.integers(0, 1000), min_size=2, max_size=9)), min_size=1),
)
def test_lives_on_parallel_lines_have_their_slope(slope: float, lives: list[tuple[float, set[int]]]) -> None:
    points = [[(float(x), level + slope * x) for x in sorted(xs)] for level, xs in lives]
    assert pooled_slope(points) == pytest.approx(slope, abs=1e-6)


def test_a_slope_needs_two_points_of_one_life() -> None:
    assert pooled_slope([]) is None
    assert pooled_slope([[(1.0, 5.0)], [(9.0, 900.0)]]) is None
    # A life that starts higher, as another process, is no growth.
    assert pooled_slope([[(0.0, 1.0), (1.0, 1.0)], [(2.0, 9.0), (3.0, 9.0)]]) == 0.0


def test_the_beginning_of_a_life_does_not_count() -> None:
    life = [(10.0, 1.0), (14.9, 2.0), (15.0, 3.0), (30.0, 4.0)]
    assert warmed_up(life, 5.0) == life[2:]
    assert warmed_up(life, 60.0) == []
    assert warmed_up([], 1.0) == []


def test_the_95th_percentile_is_interpolated() -> None:
    assert percentile_95([]) is None
    assert percentile_95([3.0]) == 3.0
    assert percentile_95([float(value) for value in range(101)]) == pytest.approx(95.0)


def test_a_soak_compares_the_size_after_the_warm_up_with_that_at_the_end() -> None:
    life = [(float(second), 100.0 if second < 60 else 110.0) for second in range(101)]
    life[50] = (50.0, 900.0)  # a moment that says nothing
    assert soaked([life]) == {"rss_after_warm_up_bytes": 100, "rss_end_bytes": 110, "rss_growth": pytest.approx(1.1)}
    for lives in ([], [[]], [life, life]):
        with pytest.raises(IsthmusError, match=r"more --seconds"):
            soaked(lives)
