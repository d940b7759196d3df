"""A cache of a span that is in this process: what the cloud keeps, without a cloud."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from isthmus.backbone.decoding.decode_pass import DecodePass, ExactCall, FastCall
from isthmus.backbone.decoding.key_values import KeyValues
from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.leasing import lease_of, leased
from isthmus.backbone.split.span import FrozenSpan, SpanInput


class LocalCache:
    """A `RemoteCache` over keys and values of this process."""

    def __init__(self, decode: DecodePass, span: FrozenSpan, *, exact: bool = False) -> None:
        self.version: Any = None
        self.keys = KeyValues(span)
        self._decode, self._exact = decode, exact

    @property
    def length(self) -> int:
        """Token positions."""
        return self.keys.length

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.keys.rows

    def extend(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, sites: Sequence[Site] = ()
    ) -> Tensor:
        """The span's output for the next tokens."""
        inputs, length = SpanInput(hidden, attention_mask, position_ids), hidden.shape[1]
        blocks = (1,) * length if self.length else (length,)
        leases = {(site.spec.layer, site.spec.part): lease_of(site) for site in sites}
        call = ExactCall(inputs, self.keys, leases, blocks) if self._exact else FastCall(inputs, self.keys, leases)
        return self._decode([call])[0].clone()

    def crop(self, length: int) -> None:
        """Forget what comes after so many positions."""
        self.keys.keep(length)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self.keys.select(rows)


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
        return LocalCache(self.decode, self.span, exact=self.exact)
