"""The link: a connection to a cloud that survives its connections.

A call is a pure function of what is sent, because the backbone is frozen. So whatever breaks (the stream, the worker,
the cloud's memory of a forward), the link opens a new session with new keys and repeats the call; the training loop
sees a delay. An optimizer step is the edge's own and happens once. The link gives up, with an error, when the cloud has
stayed away for `give_up_after` seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import IsthmusError
from isthmus.edge.client.fetch import fetch_adapter, fetch_package, fetch_parts
from isthmus.edge.client.offers import DEFAULT_MAX_BYTES
from isthmus.edge.client.remote_span import RemoteSpan
from isthmus.edge.client.return_adapter import return_adapter
from isthmus.edge.client.span_calls import SpanCaller
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.edge.config.client_config import DEFAULT_KEY
from isthmus.edge.run_report import WireTotals
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import ConnectionString
from isthmus.protocol.secure.keys import load_edge
from isthmus.rpc.transport import GrpcTransport, Tls

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from isthmus.emulator.package.package import Package

PEAK_SECONDS = 5.0  # a figure of the report is not worth a longer wait


def connect(
    address: str,
    *,
    key: str | Path | None = None,
    codec: str = "fp32",
    tls: Tls | None = None,
    connect_timeout: float = 10.0,
    give_up_after: float = 600.0,
    call_timeout: float = 600.0,
    interactive: bool = False,
    deadline: float | None = None,
    max_fetch_bytes: int = DEFAULT_MAX_BYTES,
) -> Link:
    """Connect to a cloud.

    Args:
        address: the connection string that `isthmus cloud serve` prints: `isthmus://host:port#SHA256:…`.
        key: the edge's private key file; by default ~/.isthmus/edge/id_ed25519, as `isthmus edge keygen` makes it.
        codec: how activations and gradients cross the strip: one of fp32, bf16, fp16, int8, int4, int4-outliers, or one
            for each direction; see `isthmus.edge.codecs.wire_codecs.WireCodecs.parse`.
        tls: the outer TLS layer, for `isthmus+tls://` addresses; by default the system's certificates.
        connect_timeout: seconds to wait for the cloud at first.
        give_up_after: seconds that a cloud may stay away later.
        call_timeout: seconds that one call may take before the connection counts as lost.
        interactive: whether somebody waits for the calls, as in generation; the cloud then computes them before those
            of training, within the edge's share.
        deadline: seconds within which the cloud has to compute a call without sites, once it has come in; one that
            cannot make it is refused before it is begun (`TooLateError`). None for no deadline.
        max_fetch_bytes: most bytes that are fetched for the edge's parts, a package, or an adapter; a cloud that offers
            more is refused.

    Returns:
        An open link; use it as a context manager.

    Raises:
        ConfigError: the address, the codec or the deadline does not make sense.
        KeyFileError: there is no usable key.
        FingerprintError: the server is not the pinned one.
        NotEnrolledError: the cloud does not know the key.
        UnreachableError: nobody answers.
    """
    where = ConnectionString.parse(address)
    private = load_edge(Path(key or DEFAULT_KEY).expanduser())

    def reach(address: str) -> GrpcTransport:
        return GrpcTransport(address, (tls or Tls()) if where.tls else None, min(connect_timeout, 5.0))

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
        max_fetch_bytes=max_fetch_bytes,
    )
    link.open(connect_timeout)
    return link


class Link(SpanCaller):
    """A link to one cloud. Not for several threads at once: calls wait for each other.

    `LastingLink` has the arguments, but for `max_fetch_bytes`; `connect` makes one from a connection string.

    Args:
        max_fetch_bytes: most bytes that are fetched for the edge's parts, a package, or an adapter.
    """

    _parts_folder: Path | None = None

    def __init__(self, *args: Any, max_fetch_bytes: int = DEFAULT_MAX_BYTES, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_fetch_bytes = max_fetch_bytes

    @property
    def plan(self) -> SplitPlan:
        """Who holds which layers."""
        return SplitPlan.parse(self.info.plan, self.info.n_layers)

    @property
    def step(self) -> int:
        """The optimizer step that calls belong to at present; 0 before the first."""
        return self._step

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
            leased: whether the LoRA at the site of that name may be lent to the cloud, which then sees its weights and
                runs it; by default no adapter ever leaves the edge.
            summed: whether the sites that share an input answer a backward with one gradient of it: fewer bytes, and
                other ones in the last place than a single process has.
        """
        from isthmus.backbone.split.edge_parts import load_edge_parts

        model = load_edge_parts(
            self._parts(),
            self.plan,
            RemoteSpan(self, leased=leased, summed=summed),
            dtype=dtype,
            attn_implementation=self.info.attn_implementation,
        )
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from isthmus.backbone.checkpoints.sources import load_tokenizer

        return load_tokenizer(self._parts())

    def fetch_package(self, out: Path) -> Package:
        """Fetch the package that the cloud offers into the folder `out`, verified; see `isthmus.edge.client.fetch`."""
        with self._lock:
            return fetch_package(self.info, self._call, out, self._pin, self._max_fetch_bytes)

    def return_adapter(self, folder: Path) -> str:
        """Bring an adapter to the cloud and have it plugged in; returns what the cloud says."""
        with self._lock:
            return return_adapter(self.info, self._call, folder)

    def plugged_adapter(self) -> Path:
        """The folder of the adapter that this tenant has plugged in, in the cache: `load_adapter` takes it."""
        with self._lock:
            return fetch_adapter(self.info, self._call, self._parts(), self.plan, self._pin, self._max_fetch_bytes)

    def begin_step(self, step: int) -> None:
        """Name the optimizer step that the next calls belong to."""
        self._step = step

    def totals(self) -> WireTotals:
        """What has crossed the strip so far, and where the time went."""
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

    def cloud_peak_bytes(self) -> int | None:
        """What the largest call of this session takes there while it is computed, in bytes, as the cloud estimates it.

        None where the cloud does not say it soon.
        """
        with self._lock:
            try:
                return self._call(m.Pong, m.Ping, patience=PEAK_SECONDS, timeout=PEAK_SECONDS).peak_bytes
            except IsthmusError:
                self._drop()  # a late answer must not be taken for that to another question
                return None

    def _parts(self) -> Path:
        with self._lock:
            if self._parts_folder is None:
                self._parts_folder = fetch_parts(self.info, self._call, self._pin, self._max_fetch_bytes)
            return self._parts_folder
