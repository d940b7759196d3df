"""Arrivals, percentiles, and a whole run on a tiny model."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest
from support.models.tiny import tiny_checkpoint
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.common.errors import ConfigError
from isthmus.experiments.harness.bench_settings import QosSettings
from isthmus.experiments.serving.qos_bench import ARRIVALS, arrivals
from isthmus.experiments.serving.tenants_crowd import percentile


@pytest.mark.parametrize("kind", ARRIVALS)
def test_calls_come_at_the_rate_that_is_asked_for(kind: str) -> None:
    settings = QosSettings("tiny", seconds=2000.0, interactive_share=0.25)
    calls = list(arrivals(settings, kind, 5.0))
    assert len(calls) == pytest.approx(10_000, rel=0.1)
    assert statistics.mean(call.interactive for call in calls) == pytest.approx(0.25, abs=0.03)
    assert {call.tenant for call in calls} == set(range(settings.tenants))
    gaps = [after.at - before.at for before, after in itertools.pairwise(calls)]
    variation = statistics.stdev(gaps) / statistics.mean(gaps)
    assert variation == pytest.approx(1.0 if kind == "poisson" else 2.0, rel=0.15)
    assert calls == list(arrivals(settings, kind, 5.0))


def test_percentiles() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert percentile(values, 0.5) == 50.0
    assert percentile(values, 0.99) == 99.0
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([], 0.5) is None


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_leaves_nothing_to_compare_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="leaves nothing to compare"):
        QosSettings(interactive_share=share)


@pytest.mark.long
def test_a_whole_run(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    options = ["--edge-layers", "1:1", "--seconds", "1", "--loads", "3", "--threads", "1", "--rounds", "1"]
    result = CliRunner().invoke(app, ["bench", "qos", "--model", str(model), *options, "--json"])
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert {(run["arrivals"], run["load"], run["policy"]) for run in runs} == set(
        itertools.product(ARRIVALS, (3.0,), ("scheduler", "textbook"))
    )
    for run in runs:
        assert run["throughput"] > 0
        assert 0 <= run["missed"] <= 1
        assert run["p50_s"] is None or run["p50_s"] <= run["p99_s"]
