"""Values that a stranger has written: how many a text of JSON may hold, and how much of one an error shows."""

from __future__ import annotations

import reprlib
from itertools import accumulate

MOST_DEPTH = 64
"""Lists and objects inside each other."""
MOST_PARTS = 1 << 16
"""Texts (names among them), lists and objects of a JSON text: each takes some hundred bytes of memory, and time."""
MOST_VALUES = (1 << 18) + MOST_PARTS
"""Values and names of a JSON text: the tokens of the longest prompt, and all else."""
MOST_SHOWN = 80
"""Characters of a value in an error."""

_OPENING, _CLOSING, _BETWEEN = b"[{", b"]}", b",:"
_NO_MARKS = bytes(set(range(256)) - set(_OPENING + _CLOSING + _BETWEEN))
_STEPS = [(byte in _OPENING) - (byte in _CLOSING) for byte in range(256)]
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 8


def check_json(data: bytes) -> None:
    """Refuse JSON of more, or deeper, values than may be, before a parser makes them. What is no JSON may pass.

    A parser holds the interpreter's lock until it has made all values; this takes a fraction of its time.

    Raises:
        ValueError: There are too many; the message goes on behind the name of what holds them.
    """
    data = data.replace(rb"\\", b"").replace(rb"\"", b"")  # so that each quotation mark begins or ends a text
    texts = data.count(b'"') // 2
    if texts > MOST_PARTS:
        raise ValueError(f"holds more than {MOST_PARTS} texts")
    rest = b"".join(data.split(b'"')[::2])
    brackets = rest.translate(None, _NO_MARKS + _BETWEEN)
    parts = texts + sum(brackets.count(byte) for byte in _OPENING)
    if parts > MOST_PARTS or len(brackets) > 2 * MOST_PARTS:
        raise ValueError(f"holds more than {MOST_PARTS} texts, lists and objects")
    if sum(rest.count(byte) for byte in _OPENING + _BETWEEN) >= MOST_VALUES:
        raise ValueError(f"holds more than {MOST_VALUES} values")
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MOST_DEPTH:
        raise ValueError(f"has lists and objects nested deeper than {MOST_DEPTH}")


def brief(value: object) -> str:
    """A value as an error shows it: its beginning. The rest of a long one is never written out."""
    text = _SHORT.repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"


def shown(value: object) -> str:
    """The same in ASCII, so that it is always possible to encode."""
    text = brief(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"
