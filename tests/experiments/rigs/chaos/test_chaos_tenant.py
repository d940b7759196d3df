"""What a tenant of the benchmark of chaos notes of its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.experiments.rigs.chaos import chaos_tenant
from isthmus.experiments.rigs.chaos.chaos_tenant import Tenant
from isthmus.experiments.rigs.faults.fault_plan import Moment

STEPS = (0, 1, 1, 2, 2, 3, 3)


class Edge:
    """One that is at `STEPS` a second after the other."""

    def __init__(self, task: dict[str, Any], log: Path) -> None:
        self.now = 100.0
        self.seen: list[tuple[bool, bool]] = []  # whether the tenant trained, and in its first half
        self.tenant: Any = None

    def moments(self) -> Iterator[Moment]:
        for step in STEPS:
            self.now += 1
            yield Moment("forward", "idle", step, 0, 0)
            self.seen.append((self.tenant.training, self.tenant.early))

    def finish(self) -> None:
        self.now += 50

    def __enter__(self) -> Edge:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_step_lasts_until_the_next_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = Edge({}, tmp_path)
    monkeypatch.setattr(chaos_tenant, "Edge", lambda task, log: edge)
    # its own name for the module: another thread's event loop that saw this clock would sleep for hours
    monkeypatch.setattr(chaos_tenant, "time", SimpleNamespace(monotonic=lambda: edge.now))
    tenant = Tenant("tenant", {"steps": 3}, tmp_path, contextlib.nullcontext)
    edge.tenant = tenant
    assert tenant._one_life({})
    assert edge.seen == [(False, False), *[(True, True)] * 2, *[(True, False)] * 4]
    assert tenant.steps == [(102.0, 104.0), (104.0, 106.0)]  # the last one ended somewhere before the process did
    assert [step.at for step in tenant.finished] == [104.0, 106.0, 157.0]


def test_an_edge_that_has_trained_to_the_end_is_not_killed_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge, killed = Edge({}, tmp_path), []
    monkeypatch.setattr(chaos_tenant, "Edge", lambda task, log: edge)
    monkeypatch.setattr(edge, "kill", lambda: killed.append(True), raising=False)
    edge.tenant = tenant = Tenant("tenant", {"steps": 3}, tmp_path, contextlib.nullcontext)
    monkeypatch.setattr(edge, "finish", tenant.kill_edge)
    assert tenant._one_life({})
    assert killed == []
