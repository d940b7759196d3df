"""What `isthmus bench tenants` measures, from the flags."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from isthmus.common.machine import usable_cores
from isthmus.experiments.harness.bench_settings import TenantsFlags
from isthmus.experiments.serving.tenants_bench import draw_growth, run_tenants
from isthmus.experiments.serving.tenants_crowd import TenantSettings


def run(flags: TenantsFlags, folder: Path) -> dict[str, Any]:
    """Measure, and draw the figure if it is asked for."""
    given = asdict(flags) | {"threads": flags.threads or usable_cores(), "batching": flags.batching == "on"}
    figure, n = given.pop("figure"), flags.n
    counts = sorted({n, *(2**power for power in range(n.bit_length()) if 2**power <= n)}) if figure else ()
    result = run_tenants(TenantSettings(**given, counts=tuple(counts)), folder)
    if figure is not None:
        draw_growth(result["growth"], figure)
    return result
