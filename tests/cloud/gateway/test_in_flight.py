"""Bytes in flight: a tenant's calls have room beside each other in the order in which they came."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import channel, eventually, hidden
from support.models.tiny import HIDDEN
from support.protocol.wire import TENANT

from isthmus.cloud.directory import Peer, SessionEntry
from isthmus.cloud.engine.requests import TooLate
from isthmus.cloud.gateway.in_flight import InFlight
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import OverQuotaError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.secure.record import Opener
from isthmus.protocol.session import Received
from isthmus.protocol.tensor_codecs import Role, codec_id, encode

OF_100 = replace(TENANT, quota=Quota(max_inflight_bytes=100))


class Crowd:
    """Calls of which each holds its room until it is ended."""

    def __init__(self) -> None:
        self.in_flight = InFlight(lambda _: 1.0)
        self.begun: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}

    async def call(self, name: str, size: int, patience: float | None = None) -> None:
        self._ends[name] = asyncio.Event()
        async with self.in_flight.room_for(OF_100, bytearray(size), patience):
            self.begun.append(name)
            await self._ends[name].wait()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_small_call_does_not_pass_a_large_one_that_waits() -> None:
    async def run() -> None:
        crowd = Crowd()
        calls = [asyncio.create_task(crowd.call(*each)) for each in (("first", 60), ("large", 90), ("small", 10))]
        await settled()
        assert crowd.begun == ["first"]
        await crowd.end("first")
        assert crowd.begun == ["first", "large", "small"]
        for name in ("large", "small"):
            await crowd.end(name)
        await asyncio.gather(*calls)

    asyncio.run(run())


def test_one_that_is_given_up_leaves_its_place_to_the_next() -> None:
    async def run() -> None:
        crowd = Crowd()
        first, large, late, small = (
            asyncio.create_task(crowd.call(*each))
            for each in (("first", 60), ("large", 90), ("late", 90, 0.01), ("small", 10))
        )
        await settled()
        large.cancel()
        with pytest.raises(TooLate):
            await late
        await settled()
        assert crowd.begun == ["first", "small"]
        for name in crowd.begun.copy():
            await crowd.end(name)
        await asyncio.gather(first, small)

    asyncio.run(run())


# Over real gRPC -------------------------------------------------------------------------------------------------------


def test_a_call_over_the_byte_quota_is_refused_and_the_session_goes_on(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, quota=Quota(max_inflight_bytes=2000))
    with ThreadServer(cloud, home) as server, server.link() as link:
        link.open(5)
        with pytest.raises(OverQuotaError, match="2000 that alice may have"):
            link.forward_span(hidden(4, 20), None, None, keep=False)
        assert link.forward_span(hidden(1, 4), None, None, keep=False)[0].shape == (1, 4, HIDDEN)
        assert link.traffic.sessions == 1


def test_of_a_call_over_the_byte_quota_nothing_is_kept_while_it_comes(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers: list[Opener] = []
    create = Opener.__init__

    def record(opener: Opener, *args: Any) -> None:
        create(opener, *args)
        if threading.current_thread().name == "test-server":
            openers.append(opener)

    with ThreadServer(cloud, Home(tmp_path, quota=Quota(max_inflight_bytes=2000))) as server:
        with monkeypatch.context() as patched:
            patched.setattr(Opener, "__init__", record)
            edge = channel(server)
        (opener,) = openers
        payload = encode(torch.zeros(256, 128, HIDDEN), "fp32", Role.ACTIVATION)  # four chunks
        large = m.Forward(m.CallId(1, 1), False, payload, None, None, codec_id("fp32"))
        *first, last = edge._session.send(large)
        for count, frame in enumerate(first, 1):
            edge._stream.send(frame)
            eventually(lambda count=count: (under_way := opener._message) is not None and under_way.chunk == count)
            assert opener._message is not None
            assert len(opener._message.body) <= 2000
        edge._stream.send(last)
        said = edge._session.receive(edge._stream.receive(20))
        assert isinstance(said, Received)
        assert isinstance(said.message, m.Status)
        assert (said.message.code, said.message.id) == (m.StatusCode.OVER_QUOTA, large.id)
        small = encode(torch.zeros(1, 4, HIDDEN), "fp32", Role.ACTIVATION)
        answer = edge.ask(m.Forward(m.CallId(1, 2), False, small, None, None, codec_id("fp32")), 20)
        assert isinstance(answer, m.ForwardReply)
        edge.close()
        assert b'isthmus_refused_total{status="OVER_QUOTA"} 1.0' in server.server.metrics.text()


def test_calls_that_exceed_the_byte_quota_together_wait_for_each_other(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = hidden().nbytes + 64
    entered, release = threading.Event(), threading.Event()
    original = type(cloud.executor).forward

    def slow(*args: Any, **options: Any) -> torch.Tensor:
        entered.set()
        release.wait(20)
        return original(*args, **options)

    monkeypatch.setattr(type(cloud.executor), "forward", slow)
    home = Home(tmp_path, quota=Quota(max_inflight_bytes=quota))
    answers: list[torch.Tensor] = []
    with ThreadServer(cloud, home) as server, server.link() as first, server.link() as second:

        def call(link: Any) -> None:
            answers.append(link.forward_span(hidden(), None, None, keep=False)[0])

        threads = [threading.Thread(target=call, args=(link,)) for link in (first, second)]
        for link in (first, second):
            link.open(5)
        for thread in threads:
            thread.start()
        assert entered.wait(10)
        eventually(lambda: server.server.status()["in_flight"] == 2)
        eventually(lambda: server.server._calls.in_flight._rooms["alice"].turn.locked())
        assert server.server._calls.in_flight._rooms["alice"].nbytes <= quota
        release.set()
        for thread in threads:
            thread.join(10)
    assert len(answers) == 2
    assert torch.equal(answers[0], answers[1])


def test_of_a_tenants_quotas_a_worker_gives_the_fraction_of_the_sessions_that_it_has(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    original = type(cloud.executor).forward

    def slow(*args: Any, **options: Any) -> torch.Tensor:
        release.wait(20)
        return original(*args, **options)

    monkeypatch.setattr(type(cloud.executor), "forward", slow)
    quota = Quota(max_inflight_bytes=5 * hidden().nbytes // 2, max_tokens_per_second=900)  # two calls at a time
    with ThreadServer(cloud, Home(tmp_path, quota=quota)) as server, server.link() as first, server.link() as second:
        for link in (first, second):
            link.open(5)
        tenant = next(iter(server.server.sessions._open.values())).tenant
        assert server.server._calls.share(tenant).positions_per_second == 900
        seats = (SessionEntry(str(tenant.fingerprint), "a link", 1.0), SessionEntry("somebody else's", "another", 2.0))
        server.server.sessions.take_report("here:1", (Peer("there:1", "serving", seats), Peer("gone:1", "draining")))
        assert server.server._calls.share(tenant).positions_per_second == pytest.approx(600)
        threads = [
            threading.Thread(target=link.forward_span, args=(hidden(), None, None), kwargs={"keep": False})
            for link in (first, second)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: server.server.status()["in_flight"] == 2)
        eventually(lambda: server.server._calls.in_flight._rooms["alice"].turn.locked())  # 5/3 calls fit this worker
        release.set()
        for thread in threads:
            thread.join(20)
        eventually(lambda: server.server.status()["in_flight"] == 0)
