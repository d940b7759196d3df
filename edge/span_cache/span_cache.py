"""The span cache: where nothing trainable lies below the span, each row crosses the wire once, and never again.

With adapters on the top layers only, the span's input is the same in every epoch, and so is its output, as the backbone
is frozen. The outputs are kept on the edge's disk, and from the second epoch on nothing is asked of the cloud.

**Rows, not batches.** Each epoch shuffles its rows anew and pads them to other lengths, so a row of a batch is kept by
itself, without its padding, under a BLAKE2b-256 of everything that its output depends on: model, split plan, the
span's dtype and attention, the codecs, autocast, and the row's content and positions. In a batch of which some rows are
missing, these cross the wire as a smaller batch. The first epoch asks as an uncached run does, and gets the same bits.

**Content.** Where the edge holds no bottom layer, a row's content is its hidden states: an embedding gives the same
bits in any batch. Bottom layers do not, as the order of sums inside a matrix product depends on the batch's length
(1e-6 at fp32), so with them the content is what goes into the model, tokens or embeddings, together with a fingerprint
of the weights below the cut. What comes back then was computed from a row that may differ by such rounding.

**Padding.** Rows come back with zeros where they are padded. No token attends to padding, since the mask gives it a
weight of zero, and the loss ignores it, so its gradient is zero: finite numbers in its place change nothing. In a batch
that is padded as it was when its rows were kept, loss and gradients are those of the uncached run bit for bit; in
another, they differ by what the length of a batch changes in a matrix product.

**Taps.** What a ladder reads of a row is kept behind the row's output, under a key of its own: other taps are other
rows.

Not for a model with something trainable, or random, at or below the cut: `check_cacheable` refuses that, and so does a
call whose input wants a gradient.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.backbone.split.edge_model import SpanFn, TappedSpan
from isthmus.common.errors import UnsupportedCallError
from isthmus.edge.span_cache.cache_check import (
    check_cacheable,
    edge_model,
    fingerprint,
    refuse_trainable,
    wants_input_grads,
    warn_of_input_grads,
)
from isthmus.edge.span_cache.cache_store import KEY_BYTES, CacheStats, SpanStore

# The arguments of a base model that say what a row is; another tensor among them leaves a row's tokens ambiguous.
_KNOWN_TENSORS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}


@dataclass(frozen=True, slots=True)
class SpanIdentity:
    """Which function a span is: what its output depends on besides its input."""

    digest: str
    plan: str
    span_dtype: str
    attn_implementation: str
    codec_up: str
    codec_down: str

    def key(self, below: bytes = b"") -> bytes:
        """32 bytes that stand for it, and for the fingerprint of the weights below the cut where that matters."""
        return hashlib.blake2b(json.dumps(astuple(self)).encode() + below, digest_size=KEY_BYTES).digest()


@contextmanager
def cached_span(model: Any, folder: Path, identity: SpanIdentity, *, max_bytes: int) -> Iterator[CachedSpan]:
    """Let a split model's span go through a cache, as long as the block runs.

    Args:
        folder: Where rows are kept; see `SpanStore` for what that means for private data.

    Yields:
        The span that the model calls meanwhile; `stats()` tells how it does.

    Raises:
        ConfigError: The model is not split, another process uses the folder, or `max_bytes` makes no sense.
        DiskError: The folder cannot be made, read or written.
        UnsupportedCallError: Something at or below the cut is trainable or random.
    """
    edge = edge_model(model)
    warned = check_cacheable(model)
    below = fingerprint(edge) if edge.split_plan.bottom else b""
    with SpanStore(folder, identity.key(below), max_bytes=max_bytes) as store:
        span = edge.remote_layers.span
        cached = CachedSpan(span, store, model, warned=warned)
        hooks = cached.know_rows_by_input(edge) if below else ()
        edge.remote_layers.span = cached
        try:
            yield cached
        finally:
            edge.remote_layers.span = span
            for hook in hooks:
                hook.remove()


_Ask = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""What computes rows that are not there, `[B, S, h]`, or with taps `[B, S, h + widths of the taps]`."""


