"""The edge's cache: transformers' own, with entries in the places of the cloud's layers.

The entries hold no keys and no values. They know how many positions the cloud has, and pass on what transformers asks
of a cache: cropping (assisted generation), reordering (beams), and selecting or repeating rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sites.edge_sites import Site
from isthmus.common.errors import UnsupportedCallError


class RemoteCache(Protocol):
    """The cache of the cloud's layers, as the edge knows it.

    Attributes:
        version: Of the edge's weights that it was filled with; whoever fills it sets it.
    """

    version: Any

    @property
    def length(self) -> int:
        """Token positions in it."""

    @property
    def rows(self) -> int:
        """Sequences in it; 0 before the first call."""

    def extend(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, sites: Sequence[Site] = ()
    ) -> Tensor:
        """The span's output for the next tokens.

        Args:
            hidden: Of these tokens, `[B, S, h]`.
            attention_mask: Of all tokens, `[B, length + S]`; None for no padding.
            position_ids: Of these tokens, `[B, S]` or `[1, S]`; None where they are counted.
            sites: Adapters that are leased to the cloud.
        """

    def crop(self, length: int) -> None:
        """Forget what comes after so many positions."""

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may stand several times."""


@runtime_checkable
class CachingSpan(Protocol):
    """A span that can keep keys and values of past tokens. It is a `SpanFn` too, see `edge_model`."""

    def new_cache(self) -> RemoteCache:
        """An empty cache of the cloud's layers."""

    def placed(self, sites: Sequence[Site]) -> Sequence[Site]:
        """The same sites, those leased that are to be."""


class RemoteEntry(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """In the place of a cloud layer's keys and values.

    Args:
        remote: The cache of all the cloud's layers.
        window: Positions that the layer sees; None for all.
        leads: Whether it is the first cloud layer's: it alone passes on what is asked of all.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, remote: RemoteCache, window: int | None, leads: bool) -> None:
        super().__init__()
        self.remote = remote
        self.window, self.is_sliding, self._leads = window, window is not None, leads

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing here to make."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: the layer is not here."""
        raise UnsupportedCallError("the keys and values of a cloud layer are in the cloud, and cannot be set here")

    def get_seq_length(self) -> int:
        """Token positions that the cloud has."""
        return self.remote.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions the next ones see, and the number of the first of them."""
        length = self.remote.length
        first = 0 if self.window is None else max(0, length - self.window + 1)
        return length - first + query_length, first

    def get_max_length(self) -> int:
        """The window, or -1 for no limit."""
        return -1 if self.window is None else self.window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; a number below 0 says how many, as for transformers' caches."""
        if self._leads and tokens_to_remove:
            self.remote.crop(self.remote.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows."""
        if self._leads:
            self.remote.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows."""
        if self._leads:
            self.remote.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row stand so many times."""
        if self._leads and self.remote.length:
            self.remote.select(torch.arange(self.remote.rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        if self._leads:
            self.remote.crop(0)


def remote_of(cache: Any, plan: SplitPlan, new: Any) -> RemoteCache:
    """The cloud's part of a cache that a forward was given.

    Args:
        cache: transformers' cache. An empty one gets entries in the places of the cloud's layers.
        plan: Which layers the cloud has.
        new: Makes a `RemoteCache`.

    Raises:
        UnsupportedCallError: It is of another kind, or holds something from elsewhere.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        raise UnsupportedCallError(
            f"the split model takes transformers' DynamicCache(config=model.config), not a {type(cache).__name__} "
            "(cache_implementation): leave it out"
        )
    first, *others = plan.cloud
    if len(cache.layers) <= plan.cloud.stop - 1:
        raise UnsupportedCallError("a cache must know the model's layers: make it by DynamicCache(config=model.config)")
    entry = cache.layers[first]
    if isinstance(entry, RemoteEntry):
        return entry.remote
    if any(each.get_seq_length() for each in cache.layers):
        raise UnsupportedCallError(
            "a cache that was filled elsewhere lacks the cloud's keys and values: begin with an empty one, and use "
            "prompt tuning in the place of prefix tuning and cartridges, which fill it"
        )
    remote: RemoteCache = new()
    for layer in (first, *others):
        cache.layers[layer] = RemoteEntry(remote, window_of(cache.layers[layer]), layer == first)
    return remote


def window_of(entry: Any) -> int | None:
    """The window of an entry of transformers' `DynamicCache`; None where attention sees all positions."""
    return entry.sliding_window if entry.is_sliding else None
