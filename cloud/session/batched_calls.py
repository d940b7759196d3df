"""Calls of several sessions that are computed at once: in one pass without sites, side by side with them.

Every function takes one message of each of several sessions, and returns what `TenantSession.handle` would answer to
each of them, in the same order, or the error that it would raise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from isthmus.backbone.split.span import SpanInput
from isthmus.cloud.engine.executor import BackwardCall, Forwarded, Gradients
from isthmus.cloud.engine.paused_batches import take_steps
from isthmus.cloud.session.handler import CheckedCall, TenantSession
from isthmus.cloud.telemetry.logs import log
from isthmus.protocol import messages as m

Call = tuple[TenantSession, m.Forward | m.Backward]
SiteStep = tuple[TenantSession, m.Forward | m.Backward | m.SiteAnswer]
Answer = m.Message | Exception

M = TypeVar("M", bound=m.Message)
R = TypeVar("R")


def handle_batch(calls: Sequence[Call]) -> list[Answer]:
    """Compute calls of one kind (`isthmus.cloud.session.handler.kind_of`) in one pass.

    Where the pass fails, each call is computed by itself, so that only the one at fault is answered that it failed. A
    backward whose forward state the pass has used up is answered that the state is lost.
    """
    try:
        return _in_one_pass(calls)
    except Exception as error:  # noqa: BLE001  # computed again below, where it is one call's error
        log("pass_failed", logging.WARNING, error=type(error).__name__, calls=len(calls))
    # Not inside `except`: the error holds the frames that it passed, and with them the pass's tensors.
    return [_by_itself(session, message) for session, message in calls]


def step_batch(messages: Sequence[SiteStep]) -> list[Answer]:
    """Let calls with sites, of different sessions, take their next steps side by side."""
    steps, answers = _for_each(messages, lambda session, message: session.step(message))
    outcomes = take_steps(list(steps.values()), messages[0][0].executor.host.product_batches)
    for (at, step), outcome in zip(steps.items(), outcomes, strict=True):
        session, message = messages[at]
        if isinstance(outcome, Exception):
            session.calls.ended(step)
            answers[at] = _refused(session, message, outcome)
        else:
            answers[at] = session.calls.settle(step, outcome)
    return [answers[at] for at in range(len(messages))]


def _in_one_pass(calls: Sequence[Call]) -> list[Answer]:
    """See `handle_batch`. Raises what the pass raises."""
    checked, answers = _for_each(calls, lambda session, message: session.check(message))
    start = time.perf_counter_ns()
    results = _results(calls[0], list(checked.values()))
    spent = time.perf_counter_ns() - start
    positions = sum(each.positions for each in checked.values())
    for (at, each), result in zip(checked.items(), results, strict=True):
        session, message = calls[at]
        try:
            if isinstance(result, Exception):
                raise result
            answers[at] = each.reply(result, spent * each.positions // positions)
        except Exception as error:  # noqa: BLE001  # this session's error is no other's
            answers[at] = _refused(session, message, error)
    return [answers[at] for at in range(len(calls))]


def _for_each(
    messages: Sequence[tuple[TenantSession, M]], make: Callable[[TenantSession, M], R]
) -> tuple[dict[int, R], dict[int, Answer]]:
    """What is made of each session's message, by index; and the answers of those of which it raises an error."""
    made: dict[int, R] = {}
    answers: dict[int, Answer] = {}
    for at, (session, message) in enumerate(messages):
        try:
            made[at] = make(session, message)
        except Exception as error:  # noqa: BLE001  # this session's error is no other's
            answers[at] = _refused(session, message, error)
    return made, answers


def _results(first: Call, checked: Sequence[CheckedCall]) -> Sequence[Forwarded | Gradients | Exception]:
    """What the executor computes of calls of the kind of `first`; a backward may have an error of its own."""
    session, message = first
    if isinstance(message, m.Forward):
        inputs = {each.key: each.call for each in checked if isinstance(each.call, SpanInput)}
        return session.executor.forward_together(inputs, keep=message.keep) if inputs else []
    return session.executor.backward_together([each.call for each in checked if isinstance(each.call, BackwardCall)])


def _by_itself(session: TenantSession, message: m.Forward | m.Backward) -> Answer:
    try:
        return session.computed(message)
    except Exception as error:  # noqa: BLE001  # this session's error is no other's
        return _refused(session, message, error.with_traceback(None))  # whose frames hold memory that others need


def _refused(session: TenantSession, message: m.Message, error: Exception) -> Answer:
    """The refusal of an error, or the error itself where an edge must not see it: its session raises it."""
    try:
        return session.refusal(message, error)
    except Exception as unknown:  # noqa: BLE001  # raised again where the session waits
        return unknown
