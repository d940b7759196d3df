"""What `isthmus cloud status` shows on a terminal: the cloud, and a line for each worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

MIB = 1 << 20


def view(status: Mapping[str, Any]) -> RenderableType:
    """The two tables of a status as `isthmus.cloud.state.read_status` returns it."""
    facts = Table("", "", show_header=False)
    for name, value in status.items():
        if name != "workers":
            facts.add_row(name.replace("_", " "), _tenants(value) if isinstance(value, dict) else str(value))
    workers = Table()
    for name in (
        "worker",
        "state",
        "address",
        "span",
        "sessions",
        "tokens/s",
        "waiting",
        "stash MiB",
        "calls MiB",
        "restarts",
    ):
        workers.add_column(name, no_wrap=name in ("state", "address", "span"))  # the others may be folded
    for worker in status["workers"]:
        stash = ""
        if "stash_bytes" in worker:
            stash = f"{worker['stash_bytes'] / MIB:.1f} of {worker['stash_budget_bytes'] / MIB:.0f}"
        workers.add_row(
            str(worker["worker"]),
            worker["state"],
            worker.get("address", ""),
            worker.get("span", ""),
            _tenants(worker.get("sessions", {})),
            f"{worker['tokens_per_s']:.0f}" if "tokens_per_s" in worker else "",
            str(worker.get("queue_depth", "")),
            stash,
            f"{worker['compute_budget_bytes'] / MIB:.0f}" if worker.get("compute_budget_bytes") else "",
            str(worker["restarts"]),
        )
    return Group(facts, workers)


def _tenants(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{tenant} {count}" for tenant, count in sorted(counts.items())) or "-"
