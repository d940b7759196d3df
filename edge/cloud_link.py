"""What lies between a training run and the cloud: links and in_flight, the choice of codecs, the cache of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from isthmus.backbone.families import family_of
from isthmus.common.errors import OverQuotaError, UnsupportedCallError
from isthmus.common.files import disk_errors
from isthmus.common.ownership import private_folder
from isthmus.edge.client.link import Link, connect
from isthmus.edge.client.remote_span import RemoteSpan
from isthmus.edge.codecs.auto_codec import AutoCodec
from isthmus.edge.codecs.wire_codecs import WireCodecs, auto_target, is_auto
from isthmus.edge.config.adapter_config import sites_at
from isthmus.edge.config.client_config import ClientConfig
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Batch, Batches, TrainingData
from isthmus.edge.process_setup import device_of, no_core_files
from isthmus.edge.span_cache.cache_check import check_cacheable
from isthmus.edge.span_cache.span_cache import CachedSpan, SpanIdentity, cached_span
from isthmus.edge.training.evaluation import to_device
from isthmus.edge.training.micro_batches import InFlight, SummedMeter
from isthmus.edge.training.precision import computing_in
from isthmus.protocol.limits import DEFAULT_LIMITS, GIB, MIB
from isthmus.rpc.transport import Tls

if TYPE_CHECKING:
    from isthmus.edge.run_report import WireMeter

CACHE_FOLDER = "span-cache"
"""Inside the run's folder."""


def open_link(config: ClientConfig, *, interactive: bool = False, deadline: float | None = None) -> Link:
    """Connect as the configuration says, and write no core files from now on. Raises what `connect` raises.

    Codecs that are yet to be chosen are fp32. `interactive` and `deadline` are `connect`'s.
    """
    no_core_files()
    codec = config.codec
    if is_auto(codec):
        auto_target(codec)  # a mistake in it is reported before anything is fetched
        codec = "fp32"
    tls = None
    if config.tls_ca or config.tls_cert or config.tls_key:
        tls = Tls(config.tls_ca, config.tls_cert, config.tls_key)
    return connect(
        config.connection_text(),
        key=config.key,
        codec=codec,
        tls=tls,
        connect_timeout=config.connect_timeout,
        give_up_after=config.give_up_after,
        call_timeout=config.call_timeout,
        keepalive=config.keepalive,
        interactive=interactive,
        deadline=deadline,
        max_fetch_bytes=int(config.max_fetch_gib * GIB),
        limits=replace(DEFAULT_LIMITS, renew_seconds=config.renew_seconds, renew_bytes=int(config.renew_gib * GIB)),
    )


class Wire:
    """The links of a run: one, or one for each micro-batch in flight.

    Attributes:
        links: All of them; the first is the one that fetched the model.
        in_flight: What several micro-batches in flight go over; None for one at a time.
        meter: What they have carried together.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = tuple(links)
        self.in_flight = InFlight([link.span for link in links]) if len(links) > 1 else None
        self.meter: WireMeter = links[0] if len(links) == 1 else SummedMeter(links)

    def load_model(self, config: TrainConfig) -> Any:
        """The split model, whose span goes over the links as the configuration says.

        Raises:
            ConfigError: A layer that is to be leased is not the cloud's, or there is no such device.
        """
        model: Any = self.links[0].load_model().to(device_of(config.device))
        leased = sites_at(config.leased, family_of(model.config).layers_path, self.links[0].plan, "leased")
        model.remote_layers.span = RemoteSpan(self.in_flight or self.links[0].span, leased=leased, summed=config.summed)
        return model

    def watch(self, check: Callable[[], None]) -> None:
        """Have `check` called while a link waits; see `Link.watch`."""
        for link in self.links:
            link.watch(check)

    def auto_codec(
        self,
        config: TrainConfig,
        model: Any,
        trained: Sequence[nn.Parameter],
        data: TrainingData,
        say: Callable[[str], None],
    ) -> AutoCodec | None:
        """The observer that `--codec auto` asks for; None where the codecs are fixed.

        Raises:
            ConfigError: The target does not make sense.
        """
        if not is_auto(config.codec):
            return None

        def loss(batch: Batch) -> Tensor:
            with computing_in(config.precision, model):
                result: Tensor = model(**to_device(batch, model), use_cache=False).loss
            return result

        info = self.links[0].info
        probe = next(Batches(data.train, config.batch, data.pad_id, config.seed).epoch(0, 0, 1))
        return AutoCodec(
            self.links,
            info.codecs,
            info.hidden_size,
            auto_target(config.codec),
            config.codec_every,
            trained=trained,
            loss=loss,
            probe=probe,
            say=say,
        )


@contextmanager
def wire_of(link: Link, config: TrainConfig) -> Iterator[Wire]:
    """The links of a run, of which `link` is open already; the others are closed at the end.

    Raises:
        IsthmusError: One cannot be opened.
    """
    with ExitStack() as stack:
        try:
            more = [stack.enter_context(open_link(config)) for _ in range(config.overlap - 1)]
        except OverQuotaError as error:
            raise OverQuotaError(
                f"overlap = {config.overlap} takes as many sessions at a time, and the cloud has not so many for this "
                f"edge ({error}): lower --overlap"
            ) from None
        yield Wire([link, *more])


@contextmanager
def cache_of(link: Link, config: TrainConfig, model: Any) -> Iterator[CachedSpan | None]:
    """The cache that `--span-cache-mib` asks for, between `model` and its span; None where none is asked for.

    Raises:
        IsthmusError: See `isthmus.edge.span_cache.span_cache.cached_span`.
    """
    if config.span_cache_mib is None:
        yield None
        return
    info = link.info
    try:
        check_cacheable(model)
    except UnsupportedCallError as error:
        raise UnsupportedCallError(
            f"span_cache_mib = {config.span_cache_mib} does not fit this run: {error}. All of the edge's own layers "
            f"are adapted, so the split, here {info.plan}, must leave the first ones to the cloud (0:N); method prompt "
            "does not work at all"
        ) from None
    with disk_errors(config.out):
        private_folder(config.out)  # the cache's own would be made in one with the usual mode
    codecs = WireCodecs.parse(config.codec)
    identity = SpanIdentity(
        info.digest, info.plan, info.span_dtype, info.attn_implementation, codecs.forward_up, codecs.forward_down
    )
    with cached_span(model, config.out / CACHE_FOLDER, identity, max_bytes=config.span_cache_mib * MIB) as cached:
        yield cached
