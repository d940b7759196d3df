"""The attacks on the cost of calls, against a tiny cloud on a thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support.cloud.clouds import Home, ThreadServer, served
from support.cloud.sessions import eventually
from support.models.tiny import HIDDEN, tiny_checkpoint

from isthmus.backbone.decoding.key_values import cache_bytes
from isthmus.cloud.decoding.cache_pool import CachePool
from isthmus.common.errors import IsthmusError, RefusedError
from isthmus.experiments.harness.blocking_stream import NothingYetError
from isthmus.experiments.rigs.abuse import decode_costs
from isthmus.experiments.rigs.abuse.abuse_bench import rows
from isthmus.experiments.rigs.abuse.attacks import ATTACKS
from isthmus.experiments.rigs.abuse.ceilings import CEILINGS
from isthmus.experiments.rigs.abuse.costs import COMPUTED, COSTS, opened
from isthmus.experiments.rigs.abuse.decode_costs import SEQUENCES, single_tokens
from isthmus.experiments.rigs.abuse.gauge import Taken
from isthmus.experiments.rigs.abuse.honest import Honest
from isthmus.experiments.rigs.hostile_tenants import Session
from isthmus.protocol import messages as m

LONGEST = 128
"""Positions of the tiny model's sequences."""
SECONDS = 0.5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    folder = tmp_path_factory.mktemp("costs")
    cloud = served(tiny_checkpoint("llama", folder / "model"), folder / "parts", max_tokens=1 << 15)
    home = Home(folder)
    home.new_edge("bob")
    with ThreadServer(cloud, home) as running:
        yield running


@pytest.mark.parametrize("deed", COSTS)
def test_a_deed_is_answered_and_another_tenant_goes_on(
    server: ThreadServer, deed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, used = server.home.key_file, list[int]()
    pool, acquire = server.server._calls.caches, CachePool.acquire
    eventually(lambda: not len(pool))  # the deed before has left its session
    one = cache_bytes(server.served.executor.host.span, 1, LONGEST)
    pool.budget = (SEQUENCES if deed == "wild_rows" else 2) * one

    def noting(pool: CachePool, wanted: Any) -> list[int]:
        admitted = acquire(pool, wanted)
        used.append(pool.used)
        return admitted

    monkeypatch.setattr(CachePool, "acquire", noting)
    monkeypatch.setattr(decode_costs, "LONGEST", SEQUENCES * LONGEST // 2)  # tokens come after the prompts
    evicted = pool.counters.evicted
    with Honest(server.address, key.parent / "bob") as honest, opened(server.address, key) as session:
        begun = time.monotonic()
        found = COSTS[deed](session, SECONDS)
        assert honest.latency_s(begun) > 0  # it raises where calls fail or none are answered
        assert (session.computed > 0) == (deed in COMPUTED)
    match deed:
        case "long_call":
            assert isinstance(found, m.Status)
            assert "16384 tokens is longer than the 128" in found.message
        case "large_call":
            assert isinstance(found, m.ForwardReply)
        case "many_caches":
            assert isinstance(found, m.ForwardReply)
            assert max(used) == pool.budget
            assert pool.counters.evicted > evicted
        case "long_prompt" | "single_tokens":
            assert isinstance(found, m.ForwardReply)
            assert max(used) == one
        case "wild_rows":
            assert isinstance(found, m.ForwardReply) or "longer than the 128" in found.message
            assert max(used) == pool.budget


def test_single_tokens_attend_in_calls_of_any_length_where_exact_ones_are_refused() -> None:
    asked: list[m.Decode] = []

    def ask(message: m.Decode, _seconds: float) -> m.Message:
        asked.append(message)
        if message.blocks or message.hidden.shape[1] > LONGEST:
            return m.Status(m.StatusCode.BAD_REQUEST, message.id, "refused")
        return m.ForwardReply(message.id, message.hidden, 0, 0, 0)

    limits = SimpleNamespace(max_tokens_per_call=1 << 15)
    session: Any = SimpleNamespace(ask=ask, info=SimpleNamespace(hidden_size=HIDDEN, limits=limits))
    assert isinstance(single_tokens(session, 0.1), m.ForwardReply)
    assert any(message.blocks for message in asked)  # they were tried
    assert (asked[-1].hidden.shape[1], asked[-1].blocks) == (LONGEST, ())


@pytest.mark.parametrize(("room", "is_made"), [(1 << 30, True), (1, False)])
def test_an_attack_of_which_the_cloud_computes_nothing_was_not_made(
    server: ThreadServer, room: int, is_made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.server._calls.caches, "budget", room)
    computed = ATTACKS["long_prompt"].run(server.address, server.home.key_file, SECONDS)
    assert (computed > 0) == is_made
    assert {row["held"] for row in rows(Taken(0, 0, 0), CEILINGS["long_prompt"], computed)} == {is_made}


@pytest.mark.parametrize("error", [NothingYetError, RefusedError])
def test_a_session_that_does_not_come_about_is_closed(
    server: ThreadServer, error: type[IsthmusError], monkeypatch: pytest.MonkeyPatch
) -> None:
    eventually(lambda: not server.server.status()["sessions"])

    def unanswered(session: Session, message: m.Message) -> m.Message:
        session.send(message)
        eventually(lambda: server.server.status()["sessions"])
        raise error("")

    monkeypatch.setattr(Session, "ask", unanswered)
    with pytest.raises(error), opened(server.address, server.home.key_file):
        pass
    eventually(lambda: not server.server.status()["sessions"])
