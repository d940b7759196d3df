"""The link benchmark: its arithmetic, its clock, and one whole run on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.edge.run_report import WireTotals
from isthmus.experiments.harness.rig_settings import LinkSettings
from isthmus.experiments.network.delay_relay import Conditions
from isthmus.experiments.network.net_space import NetSpace, missing
from isthmus.experiments.rigs.network import link_bench
from isthmus.experiments.rigs.network.link_bench import (
    Measured,
    StepClock,
    Way,
    figures,
    measure_way,
    run_link,
)

namespaces = pytest.mark.skipif(missing() is not None, reason=f"network namespaces: {missing()}")

WAY = Way(rate_bps=8e6, rtt_s=0.05, congestion_control="cubic")
# Two steps, each of 8 calls that carry 1 MB up and 0.5 MB down.
SPENT = WireTotals(bytes_up=2_000_000, bytes_down=1_000_000, calls=16, wire_s=0.2, crypto_s=0.1, cloud_s=3.0)


class Link:
    """What a `StepClock` sees of a link."""

    step = 0
    calls = 0

    def totals(self) -> WireTotals:
        return WireTotals(bytes_up=100 * self.calls, calls=self.calls)


def test_a_slow_wire_is_the_bound() -> None:
    free, alone = Measured((1.6, 1.8), SPENT), Measured((3.4, 3.8), SPENT)
    result = figures(WAY, free, alone, Measured((1.9, 1.9), SPENT))
    assert result["computation_s"] == pytest.approx(1.7)
    assert result["wire_s"] == pytest.approx(1.5 + 8 * 0.05)
    assert result["step_over_bound"] == pytest.approx(1.0)
    assert result["step_over_bound_no_overlap"] == pytest.approx(3.6 / 1.9)
    assert (result["step_s"], result["step_s_no_overlap"]) == (pytest.approx(1.9), pytest.approx(3.6))
    assert (result["bytes_per_step"], result["round_trips"]) == (1_500_000, 8)
    # Of 1.7 s, the cloud has 1.5 and the loopback 0.1: the edge has what is left, and nobody is busier than the cloud.
    assert result["edge_computation_s"] == pytest.approx(0.1)
    assert result["floor_s"] == pytest.approx(1.5)
    assert result["step_over_floor"] == pytest.approx(1.9 / 1.5)


def test_a_fast_wire_leaves_computing_as_the_bound() -> None:
    runs = (Measured((seconds,), SPENT) for seconds in (4.0, 6.0, 4.4))
    result = figures(replace(WAY, rate_bps=1e9), *runs)
    assert result["step_over_bound"] == pytest.approx(1.1)
    assert result["step_over_bound_no_overlap"] == pytest.approx(1.5)


def test_one_slow_step_does_not_change_the_median_and_retries_are_told() -> None:
    run = Measured((1.0, 9.0, 1.1), replace(SPENT, retries=2))
    result = figures(WAY, run, run, run)
    assert result["computation_s"] == 1.1
    assert result["retries"] == 6


def test_the_clock_counts_from_first_question_to_first_question(monkeypatch: pytest.MonkeyPatch) -> None:
    observed, now = Link(), [0.0]
    monkeypatch.setattr(link_bench.time, "perf_counter", lambda: now[0])
    clock = StepClock(observed)
    clock("fetch", "sending")  # before the first step
    for step, pause in ((1, 5.0), (2, 2.0), (3, 3.0), (4, 7.0)):
        observed.step = step
        for question in ("forward", "backward"):
            clock(question, "sending")
            observed.calls += 1
            now[0] += pause / 2
            clock(question, "idle")
    assert clock.measured(skip=1) == Measured((2.0, 3.0), WireTotals(bytes_up=400, calls=4))


@pytest.mark.parametrize(("overlap", "micro_batches"), [(1, 4), (5, 4)])
def test_an_overlap_that_does_not_fit_is_refused(overlap: int, micro_batches: int) -> None:
    with pytest.raises(ConfigError, match=f"^{overlap} micro-batches in flight do not fit {micro_batches} of a step"):
        LinkSettings(overlap=overlap, micro_batches=micro_batches)


def test_what_is_no_rate_and_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'fast' is not a rate"):
        run_link(LinkSettings(rate="fast"), tmp_path)
    with pytest.raises(ConfigError, match="'far' is not a length of time"):
        run_link(LinkSettings(rtt="far"), tmp_path)


@namespaces
def test_the_way_is_measured() -> None:
    with NetSpace(20_000_000, Conditions(0.02)) as space:
        way = measure_way(space)
    assert way.rtt_s >= 0.02  # no machine is too fast for that
    assert way.rate_bps > 0
    assert way.congestion_control.isalnum()


@pytest.mark.long
@namespaces
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_whole_run(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "tiny")
    settings = LinkSettings("50mbit", "10ms", str(model), "1:1", batch=1, seq=32, micro_batches=2, overlap=2, steps=1)
    result = run_link(settings, tmp_path)
    assert result["round_trips"] == 2 * 2  # of two micro-batches: a forward and a backward each
    payload = 32 * 32 * 4  # positions, hidden size, bytes of fp32
    for direction in ("up", "down"):
        assert 4 * payload < result[f"bytes_per_step_{direction}"] < 1.1 * 4 * payload
    assert result["retries"] == 0
    assert result["step_s_no_overlap"] > 4 * 0.01  # four round trips, one after the other
    assert result["floor_s"] > 0
    assert result["step_over_bound"] == pytest.approx(result["step_s"] / max(result["computation_s"], result["wire_s"]))
