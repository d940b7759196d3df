"""The link: a connection to a cloud that survives its connections.

A call is a pure function of what is sent, because the backbone is frozen. So whatever breaks (the stream, the worker,
the cloud's memory of a forward), the link opens a new session with new keys and repeats the call; the training loop
sees a delay. An optimizer step is the edge's own and happens once. The link gives up, with an error, when the cloud has
stayed away for `give_up_after` seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isthmus.backbone.errors import IsthmusError, NonFiniteError
from isthmus.backbone.plan import SplitPlan
from isthmus.edge.config import DEFAULT_KEY
from isthmus.edge.fetch import fetch_adapter, fetch_package, fetch_parts
from isthmus.edge.giveback import return_adapter
from isthmus.edge.remote_span import RemoteSpan
from isthmus.edge.report import StripTotals
from isthmus.edge.retry import LastingLink, StashLostError
from isthmus.edge.transport import GrpcTransport, Tls
from isthmus.protocol import messages as m
from isthmus.protocol.codecs import (
    Payload,
    Role,
    codec_id,
    decode,
    encode,
    encode_mask,
    encode_positions,
)
from isthmus.protocol.enrolment import ConnectionString
from isthmus.protocol.errors import RefusedError, RemoteProtocolError
from isthmus.protocol.keys import load_edge
from isthmus.protocol.session import edge_limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from isthmus.emulator.package import Package

PEAK_SECONDS = 5.0  # a figure of the report is not worth a longer wait


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


class Link(LastingLink):
    """A link to one cloud. Not for several threads at once: calls wait for each other.

    `LastingLink` has the arguments; `connect` makes one from a connection string.
    """

    _parts_folder: Path | None = None
    _calls = 0
    _step = 0

    @property
    def plan(self) -> SplitPlan:
        """Who holds which layers."""
        return SplitPlan.parse(self.info.plan, self.info.n_layers)

    @property
    def step(self) -> int:
        """The optimizer step that calls belong to at present; 0 before the first."""
        return self._step

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
            except StashLostError:
                lost = True
                self.traffic.retries += 1
                try:
                    reply = self._call(m.BackwardReply, question)
                except StashLostError:
                    raise RemoteProtocolError(
                        "the cloud says that it lost a forward state whose input it was just sent"
                    ) from None
            return self._result(reply.gradient, hidden.shape)

    def fetch_package(self, out: Path) -> Package:
        """Fetch the package that the cloud offers into the folder `out`, verified; see `isthmus.edge.fetch`."""
        with self._lock:
            return fetch_package(self.info, self._call, out, self._pin)

    def return_adapter(self, folder: Path) -> str:
        """Bring an adapter to the cloud and have it plugged in; returns what the cloud says."""
        with self._lock:
            return return_adapter(self.info, self._call, folder)

    def plugged_adapter(self) -> Path:
        """The folder of the adapter that this tenant has plugged in, in the cache: `load_adapter` takes it."""
        with self._lock:
            return fetch_adapter(self.info, self._call, self._parts(), self.plan)

    def begin_step(self, step: int) -> None:
        """Name the optimizer step that the next calls belong to."""
        self._step = step

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


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(
            f"{what} hold NaN or infinity: lower the learning rate, or look for bad values in the adapter"
        )
    return tensor
