"""Other people's text on this side's terminal.

A terminal obeys what is written to it: escape sequences set its title, write to the clipboard (OSC 52), or overwrite
what stood there before, and marks for the direction of text make it read as something else. A model's name, an error
of the other side, a word in a stranger's file and the text that a model generates are all such text.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, TextIO

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Embeddings, overrides and isolates. The marks LRM, RLM and ALM, which ordinary text has, reorder nothing by force."""


def printable(text: str) -> str:
    """A stranger's words within one line: what is not printable, line feeds among it, becomes a question mark."""
    return "".join(character if character.isprintable() else "?" for character in text)


def plain(text: str) -> str:
    """Text of any length without what a terminal would obey: line feeds and tabs stay, controls are replaced.

    C0 and C1 controls, with them the beginnings of all escape sequences, and marks that force the direction of text.
    """
    return "".join(_REPLACEMENT if _is_obeyed(character) else character for character in text)


def shown(text: str, stream: TextIO) -> str:
    """What to write of `text` to `stream`: the text itself, or where that is a terminal `plain` text."""
    return plain(text) if stream.isatty() else text


def guard_messages() -> None:
    """Let log records and warnings of this process be `plain`: libraries quote the files that they read."""
    logging.setLogRecordFactory(_PlainRecord)
    usual = warnings.formatwarning

    def formatted(*args: Any, **options: Any) -> str:
        return plain(usual(*args, **options))

    warnings.formatwarning = formatted


class _PlainRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802  # the library's name
        """The record's text, plain."""
        return plain(super().getMessage())


def _is_obeyed(character: str) -> bool:
    code = ord(character)
    is_control = code < 0x20 or 0x7F <= code < 0xA0
    return (is_control and character not in "\n\t") or character in _DIRECTION
