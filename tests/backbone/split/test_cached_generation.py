"""Generation with a cache on both sides gives what the whole model generates: tokens, and the bits of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models.local_cache import CachingLocalSpan, LocalCache
from support.models.tiny import CONFIGS, EOS, PAD, WINDOW
from transformers import DynamicCache, StaticCache

from isthmus.common.errors import UnsupportedCallError

from ..conftest import Pair, Pairs, batch

NEW = 20


def caching(pair: Pair, **options: Any) -> Any:
    """The edge's model, whose span keeps caches."""
    pair.edge.remote_layers.span = CachingLocalSpan(pair.span, **options)
    for parameter in pair.whole.parameters():  # products of one row have other bits at other addresses
        parameter.data = parameter.data.clone()
    return pair.edge


def prompt(rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    inputs = batch("left_padded", rows=rows, length=length)
    del inputs["labels"]
    return inputs


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the logits that they were chosen by."""
    torch.manual_seed(3)
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "use_cache": True}
    found = model.generate(**inputs, **{**given, **options}, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


def assert_same(pair: Pair, inputs: dict[str, torch.Tensor], *, bits: bool = True, **options: Any) -> None:
    edge = caching(pair)
    expected, expected_logits = generated(pair.whole, inputs, **options)
    tokens, logits = generated(edge, inputs, **options)
    assert torch.equal(tokens, expected)
    if bits:
        assert torch.equal(logits, expected_logits)
    assert torch.allclose(logits, expected_logits, atol=1e-4)


@pytest.mark.parametrize("plan", ["2:2", "0:2", "2:0", "0:0"])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_of_every_family_and_plan_past_its_window(pairs: Pairs, family: str, plan: str) -> None:
    assert WINDOW < NEW
    assert_same(pairs(family, plan), prompt())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "top_k": 20}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["sampling", "beams"],
)
def test_sampling_and_beams(pairs: Pairs, family: str, options: dict[str, Any]) -> None:
    assert_same(pairs(family, "1:2"), prompt(), **options)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("sample", [False, True])
def test_prompt_lookup(pairs: Pairs, family: str, sample: bool) -> None:
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])}
    for plan in ("2:2", "0:2"):
        assert_same(pairs(family, plan), inputs, prompt_lookup_num_tokens=3, do_sample=sample)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("sample", [False, True])
def test_an_assistant(pairs: Pairs, family: str, sample: bool) -> None:
    assistant = pairs(family, initializer_range=0.21).whole
    inputs = {"input_ids": prompt(1)["input_ids"]}
    assert_same(pairs(family), inputs, assistant_model=assistant, do_sample=sample)


def test_without_the_rows_of_beams_the_text_is_another(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "select", lambda self, rows: None)
    with pytest.raises(AssertionError):
        assert_same(pairs("llama"), prompt(), num_beams=3)


def test_without_crops_the_text_is_another(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "crop", lambda self, length: None)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        assert_same(
            pairs("llama"), {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])}, prompt_lookup_num_tokens=3
        )


def test_a_cache_that_goes_on_with_a_second_turn(pairs: Pairs) -> None:
    pair = pairs("mistral")
    texts = []
    for model in (pair.whole, caching(pair)):
        cache, ids = DynamicCache(config=model.config), prompt(1)["input_ids"]
        for more in ([], [[9, 10, 11]]):
            ids = torch.cat([ids, torch.tensor(more, dtype=torch.long).reshape(1, -1)], dim=1)
            ids = model.generate(ids, cache=cache, max_new_tokens=6, do_sample=False, eos_token_id=None)
        texts.append(ids)
    assert torch.equal(*texts)


def test_a_forward_with_use_cache_makes_a_cache(pairs: Pairs) -> None:
    pair = pairs("llama")
    edge, ids = caching(pair), prompt(1)["input_ids"]
    with torch.no_grad():
        first = edge(ids[:, :6], use_cache=True)
        rest = edge(ids[:, 6:], use_cache=True, cache=first.cache).logits
        whole = pair.whole(ids[:, :6], use_cache=True)
        expected = pair.whole(ids[:, 6:], use_cache=True, cache=whole.cache).logits
    assert first.cache.get_seq_length() == 12
    assert torch.equal(rest, expected)


def test_stop_criteria_and_streaming(pairs: Pairs) -> None:
    pair = pairs("llama")

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    inputs = prompt(1)
    tokens, _ = generated(pair.whole, inputs)
    stop = int(tokens[0, 17])
    seen = []
    for model in (pair.whole, caching(pair)):
        streamer = Streamer()
        model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=[EOS, stop], streamer=streamer)
        seen.append(streamer.tokens)
    assert seen[0] == seen[1]
    assert len(seen[0]) < 12 + NEW


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"custom_generate": "somebody/contrastive-search"}, "custom_generate"),
        ({"assistant_early_exit": 2}, "assistant_early_exit"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 2}, "beams"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(pairs: Pairs, options: dict[str, Any], named: str) -> None:
    edge = caching(pairs("llama"))
    with pytest.raises(UnsupportedCallError, match=named):
        edge.generate(**prompt(1), max_new_tokens=2, **options)


def test_a_cache_from_elsewhere_is_refused(pairs: Pairs) -> None:
    pair = pairs("llama")
    edge, ids = caching(pair), prompt(1)["input_ids"]
    filled = pair.whole(ids, use_cache=True).cache
    with torch.no_grad():
        for cache, named in (
            (filled, "filled elsewhere"),
            (StaticCache(config=edge.config, max_cache_len=32), "StaticCache"),
            (DynamicCache(), "must know"),
        ):
            with pytest.raises(UnsupportedCallError, match=named):
                edge(ids, use_cache=True, cache=cache)


def test_what_is_cached_has_no_backward(pairs: Pairs) -> None:
    edge, ids = caching(pairs("llama")), prompt(1)["input_ids"]
    with pytest.raises(UnsupportedCallError, match="no backward"):
        edge(ids, use_cache=True)


def test_a_changed_weight_ends_a_cache(pairs: Pairs) -> None:
    edge, ids = caching(pairs("llama")), prompt(1)["input_ids"]
    with torch.no_grad():
        cache = edge(ids, use_cache=True).cache
        edge(ids[:, :1], use_cache=True, cache=cache)
        next(edge.parameters()).mul_(1.5)
        with pytest.raises(UnsupportedCallError, match="have changed"):
            edge(ids[:, :1], use_cache=True, cache=cache)


def test_a_sequence_longer_than_the_model_is_refused(pairs: Pairs) -> None:
    from isthmus.common.errors import ConfigError

    edge = caching(pairs("llama"))
    with pytest.raises(ConfigError, match="longer than the 128"):
        edge.generate(**prompt(1), max_new_tokens=120, do_sample=False, eos_token_id=None)
