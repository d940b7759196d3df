"""What adapters inside the cloud's layers cost in traffic, said once for each model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.backbone.runtime.site_host import linear_groups
from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_spec import Placement
from isthmus.common.readable import size
from isthmus.edge.codecs.wire_codecs import WireCodecs, codec_bytes

LOGGER = logging.getLogger("isthmus")


@dataclass(frozen=True, slots=True)
class SiteTraffic:
    """What sites add to a forward and to its backward.

    Attributes:
        round_trips: questions of the cloud in either pass: one for the sites that read one input.
        forward_bytes: for each token position, both ways; what a tensor costs once is left out.
        backward_bytes: the same of a backward in which every site's input gradient is wanted.
    """

    round_trips: int
    forward_bytes: int
    backward_bytes: int

    @classmethod
    def of(cls, sites: Sequence[Site], config: Any, codecs: WireCodecs, *, summed: bool = False) -> SiteTraffic:
        """Count it.

        Args:
            sites: those that act; weights that are leased to the cloud cost nothing for a token.
            config: configuration of the whole model.
            codecs: how tensors cross.
            summed: as of `isthmus.edge.client.remote_span.RemoteSpan`.
        """
        group_of = {name: number for number, names in enumerate(linear_groups(config)) for name in names}
        groups = set()
        shared: set[tuple[int, int | None]] = set()  # groups whose input has been counted
        forward = backward = 0
        for site in sites:
            if not site.spec.asks:
                continue
            group = site.layer, group_of.get(site.part)
            groups.add(group)
            n_in, n_out = site.widths
            first = site.spec.placement != Placement.EDGE or group not in shared
            if site.spec.placement == Placement.EDGE:
                shared.add(group)
            forward += codec_bytes(codecs.forward_up, n_out)
            backward += codec_bytes(codecs.backward_down, n_out)
            if first:
                forward += codec_bytes(codecs.forward_down, n_in)
            if first or not summed:
                backward += codec_bytes(codecs.backward_up, n_in)
        return cls(len(groups), forward, backward)


class SiteNotice:
    """Warns, once, of what the sites of a model cost.

    Args:
        config: configuration of the whole model.
        codecs: gives how tensors cross at present.
        summed: as of `isthmus.edge.client.remote_span.RemoteSpan`.
    """

    def __init__(self, config: Any, codecs: Callable[[], WireCodecs], *, summed: bool = False) -> None:
        self._config = config
        self._codecs = codecs
        self._summed = summed
        self._said = False

    def __call__(self, sites: Sequence[Site]) -> None:
        """Look at the sites that act."""
        layers = sorted({site.layer for site in sites if site.spec.asks})
        if self._said or not layers:
            return
        self._said = True
        traffic = SiteTraffic.of(sites, self._config, self._codecs(), summed=self._summed)
        LOGGER.warning(
            "adapters in %d of the cloud's layers (%d to %d) run on this machine: they add %d round trips and %s for "
            "each token position to a forward, and %d round trips and up to %s to its backward. To keep to this "
            "machine's own layers, give PEFT layers_to_transform=list(model.split_plan.edge_layers).",
            len(layers),
            layers[0],
            layers[-1],
            traffic.round_trips,
            size(traffic.forward_bytes),
            traffic.round_trips,
            size(traffic.backward_bytes),
        )
