"""What `isthmus bench qos` measures, from the flags, and how it is printed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from isthmus.common.machine import usable_cores
from isthmus.experiments.harness.bench_flags import numbers_of
from isthmus.experiments.harness.bench_settings import QosFlags
from isthmus.experiments.serving.qos_bench import QosSettings, run_qos


def run(flags: QosFlags) -> dict[str, Any]:
    """Measure. Raises ConfigError where the flags leave nothing to compare."""
    read = {"loads": numbers_of(flags.loads, "loads"), "threads": flags.threads or usable_cores()}
    return run_qos(QosSettings(**{**asdict(flags), **read}))


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    for row in result["runs"]:
        p50, p99 = (f"{row[name]:.3f}" if row[name] is not None else "-" for name in ("p50_s", "p99_s"))
        print(
            f"{row['arrivals']:8} load {row['load']:4.2f}  {row['policy']:9}  {row['throughput']:7.0f} positions/s   "
            f"interactive: median {p50} s, 99 % within {p99} s, missed {row['missed']:.1%}"
        )