class _Row(NamedTuple):
    """A row of a batch without its padding: positions `[start, stop)`, and the key that it is kept under."""

    start: int
    stop: int
    key: bytes


class CachedSpan:
    """A span that looks rows up before it asks: `(hidden, attention_mask, position_ids) -> hidden`, see `SpanFn`.

    Deliberately not an `nn.Module`, like `RemoteSpan`.

    Args:
        store: Where rows are kept. Its identity must be that of `span`.
        model: The model that calls it, where `enable_input_require_grads` is to be understood: with it, a gradient of
            the input is asked for though nothing below the cut is trainable. Without the model, that is refused too.
    """

    def __init__(self, span: SpanFn, store: SpanStore, model: Any = None, *, warned: bool = False) -> None:
        self._span = span
        self._store = store
        self._model = model
        self._warned = warned
        self._source: Tensor | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> CachedSpan:
        """A copied model uses the same cache."""
        return self

    def stats(self) -> CacheStats:
        """What was found and what is kept."""
        return self._store.stats()

    def __call__(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Hidden states after the span, `[B, S, h]`, of the rows' tokens; zeros on padding, unless all rows were asked.

        Raises:
            UnsupportedCallError: The input wants a gradient and something below the cut is trainable, or something
                inside the span is.
        """
        wanted = self._wants_gradient(hidden)
        output = self._look_up(hidden.detach(), attention_mask, position_ids, self._ask, hidden.shape[-1], [])
        # Whoever wants the input's gradient may need a graph to begin somewhere (reentrant checkpointing does): here.
        return output.requires_grad_() if wanted else output

    def tapped(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, taps: Sequence[SiteSpec]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same, and what comes out of `taps`, `[B, S, h or width]` each; no gradient flows through it.

        Raises:
            UnsupportedCallError: As a call's, or the span has no taps.
        """
        span: object = self._span
        if not isinstance(span, TappedSpan):
            raise UnsupportedCallError("what stands for the cloud's layers here has no taps: use another method")

        def ask(hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
            output, tapped = span.tapped(hidden, mask, positions, taps)
            return torch.cat([output, *(tap.to(output) for tap in tapped)], dim=-1)

        self._wants_gradient(hidden)
        widths = [hidden.shape[-1], *(tap.rank or hidden.shape[-1] for tap in taps)]
        tap_key = [[tap.layer, tap.rank, tap.seed] for tap in taps]
        row = self._look_up(hidden.detach(), attention_mask, position_ids, ask, sum(widths), tap_key)
        output, *tapped = torch.split(row, widths, dim=-1)
        return output, tuple(tapped)

    def know_rows_by_input(self, edge: Any) -> tuple[Any, ...]:
        """Take a row's content from what the base model is called with; returns the hooks that do it."""
        base = edge.get_submodule(edge.isthmus_origin.family.base)
        return (
            base.register_forward_pre_hook(self._note_input, with_kwargs=True),
            base.register_forward_hook(self._forget_input, always_call=True),
        )

    def _note_input(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = kwargs | dict(zip(inspect.signature(base.forward).parameters, args, strict=False))
        tensors = {name for name, value in named.items() if isinstance(value, Tensor)}
        source = named.get("input_ids")
        self._source = (named.get("inputs_embeds") if source is None else source) if tensors <= _KNOWN_TENSORS else None

    def _forget_input(self, *_: Any) -> None:
        self._source = None

    def _wants_gradient(self, hidden: Tensor) -> bool:
        """Whether the caller wants the input's gradient; refuses where something below the cut has a use for it."""
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return False
        self._check_input_gradient()
        return True

    def _check_input_gradient(self) -> None:
        if self._model is not None:
            refuse_trainable(self._model)
        if self._model is None or not wants_input_grads(edge_model(self._model)):
            raise UnsupportedCallError(
                "the span's input wants a gradient, so something trainable lies below the cut, and the span cache has "
                "no gradient for it: put adapters on the top layers only, leave enable_input_require_grads() out, or "
                "train without the cache"
            )
        if not self._warned:
            warn_of_input_grads()
            self._warned = True

    # Rows -------------------------------------------------------------------------------------------------------------

    def _look_up(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        ask: _Ask,
        width: int,
        tap_key: list[list[int]],
    ) -> Tensor:
        """The rows of a batch, `[B, S, width]`; `tap_key` is layer, rank and seed of each tap."""
        rows = self._rows(hidden, mask, positions, tap_key)
        output = hidden.new_zeros(*hidden.shape[:-1], width)
        missing = []
        for index, (start, stop, key) in enumerate(rows):
            found = self._store.get(key, (stop - start, width))
            if found is None:
                missing.append(index)
            else:
                output[index, start:stop] = found.to(output)
        if len(missing) == len(rows):  # as an uncached run asks, and so with the same bits
            output = ask(hidden, mask, positions)
        elif missing:
            inside = slice(min(rows[index].start for index in missing), max(rows[index].stop for index in missing))
            if positions is not None:
                positions = positions.expand(len(hidden), -1)[missing, inside]
            asked = ask(hidden[missing, inside], None if mask is None else mask[missing, inside], positions)
            for answer, index in zip(asked, missing, strict=True):
                start, stop, _ = rows[index]
                output[index, start:stop] = answer[start - inside.start : stop - inside.start]
        for index in missing:
            start, stop, key = rows[index]
            self._store.put(key, output[index, start:stop])
        return output

    def _ask(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        output = self._span(hidden, mask, positions)
        if output.requires_grad:
            raise UnsupportedCallError(
                "something inside the span is trainable, so its output changes with every step and cannot be cached: "
                "put adapters on the top layers only, or train without the cache"
            )
        return output

    def _rows(
        self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, tap_key: list[list[int]]
    ) -> list[_Row]:
        source = self._source
        content = hidden if source is None else source
        kind = hidden.device.type
        common = [
            str(hidden.dtype),
            str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
            # transformers takes positions that restart for packed texts, and separates these, where there is no mask.
            positions is not None and mask is None,
            source is not None,
            *([tap_key] if tap_key else []),
        ]
        content = content.detach().cpu().contiguous()
        marks = None if mask is None else mask.cpu().bool()
        places = None if positions is None else positions.cpu().long().expand(len(hidden), -1).contiguous()
        rows = []
        for index in range(len(hidden)):
            start, stop, whole = _extent(None if marks is None else marks[index], hidden.shape[1])
            parts = [content[index, start:stop]]
            if places is not None:
                parts.append(places[index, start:stop])
            if not whole and marks is not None:
                parts.append(marks[index])
            # Positions are counted from the padding's start if nobody gives them. In hidden states they are contained,
            # or relative; of tokens they are a part.
            offset = start if source is not None and places is None else None
            rows.append(_Row(start, stop, self._key([*common, offset, whole], parts)))
        return rows

    def _key(self, tap_key: list[Any], parts: list[Tensor]) -> bytes:
        shapes = [[str(part.dtype), *part.shape] for part in parts]
        hashed = hashlib.blake2b(self._store.identity, digest_size=KEY_BYTES)
        hashed.update(json.dumps([tap_key, shapes]).encode() + b"\0")
        for part in parts:
            hashed.update(part.view(torch.uint8).numpy().data)
        return hashed.digest()


def _extent(marks: Tensor | None, length: int) -> tuple[int, int, bool]:
    """Where a row's tokens are, `[start, stop)`, and whether they are all there is of it.

    A row with padding between its tokens, or with nothing but padding, is taken as it is, with its mask.
    """
    if marks is None:
        return 0, length, True
    tokens = marks.nonzero()[:, 0]
    if not len(tokens):
        return 0, length, False
    start, stop = int(tokens[0]), int(tokens[-1]) + 1
    return (start, stop, True) if stop - start == len(tokens) else (0, length, False)
