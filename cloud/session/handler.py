"""One tenant's session above the protocol: a message comes in, a message goes out. No sockets and no threads.

`TenantSession.handle` may take as long as a forward takes; the server runs it on the compute thread. A call with sites
runs on a thread of its own, which takes turns with that one (`isthmus.cloud.engine.paused_calls`); several may go on
together (`isthmus.cloud.engine.paused_batches`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from isthmus.backbone.families import check_positions
from isthmus.backbone.runtime.call_memory import CallShape, Pass
from isthmus.backbone.split.span import SpanInput
from isthmus.cloud.engine.activation_cache import Key, StashLost
from isthmus.cloud.engine.executor import BackwardCall, Executor, Forwarded, Gradients, Guests
from isthmus.cloud.engine.paused_batches import Step, take_steps
from isthmus.cloud.engine.requests import Kind
from isthmus.cloud.fault_points import reached
from isthmus.cloud.session.file_store import FileShelf
from isthmus.cloud.session.site_calls import SiteCalls
from isthmus.cloud.session.tenant_adapters import Compute, TenantAdapters, at_once
from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import ConfigError, MessageError, NonFiniteError, PlanError
from isthmus.protocol import messages as m
from isthmus.protocol.limits import DEFAULT_LIMITS, Limits
from isthmus.protocol.tensor_codecs import Role, codec_by_id, decode, encode

_EMPTY = {
    m.FileSet.PARTS: "the cloud offers no parts of its model: ask its owner",
    m.FileSet.EMULATOR: "the cloud offers no package: ask its owner for one (`isthmus cloud serve --emulator`)",
    m.FileSet.ADAPTER: "no adapter of yours is plugged in: return one first (`isthmus emulator return`)",
}


@dataclass(frozen=True, slots=True)
class Begun:
    """A call that can be computed.

    Attributes:
        key: Whose.
        call: What the executor takes.
        positions: Token positions.
        reply: Makes the answer, of the executor's result and the nanoseconds that it took.
    """

    key: Key
    call: SpanInput | BackwardCall
    positions: int
    reply: Callable[[Any, int], m.Message]


@dataclass(slots=True)
class TenantSession:
    """Answers the messages of one session.

    Args:
        session_id: the session's id, which keys its entries in the stash.
        executor: the span that every session of this worker shares.
        shelves: the files that every edge may fetch.
        adapters: the tenant's own adapters.
        calls: runs calls, with pauses where they visit the edge's sites.
        hidden_size: size of the last dimension of hidden states.
        max_tokens: largest batch × sequence of one call.
        limits: what the session accepts; the tensors of a call are within them.

    Attributes:
        peak_bytes: the largest estimate of what one of its calls takes while it is computed.
    """

    session_id: bytes
    executor: Executor
    shelves: Mapping[m.FileSet, FileShelf]
    adapters: TenantAdapters
    calls: SiteCalls
    hidden_size: int
    max_tokens: int
    limits: Limits = DEFAULT_LIMITS
    peak_bytes: int = 0

    def handle(self, message: m.Message, compute: Compute = at_once) -> m.Message | None:
        """Answer one message; None for those that want no answer.

        Bad requests and evicted stashes become a `Status`; the session goes on after it.

        Args:
            message: what came.
            compute: how a message that is handled elsewhere than on a compute thread has something computed there.
        """
        match message:
            case m.Sites():
                *_, answer = self.bind(message)
                return answer
            case m.Forward() | m.Backward() | m.SiteAnswer() | m.Lease():
                try:
                    return self._computed(message)
                except Exception as error:  # noqa: BLE001  # what is no refusal is raised again
                    return self.refusal(message, error)
            case m.FetchList():
                shelf = self._shelf(message.file_set)
                return shelf if isinstance(shelf, m.Status) else shelf.listing()
            case m.Fetch():
                shelf = self._shelf(message.file_set)
                return shelf if isinstance(shelf, m.Status) else shelf.read(message.name, message.offset)
            case m.Put():
                return self.adapters.put(message)
            case m.PlugIn():
                return self.adapters.plug_in(message, compute)
            case m.Ping():
                return m.Pong(message.nonce, self.peak_bytes)  # the process's own would tell of the other tenants
            case m.Goodbye():
                return None
            case _:
                raise MessageError(f"an edge may not send {type(message).__name__}")

    def bind(self, message: m.Sites) -> Iterator[m.Message | None]:
        """Answer a list of sites in pieces: each gives None, the last the answer."""
        try:
            yield from self.calls.bind(message)
        except Exception as error:  # noqa: BLE001  # what is no refusal is raised again
            yield self.refusal(message, error)

    def close(self) -> None:
        """Forget the session's forward states, and end what has paused."""
        self.calls.close()
        self.executor.release(self.session_id)

    def _shelf(self, which: m.FileSet) -> FileShelf | m.Status:
        shelf = self.adapters.shelf() if which == m.FileSet.ADAPTER else self.shelves.get(which)
        return m.Status(m.StatusCode.BAD_REQUEST, None, _EMPTY[which]) if shelf is None else shelf

    def _computed(self, message: m.Forward | m.Backward | m.SiteAnswer | m.Lease) -> m.Message:
        match message:
            case m.Lease():
                return self.calls.lease(message)
            case m.Forward() if not message.sites:
                return self._forward(message, None)
            case m.Backward() if not message.sites:
                return self._backward(message, None)
            case _:
                return self.calls.take(self.step(message))

    def step(self, message: m.Forward | m.Backward | m.SiteAnswer) -> Step:
        """Have ready what a message wants of a call with sites: its first step, or the one after an answer.

        Raises:
            LookupError: There is no such list of sites, lease, or question.
            ValueError: Too many calls have paused, no thread is there, or the call takes too much memory.
        """
        match message:
            case m.Forward():
                return self.calls.begin(message, partial(self._forward, message), self.call_bytes(message))
            case m.Backward():
                return self.calls.begin(message, partial(self._backward, message), self.call_bytes(message))
            case m.SiteAnswer():
                return self.calls.answer(message)

    def kind_of(self, message: m.Message) -> Kind | None:
        """What a message may be answered together with; None for nothing. The event loop may ask."""
        if isinstance(message, m.SiteAnswer) or (isinstance(message, m.Forward | m.Backward) and message.sites):
            return self.calls.kind(message)
        return kind_of(message)

    def call_bytes(self, message: m.Message) -> int:
        """What a call takes while it is computed; 0 for what is no call, or will be refused. The event loop may ask."""
        shape = self._call_shape(message)
        if not isinstance(message, m.Forward | m.Backward) or shape is None:
            return 0
        memory = self.executor.memory
        checked = Pass.FORWARD if shape.what == Pass.FORWARD else Pass.BACKWARD  # as `_check_memory` does
        if not message.sites and memory.of(replace(shape, what=checked)) > self.executor.compute_bytes:
            return 0  # one with sites is refused by whoever gives it a thread
        return memory.of(shape)

    def _call_shape(self, message: m.Message) -> CallShape | None:
        """What a call's memory depends on; None for what is no call, has a shape that does not fit, or lacks a forward.

        A backward may find the forward that is kept, or have lost it by then and use its replay: it counts as masked
        where one of them is.
        """
        if not isinstance(message, m.Forward | m.Backward):
            return None
        sent = message.hidden if isinstance(message, m.Forward) else message.gradient
        if len(sent.shape) != 3 or sent.shape[0] * sent.shape[1] > self.max_tokens:
            return None
        if isinstance(message, m.Forward):
            what, inputs = Pass.KEPT_FORWARD if message.keep else Pass.FORWARD, message.inputs
            masked = _is_masked(inputs)
        else:
            kept_masked = self.executor.is_masked(self.session_id, message.id.call)
            if kept_masked is None and message.replay is None:
                return None  # the edge is asked to send the input again
            replay_masked = message.replay is not None and _is_masked(message.replay)
            what, masked = Pass.BACKWARD, bool(kept_masked) or replay_masked
        kept, passing = self.calls.widths(message.sites)
        return CallShape(sent.shape[0], sent.shape[1], what, masked, kept, passing)

    def begin(self, message: m.Forward | m.Backward) -> Begun:
        """Check a call without sites, and have it ready for the executor.

        Raises:
            ValueError: It does not fit.
        """
        if isinstance(message, m.Forward):
            inputs = self._inputs(message)
            key = (self.session_id, message.id.call)
            return Begun(key, inputs, inputs.positions, partial(self._forward_reply, message))
        call = self._backward_call(message)
        batch, sequence = message.gradient.shape[:2]
        return Begun(call.key, call, batch * sequence, partial(self._backward_reply, message))

    def refusal(self, message: m.Message, error: Exception) -> m.Status:
        """What an edge is told of an error. Raises it where it is nothing for an edge."""
        call = message.id if isinstance(message, m.Forward | m.Backward | m.SiteAnswer) else None
        match error:
            case StashLost():
                return m.Status(
                    m.StatusCode.ACTIVATIONS_LOST, call, "the forward state was evicted; send the input again"
                )
            case NonFiniteError():
                return m.Status.saying(m.StatusCode.NON_FINITE, call, str(error))
            case ValueError() | LookupError() | ConfigError() | PlanError():
                return m.Status.saying(m.StatusCode.BAD_REQUEST, call, str(error))
            case RuntimeError():  # torch's own, out of memory for one; its text could quote values
                log("call_failed", logging.ERROR, error=type(error).__name__, operation=type(message).__name__)
                return m.Status(
                    m.StatusCode.INTERNAL,
                    call,
                    f"the span failed ({type(error).__name__}); the cloud's owner has a log of it",
                )
        raise error

    def _forward(self, message: m.Forward, guests: Guests | None) -> m.ForwardReply:
        inputs = self._inputs(message)
        start = time.perf_counter_ns()
        result = self.executor.forward(
            self.session_id, message.id.call, inputs, keep=message.keep, guests=guests, wanted=message.wanted
        )
        return self._forward_reply(message, result, time.perf_counter_ns() - start)

    def _forward_reply(self, message: m.Forward, result: Forwarded, compute_ns: int) -> m.ForwardReply:
        codec = codec_by_id(message.reply_codec).name
        reached("forward_done")
        hidden = encode(result.hidden, codec, Role.ACTIVATION, "the output of the cloud's layers")
        taps = (encode(each, codec, Role.ACTIVATION, "the output of a tap") for each in result.taps)
        return m.ForwardReply(message.id, hidden, compute_ns, 0, 0, tuple(taps))

    def _backward(self, message: m.Backward, guests: Guests | None) -> m.BackwardReply:
        call = self._backward_call(message)
        start = time.perf_counter_ns()
        result = self.executor.backward(*call.key, call.gradient, call.replay, guests=guests, wanted=message.wanted)
        return self._backward_reply(message, result, time.perf_counter_ns() - start)

    def _backward_call(self, message: m.Backward) -> BackwardCall:
        replay = None if message.replay is None else self._inputs(message)
        gradient = decode(message.gradient, limits=self.limits, what="the gradient for the cloud's layers")
        kept = self.executor.shape_of(self.session_id, message.id.call)  # what is kept comes before a replay
        expected = kept if kept is not None or replay is None else replay.hidden.shape
        if expected is not None and gradient.shape != expected:
            raise ValueError(
                f"a gradient of shape {list(gradient.shape)} does not fit a forward of shape {list(expected)}"
            )
        return BackwardCall((self.session_id, message.id.call), gradient, replay)

    def _backward_reply(self, message: m.Backward, result: Gradients, compute_ns: int) -> m.BackwardReply:
        codec = codec_by_id(message.reply_codec).name
        reached("backward_done")
        what = "the gradient from the cloud's layers"
        payload = None if result.hidden is None else encode(result.hidden, codec, Role.GRADIENT, what)
        lent = tuple(encode(each, "fp32", Role.GRADIENT, "the gradient of a lent matrix") for each in result.lent)
        return m.BackwardReply(message.id, payload, compute_ns, 0, 0, result.recomputed, lent)

    def _inputs(self, message: m.Forward | m.Backward) -> SpanInput:
        """A call's inputs, or those that a backward has sent again, as far as they fit.

        Raises:
            ConfigError: The model is not made for so long a sequence, or for the position ids.
            ValueError: They do not fit otherwise, or the call would take too much memory.
        """
        sent = message.inputs if isinstance(message, m.Forward) else message.replay
        if sent is None:
            raise RuntimeError("a backward that has sent no inputs again has none")
        config, shape = self.executor.host.span.config, sent.hidden.shape
        if len(shape) != 3 or shape[-1] != self.hidden_size:
            raise ValueError(f"hidden states of shape {list(shape)} do not fit [batch, sequence, {self.hidden_size}]")
        batch, sequence = shape[:2]
        if batch * sequence > self.max_tokens:
            raise ValueError(
                f"{batch} x {sequence} tokens in one call; this cloud takes at most {self.max_tokens}: "
                "send less at a time"
            )
        check_positions(config, sequence)
        self._check_memory(message, sent)
        hidden = decode(sent.hidden, limits=self.limits, what="the hidden states for the cloud's layers")
        mask = None if sent.attention_mask is None else decode(sent.attention_mask, limits=self.limits)
        if mask is not None and mask.shape != (batch, sequence):
            raise ValueError(f"an attention mask of shape {list(mask.shape)} does not fit {batch} x {sequence} tokens")
        positions = None if sent.position_ids is None else decode(sent.position_ids, limits=self.limits).long()
        if positions is not None and (
            positions.ndim != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != sequence
        ):
            raise ValueError(f"position ids of shape {list(positions.shape)} do not fit {batch} x {sequence} tokens")
        check_positions(config, sequence, positions)
        return SpanInput(hidden, mask, positions)

    def _check_memory(self, message: m.Forward | m.Backward, sent: m.SpanInputs) -> None:
        """Check that a call can be computed within the worker's memory, and its answer be sent.

        A forward that is kept has to leave room for its backward, which takes more. Raises ValueError.
        """
        batch, sequence, _ = sent.hidden.shape
        what = Pass.FORWARD if isinstance(message, m.Forward) and not message.keep else Pass.BACKWARD
        masked = _is_masked(sent)
        needed = self.executor.memory.of(CallShape(batch, sequence, what, masked, *self.calls.widths(message.sites)))
        self.peak_bytes = max(self.peak_bytes, needed)
        allowed = self.executor.compute_bytes / (2 if message.sites else 1)
        if needed > allowed:
            pausing = ", half of it for one that may pause" if message.sites else ""
            raise ValueError(
                f"a call of {batch} x {sequence} tokens takes about {needed} bytes of memory, and this cloud computes "
                f"within {self.executor.compute_bytes:.0f}{pausing}: send fewer or shorter sequences at a time"
            )
        if isinstance(message, m.Forward) and message.sites:
            codec, widths = codec_by_id(message.reply_codec), (self.hidden_size, *self.calls.taps(message.sites))
            answer = sum(sum(codec.sizes((batch, sequence, width))) for width in widths)
            if answer > self.limits.max_message_bytes:
                raise ValueError(
                    f"the answer with what {len(widths) - 1} taps give of {batch} x {sequence} tokens takes {answer} "
                    f"bytes, and a message {self.limits.max_message_bytes}: tap fewer layers, or narrower, or send "
                    "less at a time"
                )


