"""A tenant's session: what it answers, what it refuses and how it says so."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.models.tiny import HIDDEN
from support.protocol.span_messages import backward, forward, hidden, refusal, span_inputs
from support.protocol.wire import TENANT

from isthmus.backbone.plan import Span
from isthmus.backbone.runtime.call_memory import CallShape, Pass
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.handler import TenantSession, kind_of
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import MessageError
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import check
from isthmus.protocol.tensor_codecs import codec_id, decode

THREADS = CallThreads(1, 16)


def test_a_forward_and_its_backward_are_answered_with_their_ids(tenant: TenantSession, cloud: Served) -> None:
    reply = tenant.handle(forward(span_inputs(mask=(2, 6), positions=(1, 6))))
    assert isinstance(reply, m.ForwardReply)
    assert reply.id == m.CallId(1, 1)
    expected = cloud.executor.host.span(
        hidden(2, 6, HIDDEN), torch.ones(2, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long)
    )
    assert torch.equal(decode(reply.hidden), expected)
    back = tenant.handle(backward((2, 6, HIDDEN)))
    assert isinstance(back, m.BackwardReply)
    assert back.id == m.CallId(1, 1, 3)
    assert not back.recomputed


def test_the_answer_uses_the_codec_that_was_asked_for(tenant: TenantSession) -> None:
    reply = tenant.handle(forward(span_inputs(), codec=codec_id("int8")))
    assert isinstance(reply, m.ForwardReply)
    assert reply.hidden.codec == codec_id("int8")


def test_a_part_of_the_span_is_computed_only_where_an_offered_package_has_it(cloud: Served) -> None:
    cloud.executor.cache.evict_all()
    part = cloud.executor.host.span.part(Span(2, 3))
    session = dataclasses.replace(cloud, middles={"2:3": part}).session(b"s" * 16, TENANT, THREADS)
    ordinary = forward(span_inputs(mask=(2, 6)), keep=False)
    asked = dataclasses.replace(ordinary, plan="2:3")
    reply, whole = session.handle(asked), session.handle(ordinary)
    assert isinstance(reply, m.ForwardReply)
    assert isinstance(whole, m.ForwardReply)
    assert torch.equal(decode(reply.hidden), part(hidden(2, 6, HIDDEN), torch.ones(2, 6, dtype=torch.long)))
    assert not torch.equal(decode(reply.hidden), decode(whole.hidden))
    assert kind_of(asked) is None  # it shares no pass with calls of other layers
    assert not cloud.executor.cache.used
    assert "no package of the split 3:2" in refusal(session.handle(dataclasses.replace(asked, plan="3:2")))
    text = refusal(session.handle(dataclasses.replace(forward(span_inputs((5, 13, HIDDEN)), keep=False), plan="2:3")))
    assert "5 x 13" in text


@pytest.mark.parametrize(
    ("inputs", "values"),
    [
        (span_inputs((2, 6, HIDDEN + 1)), ["[2, 6, 33]", "32"]),
        (span_inputs((5, 13, HIDDEN)), ["5 x 13", "64"]),
    ],
    ids=["hidden size", "tokens"],
)
def test_a_bad_input_is_refused_with_its_values(tenant: TenantSession, inputs: m.SpanInputs, values: list[str]) -> None:
    text = refusal(tenant.handle(forward(inputs)))
    assert all(value in text for value in values), text
    replayed = refusal(tenant.handle(backward((2, 6, HIDDEN), replay=inputs)))
    assert all(value in replayed for value in values), replayed
    assert isinstance(tenant.handle(forward(span_inputs())), m.ForwardReply)  # the session goes on


@pytest.mark.parametrize(
    ("inputs", "values"),
    [
        (span_inputs((6, HIDDEN)), "[6, 32]"),
        (span_inputs(mask=(2, 5)), "[2, 5]"),
        (span_inputs(mask=(1, 6)), "[1, 6]"),
        (span_inputs(positions=(2, 7)), "[2, 7]"),
        (span_inputs(positions=(3, 6)), "[3, 6]"),
        (span_inputs(positions=(6,)), "[6]"),
    ],
    ids=["rank", "mask length", "mask rows", "positions length", "positions rows", "positions rank"],
)
def test_inputs_that_do_not_fit_each_other_never_reach_a_session(inputs: m.SpanInputs, values: str) -> None:
    check(forward(span_inputs(mask=(2, 6), positions=(1, 6))))  # the control
    for message in (forward(inputs), backward((2, 6, HIDDEN), replay=inputs)):
        with pytest.raises(MessageError) as refused:  # every message that comes in is checked so
            check(message)
        assert values in str(refused.value)


@pytest.mark.parametrize("replay", [None, span_inputs((2, 5, HIDDEN))], ids=["kept", "replayed"])
def test_a_gradient_of_another_shape_is_refused_and_loses_nothing(
    tenant: TenantSession, replay: m.SpanInputs | None
) -> None:
    if replay is None:
        tenant.handle(forward(span_inputs((2, 5, HIDDEN))))
    text = refusal(tenant.handle(backward((2, 6, HIDDEN), replay=replay)))
    assert "[2, 6, 32]" in text
    assert "[2, 5, 32]" in text
    assert isinstance(tenant.handle(backward((2, 5, HIDDEN), replay=replay)), m.BackwardReply)


def test_a_replay_of_another_shape_than_the_kept_forward_is_harmless(tenant: TenantSession) -> None:
    tenant.handle(forward(span_inputs((2, 5, HIDDEN))))
    text = refusal(tenant.handle(backward((2, 6, HIDDEN), replay=span_inputs((2, 6, HIDDEN)))))
    assert "[2, 5, 32]" in text


def test_a_lost_forward_state_is_named_and_a_replay_is_as_good(tenant: TenantSession, cloud: Served) -> None:
    tenant.handle(forward(span_inputs()))
    first = tenant.handle(backward((2, 6, HIDDEN)))
    lost = tenant.handle(backward((2, 6, HIDDEN)))
    assert isinstance(lost, m.Status)
    assert (lost.code, lost.id) == (m.StatusCode.ACTIVATIONS_LOST, m.CallId(1, 1, 3))
    again = tenant.handle(backward((2, 6, HIDDEN), replay=span_inputs()))
    assert isinstance(first, m.BackwardReply)
    assert isinstance(again, m.BackwardReply)
    assert again.recomputed
    assert again.gradient == first.gradient


def test_what_torch_raises_becomes_a_status_without_its_text(
    tenant: TenantSession, cloud: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("not enough memory near the value 0.123")

    monkeypatch.setattr(type(cloud.executor), "forward", fail)
    text = refusal(tenant.handle(forward(span_inputs())), m.StatusCode.INTERNAL)
    assert "RuntimeError" in text
    assert "0.123" not in text


@pytest.mark.parametrize("message", [m.Attach(b"l" * 16), m.Pong(1, 2)])
def test_a_message_out_of_place_breaks_the_protocol(tenant: TenantSession, message: m.Message) -> None:
    with pytest.raises(MessageError, match=type(message).__name__):
        tenant.handle(message)


def test_ping_and_goodbye(tenant: TenantSession) -> None:
    pong = tenant.handle(m.Ping(7))
    assert isinstance(pong, m.Pong)
    assert pong.nonce == 7
    assert pong.peak_bytes == 0, "what the process has tells of other tenants"
    tenant.handle(forward(span_inputs((2, 6, HIDDEN))))
    own = tenant.handle(m.Ping(8))
    assert isinstance(own, m.Pong)
    assert own.peak_bytes == tenant.executor.memory.of(CallShape(2, 6, Pass.BACKWARD))
    assert tenant.handle(m.Goodbye("done")) is None


def test_close_releases_the_session(tenant: TenantSession, cloud: Served) -> None:
    tenant.handle(forward(span_inputs()))
    assert cloud.executor.cache.used > 0
    tenant.close()
    assert cloud.executor.cache.used == 0


def test_what_may_share_a_pass() -> None:
    kept, passing = forward(span_inputs()), forward(span_inputs(), keep=False)
    kinds = [kind_of(message) for message in (kept, passing, backward((2, 6, HIDDEN)))]
    assert None not in kinds
    assert len(set(kinds)) == 3
    assert kind_of(dataclasses.replace(kept, sites=1)) is None
    assert kind_of(dataclasses.replace(kept, wanted=False)) is None
    assert kind_of(m.Ping(1)) is None
