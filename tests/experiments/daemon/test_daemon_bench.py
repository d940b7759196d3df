"""What is said of a daemon under load, of runs that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.experiments.daemon.daemon_bench import UNDISTURBED, Run, figures, show
from isthmus.experiments.harness.bench_settings import DaemonSettings


def run(case: str = UNDISTURBED, tokens_per_s: float = 100.0, adapter: str = "a", **statuses: int) -> Run:
    counted = {name.removeprefix("s"): count for name, count in statuses.items()}
    load = {"statuses": counted, "closed": 3, "timeouts": 1, "most_open": 200, "cpu_s": 2.5}
    probes = [0.001 * number for number in range(1, 102)]
    return Run(case, {} if case == UNDISTURBED else load, probes, 4096, 1.5, tokens_per_s, adapter)


def of(*runs: Run) -> dict[str, Any]:
    return figures(runs, DaemonSettings())


def test_a_case_is_compared_with_the_runs_beside_it() -> None:
    runs = [run(), run("slow", 99.0, s200=5, s403=2), run(tokens_per_s=120.0), run("tokens", 60.0), run()]
    result = of(*runs)
    slow, tokens = result["runs"]
    assert slow == {
        "case": "slow",
        "requests": 11,
        "errors_5xx": 0,
        "statuses": {"200": 5, "403": 2},
        "closed": 3,
        "timeouts": 1,
        "most_open": 200,
        "p50_s": pytest.approx(0.051),
        "p99_s": pytest.approx(0.1),
        "rss_growth_bytes": 4096,
        "daemon_cpu_s": 1.5,
        "clients_cpu_s": 2.5,
        "job_throughput_ratio": pytest.approx(0.9),
    }
    assert (tokens["case"], tokens["requests"]) == ("tokens", 4)
    assert tokens["job_throughput_ratio"] == pytest.approx(60 / 110)
    assert (result["adapters_identical"], result["no_errors_5xx"]) == (True, True)
    assert result["undisturbed_tokens_per_s"] == [100.0, 120.0, 100.0]


def test_an_adapter_that_differs_and_an_error_of_the_daemon_are_told() -> None:
    result = of(run(), run("slow", adapter="b", s200=1), run(), run("bodies", s500=2, s503=1, s413=9), run())
    assert (result["adapters_identical"], result["no_errors_5xx"]) == (False, False)
    assert [row["errors_5xx"] for row in result["runs"]] == [0, 3]


def test_a_line_says_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    show(of(run(), run("polling", 97.0, s200=1500), run()))
    head, line, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["case", "requests", "errors_5xx", "closed", "timeouts", "most_open", "p99", "memory", "job"]
    assert line.split() == ["polling", "1504", "0", "3", "1", "200", "0.100", "s", "4.0", "KiB", "0.97x"]
    assert last == "adapters identical: True"