def _is_masked(inputs: m.SpanInputs) -> bool:
    """Whether attention may need a mask for them."""
    return inputs.attention_mask is not None or inputs.position_ids is not None


# Calls of several sessions in one pass --------------------------------------------------------------------------------

FORWARD, KEPT_FORWARD, BACKWARD = (Kind(name, parallel=True) for name in ("forward", "kept forward", "backward"))
"""Forwards that nothing is kept of, those before a backward, and backwards."""


def kind_of(message: m.Message) -> Kind | None:
    """What a message may share a pass with: calls of its kind without sites. None for nothing."""
    if isinstance(message, m.Forward) and not message.sites and message.wanted:
        return KEPT_FORWARD if message.keep else FORWARD
    return BACKWARD if isinstance(message, m.Backward) and not message.sites and message.wanted else None


Asked = tuple[TenantSession, m.Forward | m.Backward]
Stepping = tuple[TenantSession, m.Forward | m.Backward | m.SiteAnswer]


def step_together(asked: Sequence[Stepping]) -> list[m.Message | Exception]:
    """What `TenantSession.handle` answers to each of several messages of calls with sites, or raises.

    The calls, which are of different sessions, go on together.
    """
    answers: dict[int, m.Message | Exception] = {}
    steps: dict[int, Step] = {}
    for at, (session, message) in enumerate(asked):
        try:
            steps[at] = session.step(message)
        except Exception as error:  # noqa: BLE001  # it is this session's, and no other's
            answers[at] = _refused(session, message, error)
    outcomes = take_steps(list(steps.values()), asked[0][0].executor.host.meetings)
    for (at, step), outcome in zip(steps.items(), outcomes, strict=True):
        session, message = asked[at]
        if isinstance(outcome, Exception):
            session.calls.ended(step)
            answers[at] = _refused(session, message, outcome)
        else:
            answers[at] = session.calls.settle(step, outcome)
    return [answers[at] for at in range(len(asked))]


