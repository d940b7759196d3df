"""Whether a text that is called public repeats a private one: by runs of 13 tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

RUN = 13
"""Tokens of the lower-cased text in a row that a public text may not share with the private ones; after the 13 words of
Brown et al. (2020), by which they looked for benchmarks in what a model was trained on."""
_WORDS_AT_ONCE = 4096
"""Words that are tokenized together, as a tokenizer is slow at long texts."""


def plain_text(text: str) -> str:
    """A text without differences of case, of white space, and of how a character is encoded."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def runs_of(text: str, tokenizer: Any) -> Iterator[int]:
    """A hash of each run of `RUN` tokens of a plain text; a shorter text is one run, so that its like is found."""
    tokens = tokens_of(text, tokenizer)
    return (hash(tuple(tokens[at : at + RUN])) for at in range(max(bool(tokens), len(tokens) - RUN + 1)))


def tokens_of(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a plain text."""
    words = plain_text(text).split()
    pieces = [" " + " ".join(words[at : at + _WORDS_AT_ONCE]) for at in range(0, len(words), _WORDS_AT_ONCE)]
    return [token for each in pieces for token in tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"]]
