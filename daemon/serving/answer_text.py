"""From tokens to text, token by token: whole characters only, and no stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_MOST_HELD = 16
"""Characters that may still become others. Byte-level tokenizers show one for the bytes of a character that is not
whole, SentencePiece's one for each byte; more in a row are no characters at all."""


class TextDecoder:
    """Decodes tokens one by one. The pieces together are the text of all tokens, without special ones.

    As vLLM does it, each step decodes the tokens since the last but one place at which the text was whole: enough for
    tokenizers that treat a text's beginning in another way, and little enough for long texts.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._whole = 0  # of these tokens, so many end at the last place at which the text was whole
        self._given = 0  # characters of their text

    def push(self, token: int) -> str:
        """The characters that are whole with this token."""
        self._tokens.append(token)
        text = self._text()
        settled = max(len(text.rstrip(_UNKNOWN)), len(text) - _MOST_HELD)
        new = text[self._given : settled]
        self._given = max(self._given, settled)
        if new and settled == len(text):
            del self._tokens[: self._whole]
            self._whole = len(self._tokens)
            self._given = len(self._text())
        return new

    def end(self) -> str:
        """What is left: bytes that have become no character."""
        text = self._text()
        new, self._given = text[self._given :], len(text)
        return new

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))


class StopTexts:
    """Looks for texts that end an answer. What may be the beginning of one is held back.

    Args:
        texts: None of them empty.

    Attributes:
        found: Whether one has come; then nothing else is given.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.found = False
        self._texts = tuple(texts)
        self._held = ""

    def push(self, text: str) -> str:
        """What is certainly part of the answer, with the text that follows."""
        if self.found:
            return ""
        held = self._held + text
        places = [place for each in self._texts if (place := held.find(each)) >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        kept = max((_overlap(held, each) for each in self._texts), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def end(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first ones of `stop`, which is not in it."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)


class StopTokens:
    """Looks for sequences of tokens that end an answer.

    Args:
        sequences: None of them empty.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._sequences = [list(each) for each in sequences]
        self._last: list[int] = []
        self._longest = max(map(len, self._sequences), default=0)

    def push(self, token: int) -> bool:
        """Whether the tokens so far end with one of them."""
        self._last = [*self._last, token][-self._longest :] if self._longest else []
        return any(self._last[-len(each) :] == each for each in self._sequences)
