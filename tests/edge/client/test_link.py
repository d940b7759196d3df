"""The link over a transport in memory: what its calls give and count, what it refuses, and whom it talks to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.cloud.clouds import with_info
from support.cloud.memory_cloud import MemoryCloud, MemoryTransport, StillTime, comes_back, messages, new_link
from support.cloud.span_calls import MASK, POSITIONS, hidden, three_calls
from support.models.tiny import HIDDEN
from support.protocol.wire import EDGE, PIN

from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import (
    CheckpointError,
    CloudFailedError,
    ConfigError,
    DrainingError,
    LocalProtocolError,
    NonFiniteError,
    NotEnrolledError,
    OverQuotaError,
    RefusedError,
    RemoteProtocolError,
    UnreachableError,
)
from isthmus.edge.client import link as link_module, session_keeper
from isthmus.edge.client.link import Link, connect
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.edge.config.client_config import ClientConfig
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import ConnectionString, Tenant
from isthmus.protocol.limits import DEFAULT_LIMITS
from isthmus.protocol.session import edge_limits
from isthmus.protocol.tensor_codecs import Role, decode, encode

pytestmark = pytest.mark.usefixtures("no_waiting", "cache_folder")


# What comes back ------------------------------------------------------------------------------------------------------


def test_an_undisturbed_link_gives_the_spans_results(shared: Served, undisturbed: list[torch.Tensor]) -> None:
    given = hidden(1).requires_grad_(True)
    expected = shared.executor.host.span(given, MASK, POSITIONS)
    assert torch.equal(undisturbed[0], expected)
    (gradient,) = torch.autograd.grad(expected, given, hidden(11))
    assert torch.equal(undisturbed[3], gradient)


def test_an_answer_to_another_call_is_not_taken(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    other = encode(hidden(), "fp32", Role.ACTIVATION)
    wrong = [m.ForwardReply(m.CallId(0, 99), other, 0, 0, 0)]
    cloud.answer = lambda message: wrong.pop() if wrong and isinstance(message, m.Forward) else None
    output, _ = link.forward_span(hidden(), None, None, keep=False)
    assert not torch.equal(output, hidden())
    assert link.traffic.retries == 1


def test_an_answer_of_another_shape_is_refused(cloud: MemoryCloud) -> None:
    link = new_link(cloud)

    def answer(message: m.Message) -> m.Message | None:
        if not isinstance(message, m.Forward):
            return None
        return m.ForwardReply(message.id, encode(hidden(rows=1), "fp32", Role.ACTIVATION), 0, 0, 0)

    cloud.answer = answer
    with pytest.raises(RemoteProtocolError, match=r"\[1, 6, 32\] instead of \[2, 6, 32\]"):
        link.forward_span(hidden(), None, None, keep=False)


# The activation cache -------------------------------------------------------------------------------------------------


def test_lost_activations_are_replayed(cloud: MemoryCloud, shared: Served, undisturbed: list[torch.Tensor]) -> None:
    link = new_link(cloud)
    output, kept = link.forward_span(hidden(1), MASK, POSITIONS, keep=True)
    assert torch.equal(output, undisturbed[0])
    shared.executor.cache.evict_all()
    result = link.backward_span(kept, hidden(11), hidden(1), MASK, POSITIONS)
    assert torch.equal(result, undisturbed[3])
    first, second = messages(cloud, m.Backward)
    assert first.replay is None
    assert second.replay is not None
    assert torch.equal(decode(second.replay.hidden), hidden(1))
    assert link.traffic.sessions == 1  # no new session for it


def test_after_a_reconnect_the_input_goes_along_at_once(cloud: MemoryCloud, undisturbed: list[torch.Tensor]) -> None:
    link = new_link(cloud)
    _, kept = link.forward_span(hidden(1), MASK, POSITIONS, keep=True)
    link._keeper.drop()
    result = link.backward_span(kept, hidden(11), hidden(1), MASK, POSITIONS)
    assert torch.equal(result, undisturbed[3])
    (sent,) = messages(cloud, m.Backward)
    assert sent.replay is not None


def test_a_cloud_that_loses_what_it_was_just_sent_is_at_fault(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    _, kept = link.forward_span(hidden(), None, None, keep=True)
    cloud.answer = lambda message: (
        m.Status(m.StatusCode.ACTIVATIONS_LOST, message.id, "lost") if isinstance(message, m.Backward) else None
    )
    with pytest.raises(RemoteProtocolError, match="lost a forward state"):
        link.backward_span(kept, hidden(1), hidden(), None, None)
    assert len(messages(cloud, m.Backward)) == 2


# Numbers that are none, and limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_not_sent(cloud: MemoryCloud, value: float) -> None:
    link = new_link(cloud)
    bad = hidden()
    bad[1, 2, 3] = value
    with pytest.raises(NonFiniteError, match="hidden states"):
        link.forward_span(bad, None, None, keep=True)
    _, kept = link.forward_span(hidden(), None, None, keep=True)
    with pytest.raises(NonFiniteError, match="gradient"):
        link.backward_span(kept, bad, hidden(), None, None)
    assert len(messages(cloud, m.Forward)) == 1
    assert not messages(cloud, m.Backward)
    link.backward_span(kept, hidden(1), hidden(), None, None)  # the session is unharmed


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (m.StatusCode.NON_FINITE, NonFiniteError),
        (m.StatusCode.BAD_REQUEST, RefusedError),
        (m.StatusCode.OVER_QUOTA, OverQuotaError),
    ],
)
def test_a_refused_call_is_not_repeated(cloud: MemoryCloud, code: m.StatusCode, error: type[Exception]) -> None:
    link = new_link(cloud)
    cloud.answer = lambda message: (
        m.Status(code, message.id, "because\x1b[2J") if isinstance(message, m.Forward) else None
    )
    with pytest.raises(error, match=r"because\?\[2J"):  # a terminal takes nothing from it
        link.forward_span(hidden(), None, None, keep=False)
    assert len(messages(cloud, m.Forward)) == 1


def test_a_cloud_that_fails_is_asked_a_few_times(cloud: MemoryCloud, undisturbed: list[torch.Tensor]) -> None:
    failures = dict.fromkeys((m.Forward, m.Backward), session_keeper.PROTOCOL_FAULTS - 1)

    def failing(message: Any) -> m.Message | None:
        if not failures.get(type(message)):
            return None
        failures[type(message)] -= 1
        return m.Status(m.StatusCode.INTERNAL, message.id, "the span failed")

    link = new_link(cloud)
    cloud.answer = failing
    results = three_calls(link)
    assert not any(failures.values())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, undisturbed, strict=True))
    assert link.traffic.retries == 2 * (session_keeper.PROTOCOL_FAULTS - 1)
    failures[m.Forward] = 99
    with pytest.raises(CloudFailedError, match=r"refused the call \(internal\): the span failed"):
        link.forward_span(hidden(), None, None, keep=False)
    assert 99 - failures[m.Forward] == session_keeper.PROTOCOL_FAULTS
    failures.clear()
    link.forward_span(hidden(), None, None, keep=False)


def test_too_many_tokens_are_refused_before_they_are_sent(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    with pytest.raises(RefusedError, match="43 x 6 tokens in one call; the cloud takes at most 256"):
        link.forward_span(hidden(rows=43), None, None, keep=False)
    assert not messages(cloud, m.Forward)


@pytest.mark.parametrize(("codec", "tolerance"), [("fp32", 0.0), ("bf16", 0.05), ("fp16", 0.01), ("int8", 0.05)])
def test_a_lossy_codec_differs_and_is_close(
    cloud: MemoryCloud, undisturbed: list[torch.Tensor], codec: str, tolerance: float
) -> None:
    link = new_link(cloud, codecs=WireCodecs.parse(codec))
    results = three_calls(link)
    for mine, exact in zip(results, undisturbed, strict=True):
        assert torch.equal(mine, exact) == (codec == "fp32")
        assert (mine - exact).norm() <= tolerance * exact.norm()


# Who is on the other side ---------------------------------------------------------------------------------------------


def test_a_codec_that_the_cloud_does_not_speak_is_a_mistake_of_the_configuration(cloud: MemoryCloud) -> None:
    cloud.served = with_info(cloud.served, codecs=("fp32",))
    with pytest.raises(ConfigError, match="does not speak the codec 'int8': choose one of fp32"):
        new_link(cloud, codecs=WireCodecs.parse("fp32,int8"))


@pytest.mark.parametrize(
    "changes",
    [{"digest": "ff" * 32}, {"plan": "1:2"}, {"span_dtype": "bf16"}, {"attn_implementation": "eager"}],
)
def test_another_model_behind_the_same_address_stops_the_run(cloud: MemoryCloud, changes: dict[str, Any]) -> None:
    link = new_link(cloud)
    cloud.served = with_info(cloud.served, **changes)
    link._keeper.drop()
    (now,) = changes.values()
    with pytest.raises(CheckpointError, match=rf"{now[:16]}.*another model.*{link.info.digest[:16]}"):
        link.forward_span(hidden(), None, None, keep=False)
    assert not messages(cloud, m.Forward)


def refuse_with(error: Exception) -> Callable[[bytes], Tenant]:
    def authorize(key: bytes) -> Tenant:
        raise error

    return authorize


def test_a_withdrawn_enrolment_stops_the_run(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    cloud.authorize = refuse_with(NotEnrolledError("not enrolled any more"))
    link._keeper.drop()
    with pytest.raises(NotEnrolledError):
        link.forward_span(hidden(), None, None, keep=False)


def test_a_draining_cloud_is_waited_for_but_not_at_first(cloud: MemoryCloud) -> None:
    link = new_link(cloud, give_up_after=3)
    cloud.authorize = refuse_with(DrainingError("drains"))
    with pytest.raises(DrainingError):
        new_link(cloud)
    link._keeper.drop()
    with pytest.raises(UnreachableError, match="drains"):
        link.forward_span(hidden(), None, None, keep=False)


def test_a_goodbye_from_the_cloud_leads_to_a_new_session(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    goodbyes = [m.Goodbye("draining")]
    cloud.answer = lambda message: goodbyes.pop() if goodbyes and isinstance(message, m.Forward) else None
    link.forward_span(hidden(), None, None, keep=False)
    assert link.traffic.sessions == 2


# The end --------------------------------------------------------------------------------------------------------------


def test_close_says_goodbye_and_is_final(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    link.close()
    link.close()
    assert messages(cloud, m.Goodbye) == [m.Goodbye("done")]
    with pytest.raises(LocalProtocolError, match="is closed"):
        link.forward_span(hidden(), None, None, keep=False)


def test_a_link_that_was_never_open_says_so(cloud: MemoryCloud) -> None:
    link = Link(MemoryTransport(cloud), PIN, EDGE, name="cloud:1")
    with pytest.raises(UnreachableError, match="never been open"):
        _ = link.info
    link.close()


def test_totals_count_both_directions(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    before = link.totals()
    link.forward_span(hidden(), None, None, keep=False)
    spent = link.totals() - before
    assert hidden().nbytes < spent.bytes_up < hidden().nbytes + 1000
    assert hidden().nbytes < spent.bytes_down < hidden().nbytes + 1000
    assert spent.calls == 1
    assert spent.cloud_s > 0
    assert spent.crypto_s > 0


def test_what_is_lost_to_a_fault_is_time_of_the_wire(
    cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch, no_waiting: list[float]
) -> None:
    transport = MemoryTransport(cloud)
    link = new_link(transport)
    comes_back(transport, lambda: sum(no_waiting) > 30, no_waiting, monkeypatch)
    link._keeper.drop()
    clock = session_keeper.time.perf_counter_ns
    monkeypatch.setattr(session_keeper.time, "perf_counter_ns", lambda: clock() + round(sum(no_waiting) * 1e9))
    before = link.totals()
    link.forward_span(hidden(), None, None, keep=False)
    assert (link.totals() - before).wire_s > 30


def test_the_largest_message_is_what_the_cloud_takes(cloud: MemoryCloud) -> None:
    small = m.SpanLimits(max_tokens_per_call=256, max_message_bytes=1000, activation_cache_bytes=1 << 20)
    cloud.served = with_info(cloud.served, limits=small)
    link = new_link(cloud)
    with pytest.raises(LocalProtocolError, match="1000 may be sent; use a smaller batch"):
        link.forward_span(hidden(), None, None, keep=False)
    assert not messages(cloud, m.Forward)
    assert link.forward_span(hidden(rows=1), None, None, keep=False)[0].shape == (1, 6, HIDDEN)
    large = dataclasses.replace(link.info, limits=dataclasses.replace(small, max_message_bytes=1 << 40))
    assert edge_limits(large).max_message_bytes == 4 << 30
    assert edge_limits(link.info) == DEFAULT_LIMITS  # answers may still be of any usual size


# Where a cloud is -----------------------------------------------------------------------------------------------------


def test_a_link_tries_all_places_of_its_connection_string(cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, float]] = []

    class Named(MemoryTransport):
        def __init__(self, address: str, _tls: object, _timeout: float, keepalive: float) -> None:
            super().__init__(cloud)
            self.up = address == "c.example:7445"
            made.append((address, keepalive))

    monkeypatch.setattr(link_module, "GrpcTransport", Named)
    monkeypatch.setattr(link_module, "load_edge", lambda path: EDGE)
    monkeypatch.setattr(session_keeper, "time", StillTime())
    with pytest.raises(UnreachableError):
        connect(str(ConnectionString("a.example", 7443, PIN)))
    assert {address for address, _ in made} == {"a.example:7443"}
    made.clear()
    with connect(
        str(ConnectionString("a.example", 7443, PIN, others=("b.example:7444", "c.example:7445"))), keepalive=3.0
    ):
        assert made == [("a.example:7443", 3.0), ("b.example:7444", 3.0), ("c.example:7445", 3.0)]


@pytest.mark.parametrize("keepalive", [0.0, 0.9, -1.0])
def test_a_keepalive_that_a_worker_would_take_for_abuse_is_refused(
    keepalive: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "load_edge", lambda path: EDGE)
    with pytest.raises(ConfigError, match=f"a keepalive of {keepalive:g} s is too short: 1 at least"):
        connect(f"isthmus://127.0.0.1:1#{PIN}", keepalive=keepalive)
    with pytest.raises(ValidationError, match="keepalive"):
        ClientConfig(cloud=f"isthmus://127.0.0.1:1#{PIN}", keepalive=keepalive)
    assert ClientConfig(cloud=f"isthmus://127.0.0.1:1#{PIN}", keepalive=1.0).keepalive == 1.0
