"""A local span's outputs, each text's by itself, kept where a store has them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from isthmus.backbone.plan import SplitPlan
from isthmus.edge.span_cache.cache_store import KEY_BYTES


class RowStore(Protocol):
    """Keeps rows by key, as `SpanStore` does."""

    def get(self, key: bytes, shape: tuple[int, int] | None = None) -> Tensor | None:
        """The row `[tokens, h]`; None if it is not there."""

    def put(self, key: bytes, row: Tensor) -> bool:
        """Keep a row; whether it is kept."""


class MemoryRows:
    """Rows in the main memory, whatever device they come from.

    Args:
        max_bytes: Of all rows; what is too much is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._rows: dict[bytes, Tensor] = {}
        self._left = max_bytes

    def get(self, key: bytes, shape: tuple[int, int] | None = None) -> Tensor | None:
        """See `RowStore`."""
        return self._rows.get(key)

    def put(self, key: bytes, row: Tensor) -> bool:
        """See `RowStore`; a key that is there keeps its row."""
        if key not in self._rows:
            if row.nbytes > self._left:
                return False
            self._left -= row.nbytes
            self._rows[key] = row.cpu()
        return True


class KeptOutputs:
    """In a local span's place: what the span gives for each row of a batch by itself, looked up or computed.

    Nothing at or below the cut may be trained or random, see `tuned_below` and `dropout_below`.

    Args:
        edge: The edge's model, without PEFT's wrapper.
        store: Where rows are kept; None for nowhere.
        turned_away: Called for each row that the store does not take.
    """

    def __init__(self, edge: Any, store: RowStore | None, turned_away: Callable[[], None] = lambda: None) -> None:
        family = edge.isthmus_origin.family
        self._base: Any = edge.get_submodule(family.base)
        self._layers: Any = edge.get_submodule(family.layers_path)
        self._plan: SplitPlan = edge.split_plan
        self._remote: Any = edge.remote_layers
        self._span: Any = edge.remote_layers.span
        self._store = store
        self._turned_away = turned_away
        self._below = False  # while one row passes the layers below
        self._rows: list[Tensor] = []
        self._seen: Tensor

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Stand between the model and its span while the block runs."""
        layers = [self._layers[index] for index in self._plan.edge_layers]
        # Before the model's own hook, which frames one forward at a time.
        hook = self._base.register_forward_pre_hook(self._look_up, with_kwargs=True, prepend=True)
        for index, layer in zip(self._plan.edge_layers, layers, strict=True):
            layer.forward = partial(self._edge_layer, layer.forward, index < self._plan.cloud.start)
        self._remote.span = self
        try:
            yield
        finally:
            self._remote.span = self._span
            for layer in layers:
                del layer.forward
            hook.remove()

    def __call__(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """See `SpanFn`. Padding gets zeros: no token attends to it, and the loss ignores it."""
        if self._below:
            self._seen = self._span(hidden, mask, positions)
            return self._seen
        output = torch.zeros_like(hidden)
        for into, row in zip(output, self._rows, strict=True):
            into[: len(row)] = row
        return output

    def _edge_layer(self, forward: Callable[..., Tensor], is_below: bool, hidden: Tensor, *args: Any, **kw: Any) -> Any:
        return forward(hidden, *args, **kw) if is_below == self._below else hidden

    def _look_up(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._below:
            return
        named = kwargs | dict(zip(inspect.signature(base.forward).parameters, args, strict=False))
        ids, mask = named["input_ids"], named.get("attention_mask")
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(-1).tolist()  # padded on the right
        self._rows = [self._row(row[:length]) for row, length in zip(ids, lengths, strict=True)]

    def _row(self, ids: Tensor) -> Tensor:
        key = hashlib.blake2b(ids.cpu().numpy().tobytes(), digest_size=KEY_BYTES).digest()
        kept = None if self._store is None else self._store.get(key, (len(ids), self._base.config.hidden_size))
        if kept is not None:
            return kept
        self._below = True
        try:
            with torch.no_grad():
                self._base(input_ids=ids[None], use_cache=False)
        finally:
            self._below = False
        if self._store is not None and not self._store.put(key, self._seen[0]):
            self._turned_away()
        return self._seen[0]
