"""What falls when, and the figures of it."""

from __future__ import annotations

import contextlib
import subprocess
import time
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.chaos import chaos_figures
from isthmus.experiments.rigs.chaos.chaos_figures import WorkerMemory, soaked
from isthmus.experiments.rigs.chaos.chaos_plan import (
    AT_POINT,
    HIT_NOBODY,
    KINDS,
    NEED_NAMESPACES,
    ChaosPlan,
    common,
    percentile_95,
    pooled_slope,
    slowdown,
    warmed_up,
)
from isthmus.experiments.rigs.fault_points.fault_points import POINTS
from isthmus.experiments.rigs.hostile_tenants import DEEDS


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
    assert all(fall.recovered for fall in drawn if fall.kind in DEEDS)  # else it is not the deed that is slowdown
    assert {fall.point for fall in drawn} <= set(POINTS)


def test_a_worker_dies_at_every_point_and_so_does_every_process_of_a_cloud() -> None:
    assert set(AT_POINT.values()) == set(POINTS)
    assert {"worker_killed", "controller_killed", "control_store_killed", "cloud_killed", *DEEDS} < set(KINDS)
    assert set(NEED_NAMESPACES) | set(HIT_NOBODY) < set(KINDS)


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
    assert soaked([life], 1) == {"rss_after_warm_up_bytes": 100, "rss_end_bytes": 110, "rss_growth": pytest.approx(1.1)}
    for lives in ([], [[]], [life, life]):
        with pytest.raises(IsthmusError, match=r"more --seconds"):
            soaked(lives, 1)


def test_a_soak_of_several_workers_adds_them_up() -> None:
    lives = [[(float(second), size + second) for second in range(101)] for size in (100.0, 1000.0)]
    found = soaked(lives, 2)
    assert (found["rss_after_warm_up_bytes"], found["rss_end_bytes"]) == (100 + 5 + 1000 + 5, 100 + 95 + 1000 + 95)
    for some in (lives[:1], [lives[0], []], [*lives, lives[0]]):  # one died, was seen too late, or was started again
        with pytest.raises(IsthmusError, match=r"each of 2 workers.*more --seconds"):
            soaked(some, 2)


def test_each_process_of_a_worker_is_a_life_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_figures, "SAMPLE_SECONDS", 0.01)
    with contextlib.ExitStack() as stack:

        def start() -> subprocess.Popen[bytes]:
            process = stack.enter_context(subprocess.Popen(["sleep", "300"]))
            stack.callback(process.kill)
            return process

        def seen(count: int) -> None:
            deadline = time.monotonic() + 60
            while len(memory.since_mark()) < count:
                assert time.monotonic() < deadline
                time.sleep(0.01)

        workers = [start(), start()]
        memory = stack.enter_context(WorkerMemory(lambda: [worker.pid for worker in workers], 2))
        seen(2)
        workers[0].kill()  # the other one goes on
        workers[0] = start()
        seen(3)
        assert set(memory.lives) >= {worker.pid for worker in workers}
        assert all(size > 0 for life in memory.lives.values() for _, size in life)


def steps(*moments: float) -> list[tuple[float, float]]:
    """The steps of an edge that begins one when it ends another."""
    return list(pairwise(moments))


def test_calm_is_when_all_make_steps_and_have_made_the_first_ones() -> None:
    early, late = steps(0, 5, 6, 7, 8, 9), steps(3, 4, 5, 6, 7, 11)
    assert common([early]) == [(6.0, 9.0)]
    assert common([early, late]) == [(6.0, 9.0)]
    assert common([late]) == [(5.0, 11.0)]
    assert common([early, steps(20, 21, 22, 23)]) == []  # one was done before the other began
    assert common([early, steps(0, 5, 6)]) == common([]) == []


def test_the_slowdown_is_the_time_of_steps_over_that_of_calm_ones() -> None:
    calm, deed = [(0.0, 10.0)], [(10.0, 20.0)]
    even, slower = steps(*range(0, 30, 2)), steps(0, 2, 4, 6, 8, 10, 13, 16, 19, 22)
    assert slowdown([even], calm, deed) == 1.0
    assert slowdown([slower], calm, deed) == pytest.approx(1.5)
    # A slow tenant beside a fast one is none that feels it: each is compared with itself.
    assert slowdown([even, steps(0, 5, 10, 15, 20)], calm, deed) == 1.0
    assert slowdown([even, slower], calm, deed) == pytest.approx(20 / (10 + 10 / 1.5))


def test_a_step_that_does_not_end_in_a_deed_counts_all_the_same() -> None:
    calm, deed = [(0.0, 10.0)], [(10.0, 20.0)]
    stalled = steps(0, 2, 4, 6, 8, 28, 30)  # begins before the deed, which is what holds it up
    assert slowdown([stalled], calm, deed) == pytest.approx(10.0)
    before = steps(-7, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20)  # what is not wholly in calm says nothing of it
    assert slowdown([before], calm, deed) == 1.0


def test_nobody_can_feel_what_is_not_compared() -> None:
    even = steps(*range(0, 30, 2))
    assert slowdown([], [(0.0, 10.0)], [(10.0, 20.0)]) is None
    assert slowdown([even], [], [(10.0, 20.0)]) is None
    assert slowdown([even], [(0.0, 1.0)], [(10.0, 20.0)]) is None  # no whole step
    assert slowdown([even], [(0.0, 10.0)], [(40.0, 50.0)]) is None
    assert slowdown([even, steps(12, 19)], [(0.0, 10.0)], [(10.0, 20.0)]) == 1.0  # no calm step: left out
