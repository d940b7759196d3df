"""One tenant's session above the protocol: a message comes in, a message goes out. No sockets and no threads.

`TenantSession.handle` may take as long as a forward takes; the server runs it on the compute thread. A call with sites
runs on a thread of its own, which takes turns with that one (`isthmus.cloud.pausing`).
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from isthmus.backbone.errors import ConfigError, NonFiniteError, PlanError
from isthmus.cloud.adapters import TenantAdapters
from isthmus.cloud.executor import Executor, Guests, SpanInput, StashLost
from isthmus.cloud.logs import log
from isthmus.cloud.shelf import FileShelf
from isthmus.cloud.site_calls import SiteCalls
from isthmus.protocol import messages as m
from isthmus.protocol.codecs import Role, codec_by_id, decode, encode
from isthmus.protocol.errors import MessageError
from isthmus.protocol.limits import DEFAULT_LIMITS, Limits

_EMPTY = {
    m.Shelf.PARTS: "the cloud offers no parts of its model: ask its owner",
    m.Shelf.EMULATOR: "the cloud offers no package: ask its owner for one (`isthmus cloud serve --emulator`)",
    m.Shelf.ADAPTER: "no adapter of yours is plugged in: return one first (`isthmus emulator return`)",
}


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
    """

    session_id: bytes
    executor: Executor
    shelves: Mapping[m.Shelf, FileShelf]
    adapters: TenantAdapters
    calls: SiteCalls
    hidden_size: int
    max_tokens: int
    limits: Limits = DEFAULT_LIMITS

    def handle(self, message: m.Message) -> m.Message | None:
        """Answer one message; None for those that want no answer.

        Bad requests and evicted stashes become a `Status`; the session goes on after it.
        """
        match message:
            case m.Forward():
                return self._guard(
                    "forward", message.id, lambda: self.calls.begin(message, partial(self._forward, message))
                )
            case m.Backward():
                return self._guard(
                    "backward", message.id, lambda: self.calls.begin(message, partial(self._backward, message))
                )
            case m.SiteAnswer():
                return self._guard("site answer", message.id, lambda: self.calls.answer(message))
            case m.Sites():
                return self._guard("sites", None, lambda: self.calls.bind(message))
            case m.Lease():
                return self._guard("lease", None, lambda: self.calls.lease(message))
            case m.FetchList():
                shelf = self._shelf(message.shelf)
                return shelf if isinstance(shelf, m.Status) else shelf.listing()
            case m.Fetch():
                shelf = self._shelf(message.shelf)
                return shelf if isinstance(shelf, m.Status) else shelf.read(message.name, message.offset)
            case m.Put():
                return self.adapters.put(message)
            case m.PlugIn():
                return self.adapters.plug_in(message)
            case m.Ping():
                return m.Pong(message.nonce, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            case m.Goodbye():
                return None
            case _:
                raise MessageError(f"an edge may not send {type(message).__name__}")

    def close(self) -> None:
        """Forget the session's forward states, and end what has paused."""
        self.calls.close()
        self.executor.release(self.session_id)

    def _shelf(self, which: m.Shelf) -> FileShelf | m.Status:
        shelf = self.adapters.shelf() if which == m.Shelf.ADAPTER else self.shelves.get(which)
        return m.Status(m.StatusCode.BAD_REQUEST, None, _EMPTY[which]) if shelf is None else shelf

    def _guard(self, operation: str, call: m.CallId | None, work: Callable[[], m.Message]) -> m.Message:
        try:
            return work()
        except StashLost:
            return m.Status(m.StatusCode.STASH_LOST, call, "the forward state was evicted; send the input again")
        except NonFiniteError as error:
            return m.Status.saying(m.StatusCode.NON_FINITE, call, str(error))
        except (ValueError, LookupError, ConfigError, PlanError) as error:
            return m.Status.saying(m.StatusCode.BAD_REQUEST, call, str(error))
        except RuntimeError as error:  # torch's own, out of memory for one; its text could quote values
            log("call_failed", logging.ERROR, error=type(error).__name__, operation=operation)
            return m.Status(
                m.StatusCode.INTERNAL,
                call,
                f"the span failed ({type(error).__name__}); the cloud's owner has a log of it",
            )

    def _forward(self, message: m.Forward, guests: Guests | None) -> m.ForwardReply:
        inputs = self._inputs(message.inputs)
        start = time.perf_counter_ns()
        result = self.executor.forward(
            self.session_id, message.id.call, inputs, keep=message.keep, guests=guests, wanted=message.wanted
        )
        compute = time.perf_counter_ns() - start
        codec = codec_by_id(message.reply_codec).name
        hidden, *taps = (encode(each, codec, Role.ACTIVATION) for each in (result.hidden, *result.taps))
        return m.ForwardReply(message.id, hidden, compute, 0, 0, tuple(taps))

    def _backward(self, message: m.Backward, guests: Guests | None) -> m.BackwardReply:
        gradient = decode(message.gradient, limits=self.limits)
        replay = None if message.replay is None else self._inputs(message.replay)
        kept = self.executor.shape_of(self.session_id, message.id.call)  # what is kept comes before a replay
        expected = kept if kept is not None or replay is None else replay.hidden.shape
        if expected is not None and gradient.shape != expected:
            raise ValueError(
                f"a gradient of shape {list(gradient.shape)} does not fit a forward of shape {list(expected)}"
            )
        start = time.perf_counter_ns()
        result = self.executor.backward(
            self.session_id, message.id.call, gradient, replay, guests=guests, wanted=message.wanted
        )
        compute = time.perf_counter_ns() - start
        codec = codec_by_id(message.reply_codec).name
        payload = None if result.hidden is None else encode(result.hidden, codec, Role.GRADIENT)
        lent = tuple(encode(each, "fp32", Role.GRADIENT) for each in result.lent)
        return m.BackwardReply(message.id, payload, compute, 0, 0, result.recomputed, lent)

    def _inputs(self, sent: m.SpanInputs) -> SpanInput:
        hidden = decode(sent.hidden, limits=self.limits)
        if hidden.ndim != 3 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden states of shape {list(hidden.shape)} do not fit [batch, sequence, {self.hidden_size}]"
            )
        batch, sequence = hidden.shape[:2]
        if batch * sequence > self.max_tokens:
            raise ValueError(
                f"{batch} x {sequence} tokens in one call; this cloud takes at most {self.max_tokens}: "
                "send less at a time"
            )
        mask = None if sent.attention_mask is None else decode(sent.attention_mask, limits=self.limits)
        if mask is not None and mask.shape != (batch, sequence):
            raise ValueError(f"an attention mask of shape {list(mask.shape)} does not fit {batch} x {sequence} tokens")
        positions = None if sent.position_ids is None else decode(sent.position_ids, limits=self.limits).long()
        if positions is not None and (
            positions.ndim != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != sequence
        ):
            raise ValueError(f"position ids of shape {list(positions.shape)} do not fit {batch} x {sequence} tokens")
        return SpanInput(hidden, mask, positions)