def handle_together(asked: Sequence[Asked]) -> list[m.Message | Exception]:
    """What `TenantSession.handle` answers to each of several messages of one kind, or raises, computed in one pass.

    Where the pass fails, each is computed by itself, so that only the one at fault hears of it. A backward whose
    forward state the pass has used up is answered that it is lost.
    """
    try:
        return _in_one_pass(asked)
    except Exception as error:  # noqa: BLE001  # whose it is shows below
        log("pass_failed", logging.WARNING, error=type(error).__name__, calls=len(asked))
    # Not above: as long as there is the error, it holds the frames that it passed, and so the pass's tensors.
    return [_by_itself(session, message) for session, message in asked]


def _in_one_pass(asked: Sequence[Asked]) -> list[m.Message | Exception]:
    """See `handle_together`. Raises what the pass raises."""
    answers: dict[int, m.Message | Exception] = {}
    begun: dict[int, Begun] = {}
    for at, (session, message) in enumerate(asked):
        try:
            begun[at] = session.begin(message)
        except Exception as error:  # noqa: BLE001  # it is this session's, and no other's
            answers[at] = _refused(session, message, error)
    start = time.perf_counter_ns()
    results = _computed_together(asked[0], list(begun.values()))
    spent = time.perf_counter_ns() - start
    positions = sum(each.positions for each in begun.values())
    for (at, each), result in zip(begun.items(), results, strict=True):
        session, message = asked[at]
        try:
            if isinstance(result, Exception):
                raise result
            answers[at] = each.reply(result, spent * each.positions // positions)
        except Exception as error:  # noqa: BLE001  # as above
            answers[at] = _refused(session, message, error)
    return [answers[at] for at in range(len(asked))]


def _refused(session: TenantSession, message: m.Message, error: Exception) -> m.Message | Exception:
    try:
        return session.refusal(message, error)
    except Exception as unknown:  # noqa: BLE001  # raised again where the session waits
        return unknown


def _by_itself(session: TenantSession, message: m.Forward | m.Backward) -> m.Message | Exception:
    try:
        return session._computed(message)
    except Exception as error:  # noqa: BLE001  # as above
        return _refused(session, message, error.with_traceback(None))  # whose frames hold memory that others need


def _computed_together(first: Asked, begun: Sequence[Begun]) -> Sequence[Forwarded | Gradients | Exception]:
    """What comes of calls of one kind, that of `first`; a backward's own error where there is one."""
    session, message = first
    if isinstance(message, m.Forward):
        inputs = {each.key: each.call for each in begun if isinstance(each.call, SpanInput)}
        return session.executor.forward_together(inputs, keep=message.keep) if inputs else []
    return session.executor.backward_together([each.call for each in begun if isinstance(each.call, BackwardCall)])
