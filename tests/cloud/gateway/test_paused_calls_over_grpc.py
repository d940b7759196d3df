"""Calls with sites over real gRPC: those that have paused, and those that wait for their threads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import Channel, channel, channels, eventually, hidden
from support.models.tiny import HIDDEN

from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import Basis, Placement, SiteSpec
from isthmus.backbone.split.span import SpanInput
from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.cloud.gateway import calls as calls_module, server as server_module
from isthmus.cloud.gateway.stream import SealedStream
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import ConnectionLostError
from isthmus.edge.client.remote_span import ForwardRequest
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.tensor_codecs import Role, codec_id, encode


def allow_paused_calls(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that start after this let so many calls pause."""
    bounds = Bounds(engine=EngineOptions(paused_calls=limit))
    monkeypatch.setattr(server_module, "Bounds", lambda: bounds)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a server that starts after this, one call may have paused."""
    allow_paused_calls(1, monkeypatch)


@pytest.fixture
def one_call(cloud: Served, home: Home, one_thread: None) -> Iterator[ThreadServer]:
    """A server on which one call may have paused, so that one that is not over shows."""
    cloud.executor.cache.evict_all()  # a server that ended in a hurry leaves forward states
    with ThreadServer(cloud, home) as running:
        yield running


def begin(open_channel: Channel, call: int = 1, parts: tuple[str, ...] = ("mlp.down_proj",)) -> m.Message:
    """Begin a call with sites in the cloud's last layer; returns the cloud's question, or why there is none."""
    open_channel.ask(m.Sites(1, tuple(SiteSpec(3, part) for part in parts)), 5)
    payload = encode(hidden(), "fp32", Role.ACTIVATION)
    return open_channel.ask(m.Forward(m.CallId(1, call), True, payload, None, None, codec_id("fp32"), sites=1), 5)


def answered(open_channel: Channel, question: m.Message) -> m.Message:
    """Answer the question of `begin` with nothing added; returns what came of the call."""
    assert isinstance(question, m.SiteQuestion)
    nothing = encode(torch.zeros(2, 6, HIDDEN), "fp32", Role.ACTIVATION)
    return open_channel.ask(m.SiteAnswer(question.id, (nothing,)), 5)


@contextlib.contextmanager
def beside(work: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Something that is done on a thread of its own meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


def claimed(server: ThreadServer) -> int:
    """Calls that wait for a thread."""
    return len(server.server._calls._call_threads._waiting)


# An edge that does not answer -----------------------------------------------------------------------------------------


def test_an_edge_that_does_not_answer_a_question_is_ended(
    one_call: ThreadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls_module, "ANSWER_SECONDS", 0.2)
    with channels(one_call, 2) as (silent, other):
        assert isinstance(begin(silent), m.SiteQuestion)
        with pytest.raises(ConnectionLostError, match="rules were broken"):
            silent._stream.receive(20)
        eventually(lambda: one_call.server.status()["sessions"] == {"alice": 1})
        eventually(lambda: isinstance(begin(other), m.SiteQuestion))  # its thread is free again


def test_an_edge_that_says_something_else_than_the_answer_is_ended_as_well(
    one_call: ThreadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls_module, "ANSWER_SECONDS", 0.5)
    with channels(one_call, 1) as (chatty,):
        assert isinstance(begin(chatty), m.SiteQuestion)

        def chat() -> None:
            for nonce in range(100):
                chatty.ask(m.Ping(nonce), 20)
                time.sleep(0.1)

        with pytest.raises(ConnectionLostError):
            chat()
        eventually(lambda: one_call.server.status()["sessions"] == {})


def test_an_edge_that_vanishes_at_a_question_leaves_nothing_behind(one_call: ThreadServer, cloud: Served) -> None:
    with channels(one_call, 2) as (first, second):
        assert isinstance(begin(first), m.SiteQuestion)
        with beside(lambda: begin(second)) as waiting:
            eventually(lambda: claimed(one_call) == 1)
            assert not waiting.done()
            first.abandon()
            assert isinstance(waiting.result(10), m.SiteQuestion)
        assert one_call.server.status()["sessions"] == {"alice": 1}
        eventually(lambda: one_call.server.status()["in_flight"] == 0)  # a pause is the edge's time
    eventually(lambda: one_call.server.status()["sessions"] == {})
    eventually(lambda: cloud.executor.cache.used == 0)


@pytest.mark.usefixtures("one_thread")
def test_a_call_whose_answer_is_over_the_quota_is_over(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, quota=Quota(max_inflight_bytes=2000))
    with ThreadServer(cloud, home) as server, channels(server, 1) as (only,):
        for call in range(2):
            question = begin(only, call, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
            assert isinstance(question, m.SiteQuestion)
            contributions = [encode(torch.ones(2, 6, width), "fp32", Role.ACTIVATION) for width in (32, 16, 16)]
            said = only.ask(m.SiteAnswer(question.id, tuple(contributions)), 5)
            assert isinstance(said, m.Status)
            assert (said.code, said.id) == (m.StatusCode.OVER_QUOTA, m.CallId(1, call))


def test_a_call_that_takes_too_much_memory_to_pause_is_refused_and_its_session_goes_on(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud.executor, "compute_bytes", 1000)
    with ThreadServer(cloud, home) as server, channels(server, 1) as (only,):
        for call in range(2):
            said = begin(only, call)
            assert isinstance(said, m.Status)
            assert said.code == m.StatusCode.BAD_REQUEST
            assert "within 1000, half of it" in said.message
        assert claimed(server) == 0


# Threads --------------------------------------------------------------------------------------------------------------


def test_a_call_with_sites_waits_for_a_thread_and_is_answered_like_any_other(
    one_call: ThreadServer, cloud: Served
) -> None:
    bob = one_call.home.new_edge("bob")
    site = Site("model.layers.3.mlp.down_proj", SiteSpec(3, "mlp.down_proj"), torch.nn.Linear(64, HIDDEN))
    torch.nn.init.zeros_(site.module.weight)
    torch.nn.init.zeros_(site.module.bias)
    with channels(one_call, 1) as (first,), one_call.link(bob) as second:
        question = begin(first)
        second.open(5)
        request = ForwardRequest(SpanInput(hidden()), False, SiteCall([site], keep=False))
        with beside(lambda: second.span.forward(request)) as waiting:
            eventually(lambda: claimed(one_call) == 1)
            assert not waiting.done()
            assert isinstance(answered(first, question), m.ForwardReply)
            output, _ = waiting.result(10)
        assert torch.equal(output, cloud.executor.host.span(hidden()))
        assert second.traffic.retries == 0


def test_a_call_that_waits_for_a_thread_ends_with_its_session(one_call: ThreadServer) -> None:
    with channels(one_call, 3) as (first, second, third):
        question = begin(first)
        with beside(lambda: begin(second)) as gone:
            eventually(lambda: claimed(one_call) == 1)
            second.abandon()
            with pytest.raises(ConnectionLostError):
                gone.result(10)
        eventually(lambda: claimed(one_call) == 0)
        with beside(lambda: begin(third)) as waiting:
            eventually(lambda: claimed(one_call) == 1)
            assert isinstance(answered(first, question), m.ForwardReply)
            assert isinstance(waiting.result(10), m.SiteQuestion)


def test_a_session_whose_calls_have_paused_does_not_wait_for_a_thread(one_call: ThreadServer) -> None:
    """Else sessions that hold all threads could wait for each other's."""
    with channels(one_call, 1) as (only,):
        question = begin(only)
        refused = begin(only, 2)
        assert isinstance(refused, m.Status)
        assert "no thread is free, and 1 have paused" in refused.message
        assert isinstance(answered(only, question), m.ForwardReply)
        assert isinstance(begin(only, 2), m.SiteQuestion)


