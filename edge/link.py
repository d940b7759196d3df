"""The link: a connection to a cloud that survives its connections.

A call is a pure function of what is sent, because the backbone is frozen. So whatever breaks (the stream, the worker,
the cloud's memory of a forward), the link opens a new session with new keys and repeats the call; the training loop
sees a delay. An optimizer step is the edge's own and happens once. The link gives up, with an error, when the cloud has
stayed away for `give_up_after` seconds.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from isthmus.backbone.errors import CheckpointError, ConfigError, IsthmusError, NonFiniteError
from isthmus.backbone.plan import SplitPlan
from isthmus.edge.channel import LOOK_SECONDS, Channel, Check, Observer, Traffic
from isthmus.edge.config import DEFAULT_KEY
from isthmus.edge.fetch import fetch_parts
from isthmus.edge.remote_span import RemoteSpan
from isthmus.edge.report import StripTotals
from isthmus.edge.stopping import Interrupted
from isthmus.edge.transport import GrpcTransport, Tls, Transport
from isthmus.protocol import messages as m
from isthmus.protocol.codecs import (
    ACTIVATION_CODECS,
    Payload,
    Role,
    codec_id,
    decode,
    encode,
    encode_mask,
    encode_positions,
)
from isthmus.protocol.enrolment import ConnectionString
from isthmus.protocol.errors import (
    ConnectionLostError,
    FingerprintError,
    LocalProtocolError,
    OverQuotaError,
    RefusedError,
    RemoteProtocolError,
    UnreachableError,
    VersionError,
)
from isthmus.protocol.keys import Fingerprint, load_edge
from isthmus.protocol.session import edge_limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BACKOFF_FIRST, BACKOFF_FACTOR, BACKOFF_MOST = 0.1, 1.7, 5.0  # seconds
PROTOCOL_FAULTS = 5  # in a row: bad luck ends, an attacker or a defect does not
PEAK_SECONDS = 5.0  # a figure of the report is not worth a longer wait

MAX_ATTEMPT = (1 << 16) - 1

R = TypeVar("R", bound=m.Message)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeptCall:
    """A forward whose backward may come: its number, and the session whose stash knows it."""

    call: int
    session: int


def connect(
    address: str,
    *,
    key: str | Path | None = None,
    codec: str = "fp32",
    tls: Tls | None = None,
    connect_timeout: float = 10.0,
    give_up_after: float = 600.0,
    call_timeout: float = 600.0,
) -> Link:
    """Connect to a cloud.

    Args:
        address: the connection string that `isthmus cloud serve` prints: `isthmus://host:port#SHA256:…`.
        key: the edge's private key file; by default ~/.isthmus/edge/id_ed25519, as `isthmus edge keygen` makes it.
        codec: how activations and gradients cross the strip: fp32, bf16, fp16 or int8.
        tls: the outer TLS layer, for `isthmus+tls://` addresses; by default the system's certificates.
        connect_timeout: seconds to wait for the cloud at first.
        give_up_after: seconds that a cloud may stay away later.
        call_timeout: seconds that one call may take before the connection counts as lost.

    Returns:
        An open link; use it as a context manager.

    Raises:
        ConfigError: the address or the codec does not make sense.
        KeyFileError: there is no usable key.
        FingerprintError: the server is not the pinned one.
        NotEnrolledError: the cloud does not know the key.
        UnreachableError: nobody answers.
    """
    where = ConnectionString.parse(address)
    private = load_edge(Path(key or DEFAULT_KEY).expanduser())
    transport = GrpcTransport(where.address, (tls or Tls()) if where.tls else None, min(connect_timeout, 5.0))
    link = Link(
        transport,
        where.pin,
        private,
        name=where.address,
        codec=codec,
        give_up_after=give_up_after,
        call_timeout=call_timeout,
    )
    link.open(connect_timeout)
    return link


class Link:
    """A link to one cloud. Not for several threads at once: calls wait for each other.

    Args:
        transport: opens streams to the cloud.
        pin: fingerprint of the cloud's root key.
        key: the edge's key.
        name: the cloud's name in messages.
        codec: how activations and gradients are sent, and asked to be answered.
        give_up_after: seconds that the cloud may stay away.
        call_timeout: seconds that one call may take.
        observer: told of each phase of each question; for tests and benchmarks.
    """

    def __init__(
        self,
        transport: Transport,
        pin: Fingerprint,
        key: Ed25519PrivateKey,
        *,
        name: str,
        codec: str = "fp32",
        give_up_after: float = 600.0,
        call_timeout: float = 600.0,
        observer: Observer = lambda question, phase: None,
    ) -> None:
        if codec not in ACTIVATION_CODECS:
            raise ConfigError(f"unknown codec {codec!r}: choose one of {', '.join(ACTIVATION_CODECS)}")
        self.traffic = Traffic()
        self.observer = observer
        self._transport = transport
        self._pin = pin
        self._key = key
        self._name = name
        self._codec = codec
        self._give_up_after = give_up_after
        self._call_timeout = call_timeout
        self._link_id = os.urandom(16)
        self._channel: Channel | None = None
        self._info: m.SessionInfo | None = None
        self._lock = threading.RLock()
        self._parts_folder: Path | None = None
        self._closed = False
        self._calls = 0
        self._step = 0
        self._check: Check = lambda: None
        self._jitter = random.Random()  # noqa: S311 - spreads reconnects, is no secret

    @property
    def info(self) -> m.SessionInfo:
        """What the cloud serves: the model's name and digest, the plan, limits."""
        if self._info is None:
            raise UnreachableError(f"the link to {self._name} has never been open: call open()")
        return self._info

    @property
    def plan(self) -> SplitPlan:
        """Who holds which layers."""
        return SplitPlan.parse(self.info.plan, self.info.n_layers)

    @property
    def step(self) -> int:
        """The optimizer step that calls belong to at present; 0 before the first."""
        return self._step

    def open(self, timeout: float) -> None:
        """Open the first session, within `timeout` seconds."""
        with self._lock:
            self._retrying(timeout, lambda attempt: self._session(), since=time.monotonic())

    def load_model(self, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole architecture as a transformers model whose middle layers run in the cloud.

        The edge's own layers, the embedding, the norm and the head are fetched once and kept in the cache; layers keep
        their original numbers, and the cloud's have no weights here.
        """
        from isthmus.backbone.parts import load_edge_parts

        model = load_edge_parts(
            self._parts(), self.plan, RemoteSpan(self), dtype=dtype, attn_implementation=self.info.attn_implementation
        )
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from isthmus.backbone.sources import load_tokenizer

        return load_tokenizer(self._parts())

    def forward_span(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, *, keep: bool
    ) -> tuple[Tensor, KeptCall]:
        """Run the cloud's span; see `isthmus.edge.remote_span.SpanLink`."""
        sent = self._inputs(hidden, attention_mask, position_ids)
        with self._lock:
            self._calls += 1
            call, codec = self._calls, codec_id(self._codec)
            reply = self._call(
                m.ForwardReply,
                lambda attempt: m.Forward(
                    m.CallId(self._step, call, attempt),
                    keep,
                    sent.hidden,
                    sent.attention_mask,
                    sent.position_ids,
                    codec,
                ),
            )
            return self._result(reply.hidden, hidden.shape), KeptCall(call, self.traffic.sessions)

    def backward_span(
        self,
        kept: KeptCall,
        gradient: Tensor,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        """The gradient of the span's input; see `isthmus.edge.remote_span.SpanLink`."""
        sent = encode(_finite(gradient, "the gradient for the cloud's layers"), self._codec, Role.GRADIENT)
        lost = False

        def question(attempt: int) -> m.Backward:
            # A stash lives as long as its session: after a reconnect the input goes along without being asked for.
            again = lost or kept.session != self.traffic.sessions
            replay = self._inputs(hidden, attention_mask, position_ids) if again else None
            return m.Backward(m.CallId(self._step, kept.call, attempt), sent, replay, codec_id(self._codec))

        with self._lock:
            try:
                reply = self._call(m.BackwardReply, question)
            except _StashLostError:
                lost = True
                self.traffic.retries += 1
                try:
                    reply = self._call(m.BackwardReply, question)
                except _StashLostError:
                    raise RemoteProtocolError(
                        "the cloud says that it lost a forward state whose input it was just sent"
                    ) from None
            return self._result(reply.gradient, hidden.shape)

    def begin_step(self, step: int) -> None:
        """Name the optimizer step that the next calls belong to."""
        self._step = step

    def watch(self, check: Check) -> None:
        """Have `check` called a few times a second while the link waits; what it raises ends the wait.

        Without it only an exception, a KeyboardInterrupt say, ends a wait before its time.
        """
        self._check = check

    def totals(self) -> StripTotals:
        """What has crossed the strip so far, and where the time went."""
        t = self.traffic
        cloud = t.compute_ns + t.queue_ns
        return StripTotals(
            bytes_up=t.bytes_up,
            bytes_down=t.bytes_down,
            calls=t.calls,
            wire_s=max(0, t.asking_ns - t.crypto_ns - cloud) / 1e9,
            crypto_s=t.crypto_ns / 1e9,
            cloud_s=cloud / 1e9,
            retries=t.retries,
        )

    def cloud_peak_bytes(self) -> int | None:
        """The worker's largest resident memory so far, in bytes; None where the cloud does not say it soon."""
        with self._lock:
            try:
                return self._call(m.Pong, m.Ping, patience=PEAK_SECONDS, timeout=PEAK_SECONDS).peak_bytes
            except IsthmusError:
                self._drop()  # a late answer must not be taken for that to another question
                return None

    def close(self) -> None:
        """Say goodbye and close."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            self._transport.close()
            self._closed = True

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Below: one call, and what to do when it breaks -------------------------------------------------------------------

    def _parts(self) -> Path:
        with self._lock:
            if self._parts_folder is None:
                self._parts_folder = fetch_parts(self.info, self._call)
            return self._parts_folder

    def _inputs(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> m.SpanInputs:
        tokens, limit = hidden.shape[0] * hidden.shape[1], self.info.limits.max_tokens_per_call
        if tokens > limit:  # the cloud would cut the stream in the middle of a message that is far too large
            raise RefusedError(
                f"{hidden.shape[0]} x {hidden.shape[1]} tokens in one call; the cloud takes at most {limit}: "
                "use smaller batches"
            )
        return m.SpanInputs(
            encode(_finite(hidden, "the hidden states for the cloud's layers"), self._codec, Role.ACTIVATION),
            None if attention_mask is None else encode_mask(attention_mask),
            None if position_ids is None else encode_positions(position_ids),
        )

    def _result(self, payload: Payload, expected: torch.Size) -> Tensor:
        tensor = decode(payload, limits=edge_limits(self.info))
        if tensor.shape != expected:
            raise RemoteProtocolError(f"the cloud answered with shape {list(tensor.shape)} instead of {list(expected)}")
        return tensor

    def _call(
        self,
        kind: type[R],
        question: Callable[[int], m.Message],
        *,
        patience: float | None = None,
        timeout: float | None = None,
    ) -> R:
        """Ask until there is an answer of this kind."""
        if timeout is None:
            timeout = self._call_timeout
        if patience is None:
            patience = self._give_up_after

        def once(attempt: int) -> R:
            channel = self._session()
            asked = question(attempt)
            answer = channel.ask(asked, timeout)
            if isinstance(answer, m.Status):
                raise _error(answer)
            if not isinstance(answer, kind) or getattr(answer, "id", None) != getattr(asked, "id", None):
                raise RemoteProtocolError(f"the cloud answered {type(asked).__name__} with {type(answer).__name__}")
            return answer

        start = time.perf_counter_ns()
        try:
            answer = self._retrying(patience, once)
        finally:
            self.traffic.asking_ns += time.perf_counter_ns() - start
        self.traffic.calls += 1
        if isinstance(answer, m.ForwardReply | m.BackwardReply):
            self.traffic.compute_ns += answer.compute_ns
            self.traffic.queue_ns += answer.queue_ns
            self.traffic.crypto_ns += answer.crypto_ns
        return answer

    def _retrying(self, patience: float, work: Callable[[int], T], since: float | None = None) -> T:
        """Do `work` until it succeeds, for `patience` seconds from the first failure (or from `since`) on."""
        if self._closed:
            raise LocalProtocolError(
                f"the link to {self._name} is closed: use its model inside `with connect(…) as link:`"
            )
        attempt = faults = 0
        pause = BACKOFF_FIRST
        deadline = None if since is None else since + patience
        while True:
            try:
                return work(attempt)
            except ConnectionLostError as error:
                reason = str(error)
                faults = 0
            except (RemoteProtocolError, FingerprintError, VersionError) as error:
                # Once a cloud has been reached, a hello that does not fit may as well be one that was changed on its
                # way; before, it is most likely another server's, or of another version.
                if self._info is None and not isinstance(error, RemoteProtocolError):
                    raise
                reason = str(error)
                faults += 1
                if faults == PROTOCOL_FAULTS:
                    raise
            except (Interrupted, KeyboardInterrupt):
                self._drop()  # a question may be half sent, or its answer half received
                raise
            self._drop()
            now = time.monotonic()
            deadline = deadline or now + patience
            if now >= deadline:
                raise UnreachableError(
                    f"the cloud at {self._name} stayed away for {patience:.0f} s ({reason}): "
                    "check that it runs and can be reached"
                )
            self._pause(min(pause * self._jitter.uniform(0.5, 1.0), deadline - now))
            pause = min(pause * BACKOFF_FACTOR, BACKOFF_MOST)
            attempt = min(attempt + 1, MAX_ATTEMPT)
            self.traffic.retries += 1

    def _pause(self, seconds: float) -> None:
        """Sleep, and look now and then whether there is still something to wait for."""
        while seconds > 0:
            self._check()
            time.sleep(min(seconds, LOOK_SECONDS))
            seconds -= LOOK_SECONDS
        self._check()

    def _session(self) -> Channel:
        """The open channel, or a new one."""
        if self._channel is not None:
            return self._channel
        try:
            stream = self._transport.open()
            channel = Channel(
                stream, self._pin, self._key, self._link_id, self.traffic, self._observe, self._still_wanted
            )
        except RefusedError as error:
            if self._info is None:
                raise
            raise ConnectionLostError(
                str(error)
            ) from None  # it took us before, and may again: a worker that drains, say
        if self._info is not None and _identity(channel.info) != _identity(self._info):
            channel.close()
            raise CheckpointError(
                f"the cloud at {self._name} now serves {_described(channel.info)}, another model than "
                f"{_described(self._info)} before: start the run anew, or serve the old model again"
            )
        if self._codec not in channel.info.codecs:
            channel.close()
            raise ConfigError(
                f"the cloud does not speak the codec {self._codec!r}: choose one of {', '.join(channel.info.codecs)}"
            )
        self._info = channel.info
        self._channel = channel
        return channel

    def _still_wanted(self) -> None:
        self._check()  # looked up each time, as the observer is

    def _observe(self, question: str, phase: str) -> None:
        self.observer(question, phase)  # looked up each time: it may be replaced while a channel is open

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.abandon()
            self._channel = None


class _StashLostError(Exception):
    """The cloud has forgotten a forward: its input has to go along with the backward."""


def _identity(info: m.SessionInfo) -> tuple[str, ...]:
    """What has to stay the same for the span to give the same numbers."""
    return info.digest, info.plan, info.span_dtype, info.attn_implementation


def _described(info: m.SessionInfo) -> str:
    return (
        f"{info.model} (digest {info.digest[:16]}) split {info.plan} in {info.span_dtype} with "
        f"{info.attn_implementation} attention"
    )


def _error(status: m.Status) -> Exception:
    match status.code:
        case m.StatusCode.STASH_LOST:
            return _StashLostError()
        case m.StatusCode.NON_FINITE:
            return NonFiniteError(f"the cloud's layers gave no finite numbers: {status.message}")
        case m.StatusCode.DRAINING:
            return ConnectionLostError(status.message)
        case m.StatusCode.OVER_QUOTA:
            return OverQuotaError(f"the cloud refused the call (over quota): {status.message}")
        case _:
            return RefusedError(
                f"the cloud refused the call ({status.code.name.lower().replace('_', ' ')}): {status.message}"
            )


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(
            f"{what} hold NaN or infinity: lower the learning rate, or look for bad values in the adapter"
        )
    return tensor
