"""One tenant's session above the protocol: a message comes in, a message goes out. It has no sockets and no threads.

`TenantSession.handle` may take as long as a forward takes, so the server runs it on a compute thread. A call with sites
runs on a thread of its own, which takes turns with the compute thread (`isthmus.cloud.engine.paused_calls`). Calls of
several sessions that are computed at once are in `isthmus.cloud.session.batched_calls`.

Which forms a tensor may have is checked where a message is read (`isthmus.protocol.encoding`), and what of this cloud a
call may take in `isthmus.cloud.session.call_bounds`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from isthmus.backbone.split.span import FrozenSpan, SpanInput, check_position_ids
from isthmus.cloud.decoding.decode_calls import CacheIsLost, DecodeCall, Decoding
from isthmus.cloud.engine.activation_cache import ActivationsLost, Key
from isthmus.cloud.engine.call_sites import CallSites
from isthmus.cloud.engine.executor import BackwardCall, Executor, Forwarded, Gradients
from isthmus.cloud.engine.paused_batches import Step
from isthmus.cloud.engine.requests import Kind
from isthmus.cloud.session.call_bounds import CallBounds, hidden_shape
from isthmus.cloud.session.file_store import FileStore
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
    m.FileSet.MODEL: "only the workers of this cloud may fetch its model",
    m.FileSet.ADAPTERS: "only the workers of this cloud may fetch other tenants' adapters",
}

FORWARD, KEPT_FORWARD, BACKWARD = (Kind(name, parallel=True) for name in ("forward", "kept forward", "backward"))
"""Forwards that nothing is kept of, those before a backward, and backwards."""


def kind_of(message: m.Message) -> Kind | None:
    """The kind of a call without sites, with whose calls it may share a pass; None for every other message."""
    if isinstance(message, m.Forward) and not message.sites and message.wanted and message.plan is None:
        return KEPT_FORWARD if message.keep else FORWARD
    return BACKWARD if isinstance(message, m.Backward) and not message.sites and message.wanted else None


@dataclass(frozen=True, slots=True)
class OfferedPackage:
    """A package that edges may fetch.

    Attributes:
        files: its files.
        about: what a list of packages says of it.
    """

    files: FileStore
    about: str


@dataclass(frozen=True, slots=True)
class CheckedCall:
    """A call that was checked and decoded, and can be computed.

    Attributes:
        key: session and number of the call.
        call: what the executor computes.
        positions: token positions.
        reply: makes the answer from the executor's result and the nanoseconds that it took.
    """

    key: Key
    call: SpanInput | BackwardCall
    positions: int
    reply: Callable[[Any, int], m.Message]


@dataclass(slots=True)
class TenantSession:
    """Answers the messages of one session.

    Args:
        session_id: the session's id, which keys its entries in the activation cache.
        executor: the span that every session of this worker shares.
        stores: make the files that it may fetch.
        adapters: the tenant's own adapters.
        calls: runs the calls with sites.
        decoding: what decode calls share.
        hidden_size: size of the last dimension of hidden states.
        max_tokens: largest batch x sequence of one call.
        limits: what the session accepts; the tensors of a call are within them.
        packages: packages whose files it may fetch, by name.
        middles: their middles, where these are a part of the span, by split plan.
    """

    session_id: bytes
    executor: Executor
    stores: Mapping[m.FileSet, Callable[[], FileStore | m.Status]]
    adapters: TenantAdapters
    calls: SiteCalls
    decoding: Decoding
    hidden_size: int
    max_tokens: int
    limits: Limits = DEFAULT_LIMITS
    packages: Mapping[str, OfferedPackage] = field(default_factory=dict)
    middles: Mapping[str, FrozenSpan] = field(default_factory=dict)
    _bounds: CallBounds = field(init=False)

    def __post_init__(self) -> None:
        lists = self.calls.lists
        self._bounds = CallBounds(self.session_id, self.executor, lists, self.hidden_size, self.max_tokens, self.limits)

    def handle(self, message: m.Message, compute: Compute = at_once) -> m.Message | None:
        """Answer one message; None for a message that wants no answer.

        Bad requests and evicted forward states become a `Status`; the session goes on after it.

        Args:
            message: what came.
            compute: has something computed on a compute thread, for messages that are handled on another thread.
        """
        match message:
            case m.Sites():
                *_, answer = self.bind(message)
                return answer
            case m.Forward() | m.Backward() | m.SiteAnswer() | m.Lease():
                try:
                    return self.computed(message)
                except Exception as error:  # noqa: BLE001  # `refusal` raises what is no refusal
                    return self.refusal(message, error)
            case m.FetchList():
                store = self._store(message)
                return store if isinstance(store, m.Status) else store.listing()
            case m.Fetch():
                store = self._store(message)
                return store if isinstance(store, m.Status) else store.read(message.name, message.offset)
            case m.Put():
                return self.adapters.put(message)
            case m.PlugIn():
                return self.adapters.plug_in(message, compute)
            case m.Ping():
                return m.Pong(message.nonce, self._bounds.peak_bytes)  # the process's peak would tell of other tenants
            case m.Goodbye():
                return None
            case _:
                raise MessageError(f"an edge may not send {type(message).__name__}")

    def bind(self, message: m.Sites) -> Iterator[m.Message | None]:
        """Take a list of sites step by step: every step yields None, the last one the answer."""
        try:
            yield from self.calls.lists.bind(message)
        except Exception as error:  # noqa: BLE001  # `refusal` raises what is no refusal
            yield self.refusal(message, error)

    def close(self) -> None:
        """Forget the session's forward states, keys and values, and end its paused calls."""
        self.calls.close()
        self.executor.cache.release(self.session_id)
        self.decoding.pool.release(self.session_id)

    def _store(self, message: m.FetchList | m.Fetch) -> FileStore | m.Status:
        which = message.file_set
        if which == m.FileSet.EMULATOR and self.packages:
            return self._package(message.package)
        make = self.adapters.files if which == m.FileSet.ADAPTER else self.stores.get(which, lambda: None)
        return make() or m.Status(m.StatusCode.BAD_REQUEST, None, _EMPTY[which])

    def _package(self, name: str | None) -> FileStore | m.Status:
        """The files of a package; without a name, of the only one."""
        if name is None and len(self.packages) == 1:
            (name,) = self.packages
        if name is not None and name in self.packages:
            return self.packages[name].files
        listed = ", ".join(f"{each} ({offered.about})" for each, offered in self.packages.items())
        what = f"the cloud offers no package {name!r}" if name else "the cloud offers several packages"
        return m.Status.saying(
            m.StatusCode.BAD_REQUEST,
            None,
            f"{what}: fetch one by name, with --package: {listed}",
        )

    def decode_call(self, message: m.Decode) -> DecodeCall:
        """A decode call, which is computed in steps. The event loop may ask.

        Raises:
            ConfigError: the model is not made for so long a sequence.
            ValueError: its shape does not fit, or a step takes too much memory.
        """
        self.check_bounds(message)
        tenant, inputs = self.adapters.tenant.name, partial(self._inputs, message.inputs)
        call = DecodeCall(self.decoding, self.session_id, tenant, message, inputs, self.calls.lists.leased_at)
        for step in call.steps():
            self._bounds.check_needed(step.nbytes, message.hidden, self.executor.compute_bytes)
        return call

    # Calls ------------------------------------------------------------------------------------------------------------

    def computed(self, message: m.Forward | m.Backward | m.SiteAnswer | m.Lease) -> m.Message:
        """The answer to a message that is handled on a compute thread, computed for this session alone.

        Raises:
            Exception: whatever `refusal` makes an answer of, and what it does not know.
        """
        match message:
            case m.Lease():
                return self.calls.lists.lease(message)
            case m.Forward() | m.Backward() if not message.sites:
                return self._run(message, None)
            case _:
                return self.calls.take(self.step(message))

    def step(self, message: m.Forward | m.Backward | m.SiteAnswer) -> Step:
        """The next step of a call with sites: its first one, or the one after the edge's answer.

        Raises:
            LookupError: there is no such list of sites, lease, or question.
            ValueError: too many calls have paused, no thread is free, or the call takes too much memory.
        """
        if isinstance(message, m.SiteAnswer):
            return self.calls.answer(message)
        return self.calls.begin(message, partial(self._run, message), self.call_bytes(message))

    def kind_of(self, message: m.Message) -> Kind | None:
        """The kind whose work a message may be computed together with; None for none. The event loop may ask."""
        if isinstance(message, m.SiteAnswer) or (isinstance(message, m.Forward | m.Backward) and message.sites):
            return self.calls.kind(message)
        return kind_of(message)

    def positions(self, message: m.Message) -> int:
        """Token positions that a message wants computed. The event loop may ask."""
        if isinstance(message, m.SiteAnswer):
            return self.calls.positions(message)
        if not isinstance(message, m.Forward | m.Backward | m.Decode):
            return 0
        batch, sequence, _ = hidden_shape(message)
        return batch * sequence

    def call_bytes(self, message: m.Message) -> int:
        """The memory that a call takes while it is computed; 0 for what is no call, or will be refused.

        The event loop may ask.
        """
        if not isinstance(message, m.Forward | m.Backward):
            return 0
        shape = self._bounds.call_shape(message)
        if shape is None:
            return 0
        if not message.sites and self._bounds.most_bytes(shape) > self.executor.compute_bytes:
            return 0  # a call with sites is refused where it claims its thread
        return self.executor.memory.of(shape)

    def check_bounds(self, message: m.Forward | m.Backward | m.Decode) -> None:
        """Check that a call is not too large for this cloud. The event loop may ask.

        Raises:
            ConfigError: the model is not made for so long a sequence.
            ValueError: its shape does not fit, the call takes too much memory, or no offered package has its plan.
        """
        if isinstance(message, m.Forward) and message.plan is not None and message.plan not in self.middles:
            raise ValueError(
                f"the cloud offers no package of the split {message.plan} whose middle is a part of its own layers: "
                "ask its owner to offer one, or to serve with this split; the cloud's own split needs no plan"
            )
        if isinstance(message, m.Decode):
            self._bounds.check_shape(message.hidden, before=message.start)
            return
        sent = message.inputs if isinstance(message, m.Forward) else message.replay
        if sent is not None:
            self._bounds.check_shape(sent.hidden)
            self._bounds.check_memory(message)

    def check(self, message: m.Forward | m.Backward) -> CheckedCall:
        """Check a call against this cloud, and decode its tensors.

        Raises:
            ConfigError: the model is not made for so long a sequence, or for its position ids.
            ValueError: a shape does not fit, or the call takes too much memory.
        """
        key = (self.session_id, message.id.call)
        self.check_bounds(message)
        if isinstance(message, m.Forward):
            inputs = self._inputs(message.inputs)
            return CheckedCall(key, inputs, inputs.positions, partial(self._forward_reply, message))
        replay = None if message.replay is None else self._inputs(message.replay)
        what = "the gradient for the cloud's layers"
        gradient = decode(message.gradient, limits=self.limits, what=what, device=self.executor.device)
        batch, sequence, _ = gradient.shape
        call = BackwardCall(key, gradient, replay)
        return CheckedCall(key, call, batch * sequence, partial(self._backward_reply, message))

    def refusal(self, message: m.Message, error: Exception) -> m.Status | m.CacheLost:
        """The answer to a message that raised an error. Raises the error itself where an edge must not see it."""
        call = message.id if isinstance(message, m.Forward | m.Backward | m.Decode | m.SiteAnswer) else None
        match error:
            case CacheIsLost() if call is not None:
                return m.CacheLost(call, error.have)
            case ActivationsLost():
                return m.Status(
                    m.StatusCode.ACTIVATIONS_LOST, call, "the forward state was evicted; send the input again"
                )
            case NonFiniteError():
                return m.Status.saying(m.StatusCode.NON_FINITE, call, str(error))
            case ValueError() | LookupError() | ConfigError() | PlanError():
                return m.Status.saying(m.StatusCode.BAD_REQUEST, call, str(error))
            case RuntimeError():  # torch's own, such as out of memory; its text could quote values
                log("call_failed", logging.ERROR, error=type(error).__name__, operation=type(message).__name__)
                return m.Status(
                    m.StatusCode.INTERNAL,
                    call,
                    f"the span failed ({type(error).__name__}); the cloud's owner has a log of it",
                )
        raise error

    def _run(self, message: m.Forward | m.Backward, sites: CallSites | None) -> m.Message:
        """Compute one call by itself."""
        checked = self.check(message)
        start = time.perf_counter_ns()
        result: Forwarded | Gradients
        if isinstance(message, m.Forward) and isinstance(checked.call, SpanInput) and message.plan is not None:
            result = self.executor.forward_part(self.middles[message.plan], checked.call)
        elif isinstance(message, m.Forward) and isinstance(checked.call, SpanInput):
            result = self.executor.forward(
                *checked.key, checked.call, keep=message.keep, sites=sites, wanted=message.wanted
            )
        elif isinstance(checked.call, BackwardCall):
            given, replay = checked.call.gradient, checked.call.replay
            result = self.executor.backward(*checked.key, given, replay, sites=sites, wanted=message.wanted)
        return checked.reply(result, time.perf_counter_ns() - start)

    def _forward_reply(self, message: m.Forward, result: Forwarded, compute_ns: int) -> m.ForwardReply:
        codec = codec_by_id(message.reply_codec).name
        hidden = encode(result.hidden, codec, Role.ACTIVATION, "the output of the cloud's layers")
        taps = (encode(each, codec, Role.ACTIVATION, "the output of a tap") for each in result.taps)
        return m.ForwardReply(message.id, hidden, compute_ns, 0, 0, tuple(taps))

    def _backward_reply(self, message: m.Backward, result: Gradients, compute_ns: int) -> m.BackwardReply:
        codec = codec_by_id(message.reply_codec).name
        what = "the gradient from the cloud's layers"
        payload = None if result.hidden is None else encode(result.hidden, codec, Role.GRADIENT, what)
        leased = tuple(encode(each, "fp32", Role.GRADIENT, "the gradient of a leased matrix") for each in result.leased)
        return m.BackwardReply(message.id, payload, compute_ns, 0, 0, result.recomputed, leased)

    # Checks -----------------------------------------------------------------------------------------------------------

    def _inputs(self, sent: m.SpanInputs) -> SpanInput:
        """The span's inputs, whose shape was checked, decoded: a call's own, or those that a backward has sent again.

        Raises ConfigError where the model is not made for the position ids.
        """
        positions = None if sent.position_ids is None else decode(sent.position_ids, limits=self.limits).long()
        check_position_ids(self.executor.host.span.longest, positions)
        what, device = "the hidden states for the cloud's layers", self.executor.device
        hidden = decode(sent.hidden, limits=self.limits, what=what, device=device)
        mask = None if sent.attention_mask is None else decode(sent.attention_mask, limits=self.limits)
        return SpanInput(hidden, mask, positions)
