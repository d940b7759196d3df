"""A stranger's text on a terminal: nothing that a terminal would obey gets through, and nothing else is lost."""

from __future__ import annotations

import io
import logging
import os
import warnings

import pytest
from hypothesis import given, strategies as st

from isthmus.common.terminal import guard_messages, plain, printable, shown

CLIPBOARD = "\x1b]52;c;cm0gLXJmIC8=\x07"
TITLE = "\x1b]0;root shell\x07"
ATTACKS = [CLIPBOARD, TITLE, "\x9d52;c;eA==\x9c", "\x1b[2J\x1b[H", "\x9b31m", "safe\rrm -rf", "\b\b", "\x7f", "\x00",
           "\u202egnp.exe", "\u2066x\u2069", "\x1bc", "\x0e", "\v\f"]  # fmt: skip
OBEYED = {
    *map(chr, range(0x20)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
}
ORDINARY = "Ä é 日本語\u3000全角 עברית\u200f العربية हिन्दी क\u200dष 👩\u200d👩\u200d👧\xa0§\n\tdef f():\n"


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_a_terminal_obeys_is_left(attack: str) -> None:
    assert OBEYED & set(attack)  # the attack is one
    assert not (OBEYED - {"\n", "\t"}) & set(plain(f"a{attack}b"))
    assert printable(f"a{attack}b").isprintable()


def test_ordinary_text_of_any_script_stays_as_it_is() -> None:
    assert plain(ORDINARY) == ORDINARY


@given(st.text())
def test_only_single_characters_are_replaced(text: str) -> None:
    cleaned = plain(text)
    assert len(cleaned) == len(text)
    assert all(new in (old, "\N{REPLACEMENT CHARACTER}") for new, old in zip(cleaned, text, strict=True))
    assert plain(cleaned) == cleaned


def test_a_pipe_gets_the_text_as_it_is() -> None:
    assert shown(CLIPBOARD, io.StringIO()) == CLIPBOARD
    with open(os.openpty()[1], "w") as terminal:  # noqa: PTH123  # a descriptor
        assert shown(CLIPBOARD, terminal) == plain(CLIPBOARD)


def test_messages_of_libraries_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    usual = logging.getLogRecordFactory()
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    logger = logging.getLogger("a library")
    logger.addHandler(handler)
    try:
        logger.warning("unknown key %s", CLIPBOARD)
        assert "\x1b" in out.getvalue()  # the control
        guard_messages()
        out.seek(0)
        out.truncate()
        logger.warning("unknown key %s\n", CLIPBOARD)
        assert "unknown key" in out.getvalue()
        assert "\x1b" not in out.getvalue()
        assert "\x1b" not in warnings.formatwarning(UserWarning(TITLE), UserWarning, "f.py", 1)
    finally:
        logging.setLogRecordFactory(usual)
        logger.removeHandler(handler)
