"""The table of schedulers, and the simulated cloud that it is made with."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.cloud.engine.batching import SchedulerLimits
from isthmus.experiments.serving.scheduler_bench import REAL_OPTIONS
from isthmus.experiments.serving.scheduler_policies import POLICIES, SHIPPED
from isthmus.experiments.serving.simulated_cloud import (
    BACKWARD,
    KEPT_FORWARD,
    OWN_SECONDS,
    PASS_SECONDS,
    POSITION_SECONDS,
    SimulatedCloud,
)

SHORT = ("--seeds", "2", "--steps", "2", "--loads", "1", "--seconds", "3")


def test_one_edge_alone_takes_what_its_step_takes() -> None:
    cloud = SimulatedCloud(0, SHIPPED.scheduler(), 1, 1)
    cloud.train("a", 64)
    cloud.run_steps(10)
    expected = PASS_SECONDS + 64 * (POSITION_SECONDS + OWN_SECONDS)
    assert sum(cloud.steps(10)) == pytest.approx(10 * expected, rel=0.05)


def test_a_backward_without_those_of_its_forward_costs_more() -> None:
    unlimited = replace(SHIPPED, limits=SchedulerLimits(compute_threads=1))

    def seconds(sessions: int) -> float:
        """Of the backwards of so many of eight sessions whose forwards had a pass together."""
        cloud, done = SimulatedCloud(0, unlimited.scheduler(), 1, 1), []
        for session in range(8):
            cloud.call(f"tenant {session}", 0, 64, KEPT_FORWARD, lambda: None)
        cloud.run_until(5.0)
        since = cloud.now
        for session in range(sessions):
            cloud.call(f"tenant {session}", 0, 64, BACKWARD, lambda: done.append(cloud.now))
        cloud.run_until(30.0)
        return max(done) - since

    assert seconds(5) == pytest.approx(seconds(8), rel=0.15)
    assert seconds(2) > 1.3 * seconds(8) * 2 / 8


def test_the_table_has_a_row_for_each_scheduler() -> None:
    result = CliRunner().invoke(app, ["bench", "scheduler", *SHORT])
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(POLICIES)
    assert len({line.count("|") for line in rows}) == 1
    figures = json.loads(CliRunner().invoke(app, ["bench", "scheduler", *SHORT, "--json"]).stdout)
    assert [row["policy"] for row in figures["rows"]] == [policy.name for policy in POLICIES]
    for row in figures["rows"]:
        assert 0 < row["throughput_over_bound"] < 1
        assert 0 <= row["missed"] <= 1
    assert "real" not in figures


def test_every_option_of_a_real_run_is_one_of_serve() -> None:
    known = CliRunner().invoke(app, ["cloud", "serve", "--help"], env={"COLUMNS": "200"}).stdout
    for options in REAL_OPTIONS.values():
        assert all(option in known for option in options if option.startswith("--"))
