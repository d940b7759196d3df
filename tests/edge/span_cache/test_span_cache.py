"""The span cache: rows that were asked for once are found again in any batch, and in no other case."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.common.errors import UnsupportedCallError
from isthmus.edge.span_cache.cache_store import SpanStore
from isthmus.edge.span_cache.span_cache import CachedSpan, SpanIdentity

PLENTY = 1 << 24
WIDTH = 4
IDENTITY = SpanIdentity("d1", "2:2", "fp32", "sdpa", "fp32", "fp32")


class Asked:
    """A span that writes down what it is asked; by itself it triples each position and adds the ones before it."""

    def __init__(self, span: Callable[..., Tensor] | None = None) -> None:
        self.calls: list[Tensor] = []
        self._span = span

    def __call__(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        assert not hidden.requires_grad
        self.calls.append(hidden.clone())
        if self._span is not None:
            return self._span(hidden, mask, positions)
        seen = hidden if mask is None else hidden * mask[..., None]
        output = 3 * hidden + seen.cumsum(1)
        return output if positions is None else output + positions[..., None]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SpanStore]:
    with SpanStore(tmp_path, IDENTITY.key(), max_bytes=PLENTY) as store:
        yield store


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Whole numbers, whose sums are exact in any order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def padded(rows: list[Tensor], length: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """A batch of rows `[n, h]` with rubbish where they are padded, and its mask."""
    hidden, mask = torch.full((len(rows), length, WIDTH), 77.0), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(len(row))
        hidden[index, place], mask[index, place] = row, 1
    return hidden, mask


# Rows -----------------------------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_asked(store: SpanStore) -> None:
    hidden, mask = padded([numbers(n, WIDTH, seed=n) for n in (3, 5, 2)], 5)
    asked = Asked()
    cached = CachedSpan(asked, store)
    first = cached(hidden, mask, None)
    assert torch.equal(first, Asked()(hidden, mask, None))  # padding included: the very call of an uncached run
    second = cached(hidden, mask, None)
    assert len(asked.calls) == 1
    assert torch.equal(second, first * mask[..., None])
    stats = cached.stats()
    assert (stats.hits, stats.misses, stats.rows) == (3, 3, 3)


def test_a_row_of_another_shape_is_asked_for_again(store: SpanStore) -> None:
    hidden, asked = numbers(1, 3, WIDTH), Asked()
    cached = CachedSpan(asked, store)
    (row,) = cached._rows(hidden, None, None, [])
    store.put(row.key, numbers(1, WIDTH))  # as a file that something else has written may have it
    assert torch.equal(cached(hidden, None, None), Asked()(hidden, None, None))
    assert torch.equal(cached(hidden, None, None), Asked()(hidden, None, None))
    assert len(asked.calls) == 1
    assert (cached.stats().damaged, cached.stats().hits) == (1, 1)


def test_only_what_is_missing_is_asked_and_without_the_padding_that_it_shares(store: SpanStore) -> None:
    long, middle, short = (numbers(n, WIDTH, seed=n) for n in (9, 4, 2))
    asked = Asked()
    cached = CachedSpan(asked, store)
    cached(long[None], None, None)
    hidden, mask = padded([middle, long, short], 9)
    output = cached(hidden, mask, None)
    assert [tuple(call.shape) for call in asked.calls] == [(1, 9, WIDTH), (2, 4, WIDTH)]
    assert torch.equal(output, Asked()(hidden, mask, None) * mask[..., None])
    assert cached.stats().rows == 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_batch_of_any_rows_equals_an_uncached_one(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows = [numbers(n, WIDTH, seed=n) for n in (1, 2, 3, 5, 8)]
    folder = tmp_path_factory.mktemp("cache")
    bound = data.draw(st.sampled_from([PLENTY, 400]))
    with SpanStore(folder, IDENTITY.key(), max_bytes=bound) as store:
        asked = Asked()
        cached = CachedSpan(asked, store)
        for _ in range(data.draw(st.integers(1, 4))):
            chosen = [rows[i] for i in data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))]
            extra = data.draw(st.integers(0, 3))
            hidden, mask = padded(chosen, max(map(len, chosen)) + extra, left=data.draw(st.booleans()))
            if data.draw(st.booleans()):
                holes = torch.tensor(data.draw(st.lists(st.booleans(), min_size=mask.shape[1], max_size=mask.shape[1])))
                mask = mask * ~holes
            positions = None
            if data.draw(st.booleans()):
                positions = torch.arange(mask.shape[1])[None] + data.draw(st.integers(0, 2))
            known = store.stats().rows
            output = cached(hidden, mask, positions)
            expected = Asked()(hidden, mask, positions)
            assert torch.equal(output[mask.bool()], expected[mask.bool()])
            before = len(asked.calls)
            again = cached(hidden, mask, positions)
            assert torch.equal(again[mask.bool()], expected[mask.bool()])
            assert bound < PLENTY or len(asked.calls) == before
            assert store.stats().rows >= known


def test_a_row_is_found_again_behind_other_padding_and_without_a_mask(store: SpanStore) -> None:
    row = numbers(3, WIDTH)
    asked = Asked()
    cached = CachedSpan(asked, store)
    for length, left in ((3, False), (6, False), (6, True), (4, True)):
        hidden, mask = padded([row], length, left=left)
        output = cached(hidden, mask, None)
        assert torch.equal(output[mask.bool()], Asked()(row[None], None, None)[0])
    assert torch.equal(cached(row[None], None, None), Asked()(row[None], None, None))
    assert len(asked.calls) == 1


def different(what: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    hidden, mask, positions = numbers(1, 4, WIDTH), torch.ones(1, 4, dtype=torch.long), torch.arange(4)[None]
    if what == "content":
        hidden[0, 3, 2] += 1
    elif what == "dtype":
        hidden = hidden.to(torch.bfloat16)
    elif what == "length":
        hidden, mask, positions = hidden[:, :3], mask[:, :3], positions[:, :3]
    elif what == "positions":
        positions[0, 3] = 9
    elif what == "no positions":
        return hidden, mask, None
    elif what == "no mask":  # with positions that restart, transformers takes that for packed texts
        return hidden, None, positions
    elif what == "a hole":
        mask[0, 1] = 0
    return hidden, mask, positions


@pytest.mark.parametrize(
    "what", ["content", "dtype", "length", "positions", "no positions", "no mask", "a hole", "autocast"]
)
def test_a_row_is_another_one_if_anything_of_it_is(store: SpanStore, what: str) -> None:
    asked = Asked()
    cached = CachedSpan(asked, store)
    cached(*different("nothing"))
    cached(*different("nothing"))
    assert len(asked.calls) == 1
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        output = cached(*different(what))
    assert len(asked.calls) == 2
    assert output.dtype == (torch.bfloat16 if what == "dtype" else torch.float32)


@pytest.mark.parametrize("field", ["digest", "plan", "span_dtype", "attn_implementation", "codec_up", "codec_down"])
def test_another_span_is_another_owner(field: str) -> None:
    values = {name: getattr(IDENTITY, name) for name in IDENTITY.__slots__}
    assert SpanIdentity(**values).key() == IDENTITY.key()
    assert SpanIdentity(**{**values, field: "other"}).key() != IDENTITY.key()
    assert IDENTITY.key(b"weights") != IDENTITY.key()


def test_positions_of_one_row_stand_for_all(store: SpanStore) -> None:
    hidden, one = numbers(2, 3, WIDTH), torch.tensor([[4, 5, 6]])
    asked = Asked()
    cached = CachedSpan(asked, store)
    first = cached(hidden, None, one)
    assert torch.equal(cached(hidden, None, one.expand(2, -1)), first)
    assert len(asked.calls) == 1
    cached(torch.cat([hidden[:1], hidden[:1] + 1]), None, one)
    assert len(asked.calls[1]) == 1


def test_a_bound_that_is_reached_costs_calls_and_nothing_else(tmp_path: Path) -> None:
    hidden = numbers(4, 3, WIDTH)
    asked = Asked()
    with SpanStore(tmp_path, IDENTITY.key(), max_bytes=300) as store:
        cached = CachedSpan(asked, store)
        for _ in range(3):
            assert torch.equal(cached(hidden, None, None), Asked()(hidden, None, None))
        stats = cached.stats()
    assert stats.full
    assert 0 < stats.rows < 4
    assert [len(call) for call in asked.calls] == [4, 4 - stats.rows, 4 - stats.rows]


# Gradients ------------------------------------------------------------------------------------------------------------


def test_an_input_that_wants_a_gradient_is_refused(store: SpanStore) -> None:
    cached = CachedSpan(Asked(), store)
    hidden = numbers(1, 3, WIDTH).requires_grad_()
    with pytest.raises(UnsupportedCallError, match="top layers only, leave enable_input_require_grads"):
        cached(hidden, None, None)
    with torch.no_grad():
        assert not cached(hidden, None, None).requires_grad


def test_a_span_with_something_trainable_inside_is_refused(store: SpanStore) -> None:
    scale = torch.ones((), requires_grad=True)
    cached = CachedSpan(Asked(lambda hidden, *_: hidden * scale), store)
    with pytest.raises(UnsupportedCallError, match="inside the span is trainable"):
        cached(numbers(1, 3, WIDTH), None, None)
    assert cached.stats().rows == 0


def test_a_copied_model_uses_the_same_cache(store: SpanStore) -> None:
    cached = CachedSpan(Asked(), store)
    assert copy.deepcopy(cached) is cached


# Taps -----------------------------------------------------------------------------------------------------------------

TAPS = (SiteSpec(3, "", Placement.TAP), SiteSpec(7, "", Placement.TAP, rank=2, seed=5))


class Tapped(Asked):
    """The same, with two taps: the input, and the first two numbers of the output."""

    def tapped(
        self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, taps: tuple[SiteSpec, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = self(hidden, mask, positions)
        return output, tuple((hidden, output)[number][..., : tap.rank or WIDTH] for number, tap in enumerate(taps))


def test_taps_come_out_of_the_cache_with_their_rows(store: SpanStore) -> None:
    rows = [numbers(n, WIDTH, seed=n) for n in (3, 5, 2)]
    hidden, mask = padded(rows, 5)
    span = Tapped()
    cached = CachedSpan(span, store)
    output, taps = cached.tapped(hidden, mask, None, TAPS)
    plain, expected = Tapped().tapped(hidden, mask, None, TAPS)
    for got, wanted in zip((output, *taps), (plain, *expected), strict=True):
        assert torch.equal(got, wanted)
    more, more_mask = padded([rows[1], numbers(6, WIDTH, seed=9)], 6, left=True)
    output, taps = cached.tapped(more, more_mask, None, TAPS)
    plain, expected = Tapped().tapped(more, more_mask, None, TAPS)
    for got, wanted in zip((output, *taps), (plain, *expected), strict=True):
        assert torch.equal(got[more_mask.bool()], wanted[more_mask.bool()])
    assert [len(call) for call in span.calls] == [3, 1]


def test_rows_with_other_taps_or_with_none_are_other_rows(store: SpanStore) -> None:
    span = Tapped()
    cached = CachedSpan(span, store)
    hidden = numbers(1, 4, WIDTH)
    cached(hidden, None, None)
    cached.tapped(hidden, None, None, TAPS)
    cached.tapped(hidden, None, None, TAPS[:1])
    cached.tapped(hidden, None, None, (TAPS[0], SiteSpec(7, "", Placement.TAP, rank=2, seed=6)))
    assert len(span.calls) == 4
    cached.tapped(hidden, None, None, TAPS)
    assert len(span.calls) == 4


def test_taps_of_a_span_without_any_are_refused(store: SpanStore) -> None:
    with pytest.raises(UnsupportedCallError, match="no taps"):
        CachedSpan(Asked(), store).tapped(numbers(1, 4, WIDTH), None, None, TAPS)


def test_a_ladder_over_the_cache_wants_no_gradient_of_its_input(store: SpanStore) -> None:
    hidden = numbers(1, 4, WIDTH).requires_grad_()
    with pytest.raises(UnsupportedCallError, match="something trainable lies below the cut"):
        CachedSpan(Tapped(), store).tapped(hidden, None, None, TAPS)
