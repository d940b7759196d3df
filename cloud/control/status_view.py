"""`isthmus cloud status` on a terminal: facts about the cloud, and a line for each worker, in 80 columns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from isthmus.cloud.home.expiry import expiry
from isthmus.common.readable import date, labelled, period, size

FOLDED = ("address", "sessions")
"""Columns of the workers' table whose text may take several lines; the others are as wide as their text."""


def view(status: Mapping[str, Any], now: float | None = None) -> RenderableType:
    """The two tables of a status as `isthmus.cloud.control.serve_state.read_status` returns it.

    Args:
        status: what to show.
        now: Unix seconds, for the days until the certificate expires; the present by default.
    """
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(status, time.time() if now is None else now):
        facts.add_row(name, Text(text))  # of an IPv6 address, the brackets would be taken for markup
    workers = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("#", "state", "address", "span", "sessions", "tokens/s", "queue", "stash", "restarts"):
        workers.add_column(name, no_wrap=name not in FOLDED, overflow="fold")
    for worker in status["workers"]:
        cells = (
            str(worker["worker"]),
            worker["state"],
            worker.get("address", "") or worker.get("node", ""),
            worker.get("span", ""),
            _tenants(worker.get("sessions", {})),
            f"{worker['tokens_per_s']:.0f}" if "tokens_per_s" in worker else "",
            str(worker.get("queue_depth", "")),
            size(worker["stash_bytes"]) if "stash_bytes" in worker else "",
            str(worker["restarts"]),
        )
        workers.add_row(*map(Text, cells))
    return Group(facts, Padding(workers, (1, 0, 0, 0), expand=False))


def _facts(status: Mapping[str, Any], now: float) -> Iterator[tuple[str, str]]:
    """Names and values for people; a key that is not known here is shown as it is."""
    for name, value in status.items():
        if name in ("workers", "stash_budget_bytes", "cache_budget_bytes"):
            continue
        if isinstance(value, Mapping):
            yield name.replace("_", " "), _tenants(value)
        elif name == "uptime_s":
            yield "up for", period(value)
        elif name == "certificate_not_after":
            own = "renewed_until" in status  # a cluster's are renewed by themselves, as long as the issuer's lasts
            yield "certificate", f"expires on {date(value)}" if own else expiry(value, now)
        elif name == "renewed_until":
            yield "renewed until", "nobody knows" if value is None else date(value)
        elif name == "faults":
            yield "to mend", "; ".join(value)
        elif name == "stash_bytes" and "stash_budget_bytes" in status:
            yield "stash", f"{size(value)} of {size(status['stash_budget_bytes'])}"
        elif name == "cache_bytes" and "cache_budget_bytes" in status:
            yield "keys and values", f"{size(value)} of {size(status['cache_budget_bytes'])}"
        elif name == "span_bytes":
            yield "span's weights", size(value)
        elif name == "tokens_per_s":
            yield "tokens/s", f"{value:.0f}"
        elif name == "deadlines_missed":
            yield "deadlines missed", f"{value:.1%}"
        else:
            yield labelled(name, value)


def _tenants(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{tenant} {count}" for tenant, count in sorted(counts.items())) or "-"
