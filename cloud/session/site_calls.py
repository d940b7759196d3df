"""A session's calls with sites: each begins on a thread of its own, pauses to ask, and ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from isthmus.backbone.runtime.batched_products import BatchingPartners, ProductRequest, Products
from isthmus.cloud.engine.call_sites import CallSites
from isthmus.cloud.engine.paused_batches import Asked, Outcome, SitedCall, Step, first_kind, next_kind
from isthmus.cloud.engine.paused_calls import CallThread, CallThreads, Pause, PausingCall
from isthmus.cloud.engine.requests import Kind
from isthmus.cloud.session.edge_adapters import EdgeAdapters
from isthmus.cloud.session.site_lists import SiteList, SiteLists
from isthmus.protocol import messages as m

MAX_PAUSED = 8
"""Calls of one session that may have paused at a time (docs/protocol.md). This project's edges have one.

Their threads and memory are bounded for all sessions together (`CallThreads`).
"""

Call = m.Forward | m.Backward
Work = Callable[[CallSites], m.Message]


@dataclass(frozen=True, slots=True)
class _Question:
    """What a call waits for."""

    phase: m.SitePhase
    site: int  # the first one of those that it asks about
    asked_at: float  # seconds of the monotonic clock


@dataclass(slots=True, eq=False)
class _BegunCall:
    """A call that has begun and not ended. It computes, or waits for the answer to a question."""

    message: Call
    list: SiteList
    call: SitedCall
    partners: BatchingPartners | None
    question: _Question | None = None  # its last one; None until it has asked

    @property
    def kind(self) -> Kind:
        """The kind of its next step."""
        if self.question is None:
            return first_kind(self.message)
        return next_kind(self.question.phase, self.list.sites.pauses[self.question.site])


@dataclass(slots=True)
class SiteCalls:
    """Runs the calls of one session that have sites.

    A call's life:

        claim    it gets a thread, or waits for one (`claim`); a session has at most one that has not begun
        begin    it computes on the thread until its first question, or its end (`begin`, then `take`)
        ask      it waits for the edge's answer, and holds its thread and its memory
        answer   it computes until its next question, or its end (`answer`, then `take`)
        end      its thread is free again

    Args:
        lists: the session's lists of sites, and its lease.
        threads: where calls run that may pause.
        batching: whether calls may be computed together with those of other sessions.

    Attributes:
        begun: the calls that have begun and not ended, by number. The event loop may ask whether there are any.
    """

    lists: SiteLists
    threads: CallThreads
    batching: bool = True
    begun: dict[int, _BegunCall] = field(default_factory=dict)
    _claimed: CallThread | None = None

    @property
    def asked_at(self) -> float | None:
        """Since when the edge has owed its oldest answer (monotonic clock); None where it owes none.

        The event loop may ask while no call of the session is computed.
        """
        questions = (each.question for each in self.begun.values())
        return min((each.asked_at for each in questions if each is not None), default=None)

    def kind(self, message: Call | m.SiteAnswer) -> Kind | None:
        """The kind of the step that a message leads to; None where it is computed alone. The event loop may ask."""
        if not self.batching:
            return None
        if isinstance(message, m.SiteAnswer):
            begun = self.begun.get(message.id.call)
            return None if begun is None else begun.kind
        return None if self.lists.find(message.sites) is None else first_kind(message)

    def positions(self, message: m.SiteAnswer) -> int:
        """Token positions of the call that an answer lets go on; 0 if it has not begun. The event loop may ask."""
        begun = self.begun.get(message.id.call)
        if begun is None:
            return 0
        call = begun.message
        batch, sequence = (call.hidden if isinstance(call, m.Forward) else call.gradient).shape[:2]
        return batch * sequence

    def claim(self, nbytes: int = 0) -> CallThread:
        """The thread of the call that begins next, which may have to wait for it. The event loop may ask.

        A session whose calls have paused does not wait: these hold threads that others wait for.

        Args:
            nbytes: memory that the call takes until it ends.

        Raises:
            ValueError: it takes more than a tenant may have.
        """
        if self._claimed is None:
            self._claimed = self.threads.claim(self.lists.tenant.name, nbytes)
        return self._claimed

    def begin(self, message: Call, work: Work, nbytes: int = 0) -> Step:
        """The first step of a call with sites.

        Args:
            message: the call.
            work: computes it.
            nbytes: memory that it takes until it ends.

        Raises:
            LookupError: the session has no such list of sites, or no such lease.
            ValueError: too many calls have paused, no thread is free, or the call takes too much memory.
        """
        thread, self._claimed = self.claim(nbytes), None
        try:
            sites = self.lists.of(message.sites)
            full = message.id.call in self.begun or len(self.begun) >= MAX_PAUSED
            if full or not thread.ready.done():
                why = "" if full else "no thread is free, and "
                raise ValueError(
                    f"call {message.id.call} cannot begin: {why}{len(self.begun)} have paused, answer them first"
                )
            leased = self.lists.leased_for(message, sites.sites)
        except (LookupError, ValueError):
            thread.give_back()
            raise

        def run(ask: Callable[[Asked], Any]) -> m.Message:
            adapters = EdgeAdapters(self.lists.executor, sites.sites, message, self.lists.limits, ask)
            return work(CallSites(sites.sites, adapters, leased, partners))

        call: SitedCall = PausingCall(run, thread)
        partners = (
            BatchingPartners(cast("Callable[[ProductRequest], Products | RuntimeError]", call.ask))
            if self.batching
            else None
        )
        self.begun[message.id.call] = _BegunCall(message, sites, call, partners)
        return self._step(message.id.call, None)

    def answer(self, message: m.SiteAnswer) -> Step:
        """The step of a call that an answer lets go on. Raises LookupError where no such call has asked."""
        if message.id.call not in self.begun:
            raise LookupError(f"call {message.id.call} has not asked anything")
        return self._step(message.id.call, message)

    def take(self, step: Step) -> m.Message:
        """Compute a step of this session alone; returns the question at its end, or the call's result.

        Raises:
            ValueError: the answer does not fit the question.
        """
        try:
            outcome = step.resume(step.answer, beside=False)
        except BaseException:
            self.ended(step)
            raise
        return self.settle(step, outcome)

    def settle(self, step: Step, outcome: Outcome) -> m.Message:
        """Note the question or the result at the end of a step; returns it, with the time that the step took."""
        spent = step.call.busy_ns - step.since_ns
        if not isinstance(outcome, Pause):
            self.ended(step)
            return dataclasses.replace(outcome, compute_ns=spent) if isinstance(outcome, m.Timed) else outcome
        question = outcome.question
        if not isinstance(question, m.SiteQuestion):
            raise RuntimeError("a step cannot end where its call waits for others")
        self.begun[step.number].question = _Question(question.phase, question.sites[0], time.monotonic())
        return dataclasses.replace(question, compute_ns=spent)

    def ended(self, step: Step) -> None:
        """Forget a call that has ended."""
        del self.begun[step.number]

    def drop(self, number: int) -> None:
        """End a call that waits for an answer, if there is one of this number: its answer will not come."""
        begun = self.begun.pop(number, None)
        if begun is not None:
            begun.call.abandon()

    def close(self) -> None:
        """End all calls, give a claimed thread back, and end the lease."""
        if self._claimed is not None:
            self._claimed.give_back()
            self._claimed = None
        for number in list(self.begun):
            self.drop(number)
        self.lists.end_lease()

    def _step(self, number: int, answer: m.SiteAnswer | None) -> Step:
        begun = self.begun[number]
        return Step(number, begun.call, begun.partners, answer, begun.call.busy_ns)
