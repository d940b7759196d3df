"""The link: a connection to a cloud that survives its connections, as users have it.

A call is a pure function of what is sent, because the backbone is frozen. So whatever breaks (the stream, the worker,
the cloud's memory of a forward), a new session with new keys is opened and the call repeated; the training loop sees a
delay. An optimizer step is the edge's own and happens once. The link gives up, with an error, when the cloud has stayed
away for `give_up_after` seconds.

    Link             what users ask for: a model, files, figures
      SpanCalls      the two calls of the cloud's layers
      SessionKeeper  sessions that come and go, questions that are repeated
        SecureStream, Transport (`isthmus.rpc`)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import SpanInput
from isthmus.common.errors import ConfigError, IsthmusError
from isthmus.edge.client.endpoints import Endpoints
from isthmus.edge.client.fetch import fetch_adapter, fetch_package, fetch_parts
from isthmus.edge.client.offers import DEFAULT_MAX_BYTES
from isthmus.edge.client.questions import Question
from isthmus.edge.client.remote_span import BackwardRequest, ForwardRequest, KeptCall, RemoteSpan, SpanCalls
from isthmus.edge.client.return_adapter import return_adapter
from isthmus.edge.client.session_keeper import LATE, SessionKeeper, SessionOptions, Wait
from isthmus.edge.client.site_traffic import SiteNotice
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.edge.config.client_config import DEFAULT_KEY
from isthmus.edge.run_report import WireTotals
from isthmus.edge.witness.audit_sample import AuditSample
from isthmus.edge.witness.session_witness import Witness
from isthmus.privacy.transcript.transcript_file import TranscriptLog
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import ConnectionString
from isthmus.protocol.limits import DEFAULT_LIMITS, KEEPALIVE_SECONDS, LEAST_KEEPALIVE_SECONDS, Limits
from isthmus.protocol.secure.keys import Fingerprint, load_edge
from isthmus.rpc.secure_stream import Observer, Traffic
from isthmus.rpc.transport import Check, GrpcTransport, Tls, Transport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from isthmus.emulator.package.package import Package

PEAK_SECONDS = 5.0  # a figure of the report is not worth a longer wait
CONNECT_SECONDS = 10.0
"""How long the start may take by default, at least."""
PLACE_SECONDS = 5.0
"""How long one place of a connection string may take to answer."""


def connect(
    address: str,
    *,
    key: str | Path | None = None,
    codec: str = "fp32",
    tls: Tls | None = None,
    connect_timeout: float = CONNECT_SECONDS,
    give_up_after: float = 600.0,
    call_timeout: float = 600.0,
    keepalive: float = KEEPALIVE_SECONDS,
    interactive: bool = False,
    deadline: float | None = None,
    max_fetch_bytes: int = DEFAULT_MAX_BYTES,
    limits: Limits = DEFAULT_LIMITS,
) -> Link:
    """Connect to a cloud.

    Args:
        address: the connection string that `isthmus cloud serve` prints: `isthmus://host:port#SHA256:…`. Of several
            places each is tried.
        key: the edge's private key file; by default ~/.isthmus/edge/id_ed25519, as `isthmus edge keygen` makes it.
        codec: how activations and gradients cross the wire: one of fp32, bf16, fp16, int8, int4, int4-outliers, or one
            for each direction; see `isthmus.edge.codecs.wire_codecs.WireCodecs.parse`.
        tls: the outer TLS layer, for `isthmus+tls://` addresses; by default the system's certificates.
        connect_timeout: seconds to wait for the cloud at first. The default, 10, becomes 5 for each place of a
            connection string that names more than two, so that each is tried even where none answers; any other number
            holds as it is, however many places there are.
        give_up_after: seconds that a cloud may stay away later.
        call_timeout: seconds that one call may take before the connection counts as lost.
        keepalive: seconds without a sign of the cloud until it is asked for one; the connection counts as lost after as
            long again. Shorter finds a machine that died, or a cut link, sooner, and mistakes a slow link for one.
        interactive: whether somebody waits for the calls, as in generation; the cloud then computes them before those
            of training, within the edge's share.
        deadline: seconds within which the cloud has to compute a call without sites, once it has come in; one
            that has not begun by then is refused (`TooLateError`). None for no deadline.
        max_fetch_bytes: most bytes that are fetched for the edge's parts, a package, or an adapter; a cloud that offers
            more is refused.
        limits: what a session accepts, and when it changes and renews its keys.

    Returns:
        An open link; use it as a context manager.

    Raises:
        ConfigError: the address, the codec, the keepalive or the deadline does not make sense.
        KeyFileError: there is no usable key.
        FingerprintError: the server is not the pinned one, or its certificate has expired.
        RefusedError: the cloud takes no session: it drains, or the quota is used up.
        VersionError, RemoteProtocolError: the server does not speak as this release does.
        NotEnrolledError: the cloud does not know the key.
        UnreachableError: nobody answers.

        Of several places that give no session, the first that says why has the word.
    """
    where = ConnectionString.parse(address)
    private = load_edge(Path(key or DEFAULT_KEY).expanduser())

    def reach(address: str) -> GrpcTransport:
        outer = (tls or Tls()) if where.tls else None
        return GrpcTransport(address, outer, min(connect_timeout, PLACE_SECONDS), keepalive)

    if keepalive < LEAST_KEEPALIVE_SECONDS:
        raise ConfigError(f"a keepalive of {keepalive:g} s is too short: {LEAST_KEEPALIVE_SECONDS:g} at least")
    link = Link(
        reach(where.address),
        where.pin,
        private,
        name=where.address,
        codecs=WireCodecs.parse(codec),
        give_up_after=give_up_after,
        call_timeout=call_timeout,
        interactive=interactive,
        deadline=deadline,
        reach=reach,
        further=where.others,
        max_fetch_bytes=max_fetch_bytes,
        limits=limits,
    )
    patience = connect_timeout
    if connect_timeout == CONNECT_SECONDS:  # commands give a number in any case: the default's own stands for no choice
        patience = max(connect_timeout, PLACE_SECONDS * len(where.addresses))
    try:
        link.open(patience)
    except BaseException:
        link.close()
        raise
    return link


class Link:
    """A link to one cloud. Threads that ask at a time wait for each other. `connect` makes one.

    Args:
        transport: opens streams to the cloud.
        pin: fingerprint of the cloud's root key.
        key: the edge's key.
        name: the cloud's name in messages, and its address.
        codecs: how activations and gradients cross the wire; None for fp32.
        give_up_after, call_timeout, interactive, deadline: see `SessionOptions`.
        reach: makes a transport to another worker of the cloud; None stays with the one of `transport`.
        further: other addresses where the cloud can be reached.
        max_fetch_bytes: most bytes that are fetched for the edge's parts, a package, or an adapter.
        limits: what a session accepts, and when it changes and renews its keys.

    Attributes:
        span: the calls of the cloud's layers.
        pin: fingerprint of the cloud's root key.

    Raises:
        ConfigError: The deadline is no length of time.
    """

    def __init__(
        self,
        transport: Transport,
        pin: Fingerprint,
        key: Ed25519PrivateKey,
        *,
        name: str,
        codecs: WireCodecs | None = None,
        give_up_after: float = 600.0,
        call_timeout: float = 600.0,
        interactive: bool = False,
        deadline: float | None = None,
        reach: Callable[[str], Transport] | None = None,
        further: Sequence[str] = (),
        max_fetch_bytes: int = DEFAULT_MAX_BYTES,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        options = SessionOptions(name, give_up_after, call_timeout, interactive, deadline, limits)
        self._keeper = SessionKeeper(
            Endpoints(transport, name, reach, further), pin, key, options, lambda info: self.codecs.check(info.codecs)
        )
        self.span = SpanCalls(self._keeper, codecs or WireCodecs())
        self.pin = pin
        self._max_fetch_bytes = max_fetch_bytes
        self._parts_folder: Path | None = None

    def open(self, timeout: float) -> None:
        """Open the first session, within `timeout` seconds. Raises what `connect` raises."""
        self._keeper.open(timeout)

    def close(self) -> None:
        """Say goodbye and close."""
        self._keeper.close()

    def drop(self) -> None:
        """Abandon the session, as a connection that breaks does; the next call opens another."""
        self._keeper.drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def info(self) -> m.SessionInfo:
        """What the cloud serves: the model's name and digest, the plan, limits."""
        return self._keeper.info

    @property
    def traffic(self) -> Traffic:
        """What has crossed so far."""
        return self._keeper.traffic

    @property
    def codecs(self) -> WireCodecs:
        """How tensors cross; may be replaced between two calls."""
        return self.span.codecs

    @codecs.setter
    def codecs(self, codecs: WireCodecs) -> None:
        self.span.codecs = codecs

    @property
    def observer(self) -> Observer:
        """Called at each phase of each question; for tests and benchmarks, which may replace it."""
        return self._keeper.observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        self._keeper.observer = observer

    def watch(self, check: Check) -> None:
        """Have `check` called a few times a second while the link waits; what it raises ends the wait.

        Without it only an exception, a KeyboardInterrupt say, ends a wait before its time.
        """
        self._keeper.check = check

    @property
    def wait(self) -> Wait | None:
        """For a cloud that has not answered for two seconds; None for one that has. For any thread."""
        wait = self._keeper.wait
        return wait if wait is not None and time.time() >= wait.since + LATE else None

    @property
    def plan(self) -> SplitPlan:
        """Who holds which layers."""
        return SplitPlan.parse(self.info.plan, self.info.n_layers)

    @property
    def step(self) -> int:
        """The optimizer step that calls belong to at present; 0 before the first."""
        return self.span.step

    def load_model(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        leased: Callable[[str], bool] = lambda name: False,
        summed: bool = False,
    ) -> PreTrainedModel:
        """The whole architecture as a transformers model whose middle layers run in the cloud.

        The edge's own layers, the embedding, the norm and the head are fetched once and kept in the cache; layers keep
        their original numbers, and the cloud's have no weights here.

        Args:
            dtype: floating point dtype of the edge's weights.
            leased: whether the LoRA at the site of that name is leased to the cloud, which then sees its weights and
                runs it; by default no adapter ever leaves the edge.
            summed: whether the sites that share an input answer a backward with one gradient of it: fewer bytes, and
                other ones in the last place than a single process has.
        """
        from isthmus.backbone.split.edge_parts import load_edge_parts

        span = RemoteSpan(self.span, leased=leased, summed=summed)
        model: PreTrainedModel = load_edge_parts(
            self._parts(), self.plan, span, dtype=dtype, attn_implementation=self.info.attn_implementation
        )
        span.notice = SiteNotice(model.config, lambda: self.codecs, summed=summed)
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from isthmus.backbone.checkpoints.sources import load_tokenizer

        return load_tokenizer(self._parts())

    def fetch_package(self, out: Path, name: str | None = None) -> Package:
        """Fetch a package that the cloud offers into the folder `out`, verified; see `isthmus.edge.client.fetch`."""
        return fetch_package(self._keeper, out, self.pin, self._max_fetch_bytes, name)

    def return_adapter(self, folder: Path) -> str:
        """Bring an adapter to the cloud and have it plugged in; returns what the cloud says."""
        return return_adapter(self._keeper, folder)

    def plugged_adapter(self) -> Path:
        """The folder of the adapter that this tenant has plugged in, in the cache: `load_adapter` takes it."""
        return fetch_adapter(self._keeper, self._parts(), self.pin, self._max_fetch_bytes)

    def forward_span(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        keep: bool,
        plan: str | None = None,
    ) -> tuple[Tensor, KeptCall]:
        """One forward of the cloud's layers without a model; see `ForwardRequest`."""
        return self.span.forward(ForwardRequest(SpanInput(hidden, attention_mask, position_ids), keep, plan=plan))

    def backward_span(
        self,
        kept: KeptCall,
        gradient: Tensor,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor | None:
        """The backward of such a forward; see `BackwardRequest`."""
        return self.span.backward(BackwardRequest(kept, gradient, SpanInput(hidden, attention_mask, position_ids)))

    def begin_step(self, step: int) -> None:
        """Name the optimizer step that the next calls belong to."""
        self.span.step = step

    def totals(self) -> WireTotals:
        """What has crossed the wire so far, and where the time went."""
        t = self.traffic
        cloud = t.compute_ns + t.queue_ns
        return WireTotals(
            bytes_up=t.bytes_up,
            bytes_down=t.bytes_down,
            calls=t.calls,
            round_trips=t.round_trips,
            wire_s=max(0, t.asking_ns - t.crypto_ns - t.sites_ns - cloud) / 1e9,
            crypto_s=t.crypto_ns / 1e9,
            cloud_s=cloud / 1e9,
            retries=t.retries,
        )

    def keep_transcript(self, log: TranscriptLog, sample: AuditSample | None = None) -> None:
        """Note what crosses from now on in `log`, have the cloud sign it, and keep a sample of calls.

        A transcript is of whole sessions: the next call opens a new one.
        """
        self._keeper.be_witnessed(Witness(log, self.pin, sample))

    def end_transcript(self) -> None:
        """Have the cloud sign all that has crossed, and note nothing any more. Raises what `sign_transcript` raises."""
        try:
            self._keeper.sign()
        finally:
            self._keeper.witness = None

    def sign_transcript(self) -> None:
        """Have the cloud sign all that has crossed. Raises TranscriptError where it signs something else."""
        self._keeper.sign()

    def ask_again(
        self, adapters: Sequence[m.Sites | m.Lease], call: m.Forward | m.Backward, answer: m.Message
    ) -> m.Message:
        """What this cloud answers to a call that was asked before, perhaps of another one; see `SpanCalls.again`."""
        return self.span.again(adapters, call, answer)

    def cloud_peak_bytes(self) -> int | None:
        """What the largest call of this session takes there while it is computed, in bytes, as the cloud estimates it.

        None where the cloud does not say it soon.
        """
        question = Question(m.Pong, lambda attempt: m.Ping(attempt.number), timeout=PEAK_SECONDS, patience=PEAK_SECONDS)
        try:
            return self._keeper.call(question).peak_bytes
        except IsthmusError:
            return None

    def _parts(self) -> Path:
        if self._parts_folder is None:
            self._parts_folder = fetch_parts(self._keeper, self.pin, self._max_fetch_bytes)
        return self._parts_folder