def test_a_refused_call_keeps_no_thread(one_call: ThreadServer) -> None:
    with channels(one_call, 2) as (first, second):
        payload = encode(hidden(), "fp32", Role.ACTIVATION)
        refused = first.ask(m.Forward(m.CallId(1, 1), True, payload, None, None, codec_id("fp32"), sites=9), 5)
        assert isinstance(refused, m.Status)
        assert isinstance(begin(second), m.SiteQuestion)


def test_a_tenant_with_many_calls_leaves_threads_to_the_others(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_paused_calls(2, monkeypatch)
    bob = home.new_edge("bob")
    with (
        ThreadServer(cloud, home) as server,
        channels(server, 2) as (first, second),
        channels(server, 1, bob) as (other,),
    ):
        question = begin(first)
        with beside(lambda: begin(second)) as waiting:
            eventually(lambda: claimed(server) == 1)
            assert isinstance(answered(other, begin(other)), m.ForwardReply)
            assert not waiting.done()
            assert isinstance(answered(first, question), m.ForwardReply)
            assert isinstance(waiting.result(10), m.SiteQuestion)


def test_others_have_their_turns_between_the_matrices_of_a_list(
    server: ThreadServer, cloud: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    begun, asked = threading.Event(), threading.Event()
    matrices, forward = SiteHost.matrices, type(cloud.executor).forward

    def slow(host: SiteHost, spec: SiteSpec) -> Any:
        order.append(spec.part)
        begun.set()
        assert asked.wait(10)
        return matrices(host, spec)

    def noted(*args: Any, **options: Any) -> Any:
        order.append("another's call")
        return forward(*args, **options)

    monkeypatch.setattr(SiteHost, "matrices", slow)
    monkeypatch.setattr(type(cloud.executor), "forward", noted)
    parts = ("self_attn.q_proj", "self_attn.k_proj")
    specs = tuple(SiteSpec(3, part, Placement.LOW_RANK, 16, basis=Basis.SVD) for part in parts)
    payload = encode(hidden(), "fp32", Role.ACTIVATION)
    plain = m.Forward(m.CallId(1, 1), False, payload, None, None, codec_id("fp32"))
    with channels(server, 2) as (first, second):
        with beside(lambda: first.ask(m.Sites(1, specs), 20)) as binding:
            assert begun.wait(10)
            with beside(lambda: second.ask(plain, 20)) as calling:
                eventually(lambda: server.server.status()["waiting"] == {"alice": 1})
                asked.set()
                assert isinstance(calling.result(10), m.ForwardReply)
            said = binding.result(10)
        assert isinstance(said, m.Status)
        assert said.code == m.StatusCode.OK
        assert order == [parts[0], "another's call", parts[1]]


# Draining -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_a_drain_answers_a_call_that_waits_for_a_thread(to_drain: ThreadServer) -> None:
    first, second = channel(to_drain), channel(to_drain, b"m" * 16)
    begin(first)
    with beside(lambda: begin(second)) as waiting:
        eventually(lambda: claimed(to_drain) == 1)
        assert to_drain.drain(20)
        assert isinstance(waiting.result(10), m.SiteQuestion)


@pytest.mark.usefixtures("one_thread")
def test_a_drain_does_not_wait_for_an_edge_that_has_been_asked(to_drain: ThreadServer) -> None:
    waiting = channel(to_drain)
    question = begin(waiting)
    assert isinstance(question, m.SiteQuestion)
    threads = to_drain.server._calls._call_threads
    assert not threads._free
    assert to_drain.drain(20)
    with pytest.raises(ConnectionLostError, match="draining"):
        waiting.ask(m.SiteAnswer(question.id, ()), 5)
    eventually(lambda: threads._free == 1)


@pytest.mark.usefixtures("one_thread")
def test_a_drain_ends_what_has_paused_though_its_session_is_slow_to_leave(
    to_drain: ThreadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "GOODBYE_SECONDS", 0.1)
    send = SealedStream.send

    async def slowly(stream: SealedStream, message: m.Message) -> None:
        await asyncio.sleep(60 if isinstance(message, m.Goodbye) else 0)
        await send(stream, message)

    monkeypatch.setattr(SealedStream, "send", slowly)
    assert isinstance(begin(channel(to_drain)), m.SiteQuestion)
    assert to_drain.drain(20)
    eventually(lambda: to_drain.server._calls._call_threads._free == 1)
