"""A span of this process that keeps caches, fast or exact, and takes leased adapters: what a cloud does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from isthmus.backbone.decoding.decode_pass import DecodePass, ExactCall, FastCall
from isthmus.backbone.decoding.local_cache import LocalCache
from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.leasing import lease_of, leased
from isthmus.backbone.split.span import FrozenSpan, SpanInput

__all__ = ["CachingLocalSpan", "LocalCache"]


class DecodePassCache(LocalCache):
    """A cache whose next tokens run through a `DecodePass`."""

    def __init__(self, decode: DecodePass, span: FrozenSpan, *, exact: bool = False) -> None:
        super().__init__(span)
        self._decode, self._exact = decode, exact

    def _run(self, inputs: SpanInput, sites: Sequence[Site]) -> Tensor:
        length = inputs.hidden.shape[1]
        blocks = (1,) * length if self.length else (length,)
        leases = {(site.spec.layer, site.spec.part): lease_of(site) for site in sites}
        call = ExactCall(inputs, self.keys, leases, blocks) if self._exact else FastCall(inputs, self.keys, leases)
        return self._decode([call])[0].clone()


class CachingLocalSpan:
    """A span of this process that keeps caches, as `RemoteSpan` does over a link."""

    def __init__(self, span: FrozenSpan, *, exact: bool = False, rows: int | None = 8) -> None:
        self.span, self.exact = span, exact
        self.decode = DecodePass(span, rows)

    def __call__(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """What `FrozenSpan` gives."""
        return self.span(hidden, attention_mask, position_ids)

    def placed(self, sites: Sequence[Site]) -> Sequence[Site]:
        """All of them leased."""
        return [leased(site) for site in sites]

    def new_cache(self) -> LocalCache:
        """An empty cache."""
        return DecodePassCache(self.decode, self.span, exact=self.exact)
