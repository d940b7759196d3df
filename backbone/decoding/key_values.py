"""The keys and values that a span keeps of one sequence of calls.

transformers' own cache has an entry for each layer of the whole model and is asked for its first one, which a span may
lack. It also copies all that it holds at every token, and a window's layer forgets what a crop would need. So a span
has a cache of its own, whose layers hand out the same keys and values as transformers' do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from isthmus.backbone.split.span import FrozenSpan
from isthmus.backbone.split.split_cache import window_of

BLOCK = 64
"""Token positions that a buffer grows by: few enough that little of it is empty, and it is copied once in so many."""


class LayerKeyValues(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """The keys and values of one layer, `[B, heads, positions, d]` each.

    Args:
        window: Positions that attention sees; None for all. What is outside stays here, so that a crop finds it.
    """

    is_croppable = True

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty buffers like these."""
        self.keys, self.values = (
            each.new_empty(*each.shape[:2], 0, each.shape[3]) for each in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and return what the new positions see: as transformers' `DynamicCache` does."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, start = self._first_seen, self.length
        self.length += key_states.shape[2]
        self.keys, self.values = (self._grown(each, self.length) for each in (self.keys, self.values))
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, first : self.length], self.values[:, :, first : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions the next `query_length` ones see, and the number of the first of them."""
        return self.length - self._first_seen + query_length, self._first_seen

    def get_seq_length(self) -> int:
        """How many positions there are."""
        return self.length

    def get_max_length(self) -> int:
        """The window, or -1 for no limit."""
        return -1 if self.window is None else self.window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; a number below 0 says how many, as for transformers' caches."""
        self.length += tokens_to_remove

    def clear(self) -> None:
        """Forget everything, and hold no memory. Another thread that finds no keys finds no length either."""
        nothing: Any = None
        self.length, self.is_initialized = 0, False
        self.keys = self.values = nothing

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, in this order."""
        if self.is_initialized:
            self.keys, self.values = (
                each[:, :, : self.length].index_select(0, rows) for each in (self.keys, self.values)
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(each.numel() * each.element_size() for each in (self.keys, self.values) if each is not None)

    @property
    def _first_seen(self) -> int:
        """The first position that the next one sees."""
        return 0 if self.window is None else max(0, self.length - self.window + 1)

    def _grown(self, buffer: Tensor, length: int) -> Tensor:
        if length <= buffer.shape[2]:
            return buffer
        grown = buffer.new_empty(*buffer.shape[:2], in_blocks(length), buffer.shape[3])
        grown[:, :, : buffer.shape[2]] = buffer
        return grown


class RunsLayers(Protocol):
    """Whatever runs layers of a model: a span, or an emulator."""

    @property
    def config(self) -> Any:
        """Configuration of the whole model."""

    @property
    def layer_span(self) -> Iterable[int]:
        """The layers by their indices in the whole model, in running order; one may stand several times."""


class KeyValues(Cache):  # type: ignore[misc]  # transformers has no types
    """The keys and values of a span's layers; what transformers' base model and layers take as their `cache`.

    Args:
        span: What runs the layers. Each place in its running order has keys and values of its own, also where one layer
            stands in several.
    """

    layers: list[LayerKeyValues]

    def __init__(self, span: RunsLayers) -> None:
        entries = DynamicCache(config=span.config).layers
        numbers = list(span.layer_span)
        super().__init__([LayerKeyValues(window_of(entries[layer])) for layer in numbers])
        self._places: dict[int, list[LayerKeyValues]] = {}
        for layer, place in zip(numbers, self.layers, strict=True):
            self._places.setdefault(layer, []).append(place)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `LayerKeyValues.update`; the layer's number is the one in the whole model."""
        # A layer that stands in several places runs in their order, so the next one is the first of the shortest.
        place = min(self._places[layer_idx], key=LayerKeyValues.get_seq_length)
        return place.update(key_states, value_states)

    def window(self, layer_idx: int) -> int | None:
        """The positions that a layer of the whole model sees; None for all."""
        return self._places[layer_idx][0].window

    @property
    def length(self) -> int:
        """Token positions that all layers have."""
        return min(layer.length for layer in self.layers)

    @property
    def rows(self) -> int:
        """Sequences of the batch; 0 before the first call."""
        keys = self.layers[0].keys
        return 0 if keys is None else len(keys)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    def keep(self, length: int) -> None:
        """Forget what comes after so many positions."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    def clear(self) -> None:
        """Forget everything, and hold no memory."""
        for layer in self.layers:
            layer.clear()

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, in this order; a row may stand several times."""
        for layer in self.layers:
            layer.select(rows)


def in_blocks(length: int) -> int:
    """Positions of a buffer for so many."""
    return -(-length // BLOCK) * BLOCK


def cache_bytes(span: FrozenSpan, rows: int, length: int) -> int:
    """Bytes of the buffers for so many sequences of so many positions."""
    config = span.config
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return 2 * len(span.layer_span) * rows * heads * size * in_blocks(length) * span.dtype.itemsize
