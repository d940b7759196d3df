"""Decode passes: fast has transformers' bits alone; exact has the same bits in every batch and division."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.models.tiny import CONFIGS, HIDDEN
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from isthmus.backbone.decoding.decode_pass import DecodePass, ExactCall, FastCall, attention
from isthmus.backbone.decoding.key_values import BLOCK, KeyValues, cache_bytes
from isthmus.backbone.split.span import FrozenSpan, SpanInput

from ..conftest import Pairs

ROWS = 16
"""From so many rows on, products of the tiny models' linears have the same bits in any batch."""


def states(length: int, seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def decode_pass(span: FrozenSpan) -> DecodePass:
    return DecodePass(span, ROWS)


def exactly(decode: DecodePass, span: FrozenSpan, hidden: Tensor, blocks_of_calls: list[tuple[int, ...]]) -> Tensor:
    """The outputs of calls one after another, over one cache."""
    cache, outputs, at = KeyValues(span), [], 0
    for blocks in blocks_of_calls:
        size = sum(blocks)
        outputs += decode([ExactCall(SpanInput(hidden[:, at : at + size]), cache, blocks=blocks)])
        at += size
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("family", CONFIGS)
def test_exact_is_the_same_in_single_steps_verifying_and_replayed(pairs: Pairs, family: str) -> None:
    span = pairs(family).span
    decode, hidden = decode_pass(span), states(30)
    alone = exactly(decode, span, hidden, [(10,), *[(1,)] * 20])
    verifying = exactly(decode, span, hidden, [(10,), (1,) * 4, (1,) * 9, (1,), (1,) * 6])
    replayed = exactly(decode, span, hidden, [(10, *[1] * 17), *[(1,)] * 3])
    from_half = exactly(decode, span, hidden, [(10,), (1,), (1,) * 16, *[(1,)] * 3])
    assert torch.equal(verifying, alone)
    assert torch.equal(replayed, alone)
    assert torch.equal(from_half, alone)


@pytest.mark.parametrize("family", CONFIGS)
def test_exact_is_the_same_batched_with_others(pairs: Pairs, family: str) -> None:
    span = pairs(family).span
    decode, hidden = decode_pass(span), states(24)
    alone = exactly(decode, span, hidden, [(10,), *[(1,)] * 14])
    others = [KeyValues(span) for _ in range(3)]
    for number, cache in enumerate(others):
        decode([FastCall(SpanInput(states(7 + 5 * number, number)), cache)])
    cache, outputs = KeyValues(span), []
    outputs.append(decode([ExactCall(SpanInput(hidden[:, :10]), cache, blocks=(10,))])[0])
    for at in range(10, 24):
        mine = ExactCall(SpanInput(hidden[:, at : at + 1]), cache, blocks=(1,))
        theirs = [
            ExactCall(SpanInput(states(1, at)), others[0], blocks=(1,)),
            FastCall(SpanInput(states(1, at)), others[1]),
            FastCall(SpanInput(states(3, at)), others[2]),
        ]
        outputs.append(decode([theirs[0], mine, *theirs[1:]])[1])
    assert torch.equal(torch.cat(outputs, dim=1), alone)


def test_fast_verifying_has_other_bits_or_exact_would_not_be_needed(pairs: Pairs) -> None:
    span = pairs("llama").span
    decode, hidden = decode_pass(span), states(30)

    def fast(sizes: list[int]) -> Tensor:
        cache, outputs, at = KeyValues(span), [], 0
        for size in sizes:
            outputs += decode([FastCall(SpanInput(hidden[:, at : at + size]), cache)])
            at += size
        return torch.cat(outputs, dim=1)

    single, several = fast([10, *[1] * 20]), fast([10, 4, 9, 1, 6])
    assert torch.allclose(single, several, atol=1e-5)
    if torch.equal(single, several):
        pytest.skip("on this processor no product of the tiny model depends on its number of rows")


@pytest.mark.parametrize("family", CONFIGS)
def test_fast_batched_with_others_is_what_it_is_alone_but_for_rounding(pairs: Pairs, family: str) -> None:
    span = pairs(family).span
    decode, batches = decode_pass(span), [1, 2, 1]
    caches, alone = [KeyValues(span) for _ in batches], [KeyValues(span) for _ in batches]
    for step, (length, offset) in enumerate([(9, 0), (1, 0), (2, 0), (1, 0)] * 2):
        inputs = [
            SpanInput(states(length + number, 10 * step + number + offset, batch))
            for number, batch in enumerate(batches)
        ]
        together = decode([FastCall(each, cache) for each, cache in zip(inputs, caches, strict=True)])
        for each, cache, found in zip(inputs, alone, together, strict=True):
            assert torch.allclose(found, decode([FastCall(each, cache)])[0], atol=1e-4)
    assert [cache.length for cache in caches] == [cache.length for cache in alone]


def test_padding_on_the_left(pairs: Pairs) -> None:
    span = pairs("mistral").span
    decode, mask = decode_pass(span), torch.ones(2, 24, dtype=torch.long)
    mask[1, :6] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = states(24, batch=2)

    def run(sizes: list[tuple[int, ...]]) -> Tensor:
        cache, outputs, at = KeyValues(span), [], 0
        for blocks in sizes:
            end = at + sum(blocks)
            given = SpanInput(hidden[:, at:end], mask[:, :end], places[:, at:end])
            outputs += decode([ExactCall(given, cache, blocks=blocks)])
            at = end
        return torch.cat(outputs, dim=1)

    alone = run([(12,), *[(1,)] * 12])
    assert torch.equal(run([(12,), (1,) * 7, (1,) * 5]), alone)
    assert torch.equal(run([(12, *[1] * 12)]), alone)
    cache = KeyValues(span)
    whole = decode([FastCall(SpanInput(hidden, mask, places), cache)])[0]
    assert torch.allclose(alone[0], whole[0], atol=1e-4)
    assert torch.allclose(alone[1, 6:], whole[1, 6:], atol=1e-4)


def test_where_no_number_of_rows_is_enough_exact_is_refused(pairs: Pairs) -> None:
    span = pairs("llama").span
    decode = DecodePass(span, None)
    with pytest.raises(ValueError, match="exact decoding is not possible on this cloud"):
        decode([ExactCall(SpanInput(states(4)), KeyValues(span), blocks=(4,))])
    assert decode([FastCall(SpanInput(states(4)), KeyValues(span))])[0].shape == (1, 4, HIDDEN)


def test_a_cache_takes_the_bytes_that_are_counted(pairs: Pairs) -> None:
    for family, batch in itertools.product(("llama", "gemma3_text", "gpt2", "opt"), (1, 3)):
        span = pairs(family).span
        cache = KeyValues(span)
        for length in (5, BLOCK - 5, 1, 2 * BLOCK):
            decode_pass(span)([FastCall(SpanInput(states(length, batch=batch)), cache)])
            assert cache.nbytes == cache_bytes(span, batch, cache.length)


def test_crops_and_rows(pairs: Pairs) -> None:
    span = pairs("llama").span
    decode, hidden = decode_pass(span), states(12, batch=3)
    cache = KeyValues(span)
    decode([FastCall(SpanInput(hidden), cache)])
    cache.keep(8)
    cache.select(torch.tensor([2, 0]))
    found = decode([FastCall(SpanInput(hidden[:2, :1]), cache)])[0]
    fresh = KeyValues(span)
    decode([FastCall(SpanInput(hidden[[2, 0], :8]), fresh)])
    assert torch.allclose(found, decode([FastCall(SpanInput(hidden[:2, :1]), fresh)])[0], atol=1e-5)
    assert (cache.length, cache.rows) == (9, 2)


def test_queries_that_share_keys_attend_together_in_bf16(pairs: Pairs) -> None:
    span = pairs("llama").span
    module: Any = span.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    query, keys, values = numbers(2, 4, 3, 8), numbers(2, 2, 9, 8), numbers(2, 2, 9, 8)
    mask = torch.ones(3, 9, dtype=torch.bool).tril(6)[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :2] = False
    options = {"scaling": module.scaling, "dropout": 0.0}
    for rows, seen in ((slice(0, 3), mask), (slice(0, 1), None)):
        given = query[:, :, rows]
        plain = sdpa_attention_forward(module, given, keys, values, seen, **options)[0]
        found = attention(sdpa_attention_forward, module, given, keys, values, seen, options, {})
        assert torch.allclose(found.float(), plain.float(), atol=2e-2)
        other = attention(sdpa_attention_forward, module, given, keys.flip(1), values, seen, options, {})
        assert not torch.allclose(other.float(), plain.float(), atol=2e-2)
