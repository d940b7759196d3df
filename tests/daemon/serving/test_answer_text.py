"""From tokens to text: whole characters, and texts that end an answer, however they are split over tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from support.models.tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from isthmus.daemon.serving.answer_text import StopTexts, StopTokens, TextDecoder

TEXT = "Grüße, 世界! 👩‍🚀 naïve — ok  x"


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a sign for the space before them, and single bytes, as Llama 2 has them."""
    words = ["▁Hello", "▁big", "▁", "o", "k", "!"]
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    vocab |= {word: 257 + n for n, word in enumerate(words)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))  # noqa: S106
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def pieces(tokenizer: Any, tokens: Iterable[int]) -> list[str]:
    decoder = TextDecoder(tokenizer)
    return [*(decoder.push(token) for token in tokens), decoder.end()]


def test_pieces_are_whole_characters() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(TEXT)["input_ids"]
    assert len(tokens) == len(TEXT.encode())  # a token is a byte
    found = pieces(tokenizer, tokens)
    assert "".join(found) == TEXT
    assert "�" not in "".join(found)
    assert max(map(len, found)) == 1
    alone = [tokenizer.decode([token]) for token in tokens]
    assert "�" in "".join(alone)  # so it is not for want of broken characters


def test_sentencepieces_bytes_and_spaces() -> None:
    tokenizer = sentencepiece_tokenizer()
    tokens = [257, 258, *(1 + byte for byte in "世é".encode()), 257, 259, 260, 261]
    found = pieces(tokenizer, tokens)
    assert "".join(found) == tokenizer.decode(tokens) == "Hello big世é Hello ok"
    assert "�" not in "".join(found)
    assert "".join(tokenizer.decode([token]) for token in tokens) != tokenizer.decode(tokens)


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_bytes_are_the_text_of_all(seed: int) -> None:
    tokenizer, chance = tiny_tokenizer(), random.Random(seed)  # noqa: S311
    tokens = [chance.choice((chance.randrange(259), 100 + chance.randrange(40))) for _ in range(200)]
    found = pieces(tokenizer, tokens)
    assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(found) != tokenizer.decode(tokens, skip_special_tokens=False)  # special ones are among them


def test_a_long_text_is_decoded_in_short_parts() -> None:
    tokenizer, longest = tiny_tokenizer(), 0
    decoder = TextDecoder(tokenizer)
    for token in tokenizer("abc" * 400)["input_ids"]:
        decoder.push(token)
        longest = max(longest, len(decoder._tokens))
    assert longest <= 3


def stopped(texts: list[str], *stops: str) -> tuple[list[str], bool]:
    finder = StopTexts(stops)
    found = [finder.push(text) for text in texts]
    return [*found, finder.end()], finder.found


def test_a_stop_text_is_not_given_however_it_is_split() -> None:
    text = "one STOP two"
    for parts in ([text], list(text), ["one S", "T", "OP t", "wo"], ["one STO", "P two"]):
        found, ended = stopped(parts, "STOP")
        assert "".join(found) == "one "
        assert ended
    assert stopped(["one STO", "RM"], "STOP") == (["one ", "STORM", ""], False)
    assert stopped(["one ST"], "STOP") == (["one ", "ST"], False)  # held back, and given at the end
    assert stopped(list(text)) == ([*text, ""], False)


def test_the_first_of_several_stop_texts_counts() -> None:
    assert stopped(["ab", "cabd"], "abd", "cab") == (["", "ab", ""], True)
    assert stopped(["aab"], "aab", "ab") == (["", ""], True)
    assert stopped(["x", "aaab"], "aab") == (["x", "a", ""], True)


@pytest.mark.parametrize("seed", range(20))
def test_stops_in_any_text(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    text = "".join(chance.choice("ab") for _ in range(60))
    stops = ["".join(chance.choice("ab") for _ in range(chance.randrange(3, 8))) for _ in range(3)]
    parts = [text[at : at + 2] for at in range(0, len(text), 2)]
    found, ended = stopped(parts, *stops)
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    # A stop text that is complete first counts, even where a longer one began before it.
    firsts = [(text.find(stop) + len(stop) + 1) // 2 for stop in stops if stop in text]
    seen = text[: 2 * min(firsts)] if firsts else text
    expected = min((seen.find(stop) for stop in stops if stop in seen), default=len(text))
    assert "".join(found) == text[:expected]
    assert ended == bool(places)


def test_sequences_of_tokens() -> None:
    stops = StopTokens([[5], [1, 2, 1]])
    assert [stops.push(token) for token in (1, 2, 3, 1, 2, 1)] == [False] * 5 + [True]
    assert stops.push(5)
    assert not any(StopTokens([]).push(token) for token in range(9))
