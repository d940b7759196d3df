"""Edges that train on one worker, in simulated time: what each gets, with and without one that floods."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.experiments.harness.bench_settings import SchedulerSettings
from isthmus.experiments.serving.scheduler_bench import closed_loop, open_loop
from isthmus.experiments.serving.scheduler_policies import POLICIES, SHIPPED, TEXTBOOK

SETTINGS = SchedulerSettings(seeds=3, steps=16, loads="0.8,1.2", seconds=40.0)
BY_NAME = {policy.name: policy for policy in POLICIES}


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    """What is found of the scheduler as it is, in simulated time."""
    return closed_loop(SHIPPED, SETTINGS)


def test_a_crowd_has_nearly_all_that_is_possible_and_a_flood_costs_the_others_little(shipped: dict[str, Any]) -> None:
    assert shipped["throughput_over_bound"] >= 0.85
    assert min(shipped["throughput_of_2_over_bound"], shipped["throughput_of_4_over_bound"]) >= 0.8
    assert shipped["jain"] >= 0.95
    assert shipped["state_share"] <= 1.0
    assert shipped["flood_p99_ratio"] <= 1.25, shipped["flood"]


@pytest.mark.parametrize(
    ("without", "figure", "worse"),
    [
        ("shipped, no waiting for partners", "throughput_over_bound", lambda with_, without: without < 0.97 * with_),
        ("shipped, no even parts", "throughput_of_4_over_bound", lambda with_, without: without < 0.97 * with_),
        ("shipped, no pacing", "flood_p99_ratio", lambda _, without: without > 1.25),
        ("shipped, no limit of states", "state_share", lambda _, without: without > 1.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_mechanism_is_needed(shipped: dict[str, Any], without: str, figure: str, worse: object) -> None:
    assert callable(worse)
    assert worse(shipped[figure], closed_loop(BY_NAME[without], SETTINGS)[figure])


def test_deadlines_are_kept_far_better_than_by_the_textbooks_scheduler_and_not_without_pacing() -> None:
    shipped, textbook, control = (
        open_loop(policy, SETTINGS)["missed"] for policy in (SHIPPED, TEXTBOOK, BY_NAME["shipped, no pacing"])
    )
    assert shipped <= textbook / 2 < control
