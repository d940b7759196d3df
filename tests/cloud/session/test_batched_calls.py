"""Calls of several sessions in one pass: answered as alone, and what fails for one is no other's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.models.tiny import HIDDEN
from support.protocol.span_messages import backward, forward, refusal, span_inputs
from support.protocol.wire import TENANT

from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.batched_calls import Call, handle_batch
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import codec_id, decode

THREADS = CallThreads(1, 16)


def test_messages_that_are_handled_together_are_answered_as_alone(cloud: Served) -> None:
    cloud.executor.cache.evict_all()
    sessions = [cloud.session(bytes([number]) * 16, TENANT, THREADS) for number in range(4)]
    good = span_inputs(mask=(2, 6))
    asked = [
        (sessions[0], forward(span_inputs())),
        (sessions[1], forward(span_inputs((2, 6, HIDDEN + 1)))),
        (sessions[2], forward(good, codec=codec_id("int8"))),
        (sessions[3], forward(span_inputs((9, 8, HIDDEN)))),
    ]
    answers = handle_batch(asked)
    assert [answer.id for answer in answers if isinstance(answer, m.ForwardReply)] == [m.CallId(1, 1)] * 2
    assert "do not fit" in refusal(answers[1])
    assert "at most 64" in refusal(answers[3])
    for at in (0, 2):
        alone = cloud.session(b"x" * 16, TENANT, THREADS).handle(asked[at][1])
        assert isinstance(alone, m.ForwardReply)
        assert isinstance(answers[at], m.ForwardReply)
        assert torch.equal(decode(answers[at].hidden), decode(alone.hidden))
    backs = handle_batch(
        [
            (sessions[0], backward((2, 6, HIDDEN))),
            (sessions[1], backward((2, 6, HIDDEN))),
            (sessions[2], backward((2, 5, HIDDEN))),
        ]
    )
    assert isinstance(backs[0], m.BackwardReply)
    assert "evicted" in refusal(backs[1], m.StatusCode.ACTIVATIONS_LOST)
    assert "does not fit" in refusal(backs[2])
    again = handle_batch(
        [(sessions[1], backward((2, 6, HIDDEN), replay=span_inputs())), (sessions[2], backward((2, 6, HIDDEN)))]
    )
    assert [answer.recomputed for answer in again if isinstance(answer, m.BackwardReply)] == [True, False]


def test_a_failure_of_one_message_is_no_other_sessions(cloud: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.executor.cache.evict_all()
    sessions = [cloud.session(bytes([number]) * 16, TENANT, THREADS) for number in range(3)]
    original = TenantSession._forward_reply

    def failing(self: TenantSession, *args: Any) -> m.ForwardReply:
        if self is sessions[1]:
            raise ZeroDivisionError
        return original(self, *args)

    monkeypatch.setattr(TenantSession, "_forward_reply", failing)
    answers = handle_batch([(session, forward(span_inputs())) for session in sessions])
    assert [type(answer) for answer in answers] == [m.ForwardReply, ZeroDivisionError, m.ForwardReply]


SHAPES = ((2, 6, HIDDEN), (5, 8, HIDDEN), (3, 6, HIDDEN))
"""Of three calls, 70 positions together."""


@pytest.fixture
def several(cloud: Served) -> Iterator[list[TenantSession]]:
    cloud.executor.cache.evict_all()
    sessions = [cloud.session(bytes([number]) * 16, TENANT, THREADS) for number in range(len(SHAPES))]
    yield sessions
    for session in sessions:
        session.close()
    assert cloud.executor.cache.used == 0


def forwards(sessions: Sequence[TenantSession], *, keep: bool = True) -> list[Call]:
    return [(each, forward(span_inputs(shape), keep=keep)) for each, shape in zip(sessions, SHAPES, strict=True)]


def backwards(sessions: Sequence[TenantSession], *, replay: bool = False) -> list[Call]:
    pairs = zip(sessions, SHAPES, strict=True)
    return [(each, backward(shape, replay=span_inputs(shape) if replay else None)) for each, shape in pairs]


def numbers(answer: m.Message | Exception | None) -> torch.Tensor:
    if isinstance(answer, m.ForwardReply):
        return decode(answer.hidden)
    assert isinstance(answer, m.BackwardReply)
    assert answer.gradient is not None
    return decode(answer.gradient)


@contextmanager
def memory_for(
    cloud: Served, positions: int, error: type[Exception] = RuntimeError
) -> Iterator[list[weakref.ref[torch.Tensor]]]:
    """Have passes of more positions fail in the second layer; gives what was there of them, weakly."""
    failed: list[weakref.ref[torch.Tensor]] = []

    def allocate(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert not any(each() is not None for each in failed), "a pass that has failed still holds memory"
        if args[0].shape[:2].numel() > positions:
            failed.append(weakref.ref(args[0]))
            raise error("out of memory: 1.2345")

    hook = cloud.executor.host.span.base.layers[1].register_forward_pre_hook(allocate)
    gc.disable()  # whose help is not to be needed
    try:
        yield failed
    finally:
        gc.enable()
        hook.remove()


@pytest.mark.parametrize("keep", [True, False])
def test_a_pass_that_fails_is_computed_call_by_call(cloud: Served, several: list[TenantSession], keep: bool) -> None:
    alone = [numbers(session.handle(message)) for session, message in forwards(several, keep=keep)]
    with memory_for(cloud, 69) as failed:
        answers = handle_batch(forwards(several, keep=keep))
    assert len(failed) == 1
    for answer, expected in zip(answers, alone, strict=True):
        assert torch.equal(numbers(answer), expected)
    with memory_for(cloud, 39) as failed:
        small, large, other = handle_batch(forwards(several, keep=keep))
    assert len(failed) == 2
    assert "1.2345" not in refusal(large, m.StatusCode.INTERNAL)  # its text could quote values
    assert torch.equal(numbers(small), alone[0])
    assert torch.equal(numbers(other), alone[2])


def test_backwards_of_a_pass_that_fails_want_their_inputs_again(
    cloud: Served, several: list[TenantSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    for session, message in forwards(several):
        session.handle(message)
    alone = [numbers(session.handle(message)) for session, message in backwards(several)]
    handle_batch(forwards(several))

    def exhausted(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", exhausted)
        for answer in handle_batch(backwards(several)):
            refusal(answer, m.StatusCode.ACTIVATIONS_LOST)
    assert cloud.executor.cache.used == 0
    with memory_for(cloud, 39) as failed:
        small, large, other = handle_batch(backwards(several, replay=True))
    assert len(failed) == 2
    refusal(large, m.StatusCode.INTERNAL)
    assert torch.equal(numbers(small), alone[0])
    assert torch.equal(numbers(other), alone[2])
    for answer, expected in zip(handle_batch(backwards(several, replay=True)), alone, strict=True):
        assert torch.equal(numbers(answer), expected)


def test_an_unknown_failure_of_a_pass_ends_one_session_only(cloud: Served, several: list[TenantSession]) -> None:
    with memory_for(cloud, 39, MemoryError) as failed:
        answers = handle_batch(forwards(several))
    assert len(failed) == 2
    assert [type(answer) for answer in answers] == [m.ForwardReply, MemoryError, m.ForwardReply]
