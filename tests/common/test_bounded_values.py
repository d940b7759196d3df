"""How many values JSON may hold before it is parsed, and how much of a value is shown."""

from __future__ import annotations

import contextlib
import json
import tracemalloc

import pytest

from isthmus.common.bounded_values import MOST_DEPTH, MOST_PARTS, MOST_SHOWN, MOST_VALUES, brief, check_json, shown

MANY = 1 << 18


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("within", "beyond", "says"),
    [
        (_nested(MOST_DEPTH), _nested(MOST_DEPTH + 1), "nested deeper than 64"),
        (json.dumps([[]] * (MOST_PARTS - 1)), json.dumps([[]] * MOST_PARTS), "65536 texts, lists and objects"),
        (json.dumps([{}] * (MOST_PARTS - 1)), json.dumps([{}] * MOST_PARTS), "65536 texts, lists and objects"),
        (json.dumps([""] * (MOST_PARTS - 1)), json.dumps([""] * MOST_PARTS), "65536 texts, lists and objects"),
        (json.dumps([1] * (MOST_VALUES - 1)), json.dumps([1] * MOST_VALUES), "327680 values"),
        (b'{"":' * MOST_DEPTH, b'{"":' * (MOST_DEPTH + 1), "nested deeper"),  # one that is no JSON
    ],
)
def test_values_and_their_depth_have_bounds(within: str | bytes, beyond: str | bytes, says: str) -> None:
    check_json(within if isinstance(within, bytes) else within.encode())
    with pytest.raises(ValueError, match=says):
        check_json(beyond if isinstance(beyond, bytes) else beyond.encode())


@pytest.mark.parametrize(
    "text", ['[,{:"' * MOST_VALUES, "\\" * MANY, '\\"' * MANY, "]}" * MANY, "[" * MANY, "é,\n" * MANY]
)
def test_what_stands_in_a_text_is_one_value(text: str) -> None:
    for ascii_only in (True, False):
        check_json(json.dumps({"a": text, text[:1000]: [text]}, ensure_ascii=ascii_only).encode())


@pytest.mark.parametrize(
    "text", [b'"' + b'\\"' * MANY, b'["\\\\",' * MANY, b'"' * MANY, b"]" * MANY, b"[" * MANY, b'"\\' * MANY]
)
def test_what_is_no_json_costs_little(text: bytes) -> None:
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            check_json(text)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
    finally:
        tracemalloc.stop()


def test_of_a_value_only_the_beginning_is_written() -> None:
    assert brief("é" * 5) == "'ééééé'"
    assert shown("é") == "'\\xe9'"
    for value in ("x" * MANY, [["x" * MANY] * 9] * MANY, {"x" * MANY: ["y"] * MANY}, "\ud800" * MANY):
        tracemalloc.start()
        try:
            for text in (brief(value), shown(value)):
                assert len(text) == MOST_SHOWN
                assert text.endswith("…")
            assert tracemalloc.get_traced_memory()[1] < 64 << 10
        finally:
            tracemalloc.stop()
        shown(value).encode()
