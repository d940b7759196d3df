"""`serving.json` and the status that a cloud answers with, as `isthmus cloud status` reads them."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from fuzz.target import Cursor, Target, block, scratch

from isthmus.cloud.control import serve_state
from isthmus.common.errors import IsthmusError


@functools.cache
def _home() -> Path:
    return scratch()


def _run(data: bytes) -> None:
    script = Cursor(data)
    (_home() / serve_state.STATE_FILE).write_bytes(script.block())
    answer = io.BytesIO(script.rest())
    with patch("urllib.request.urlopen", lambda *_, **__: answer):
        try:
            found = serve_state.read_status(_home())
        except IsthmusError as error:
            str(error).encode(errors="backslashreplace")  # as standard error does
            return
    if not isinstance(found["workers"], list) or not isinstance(found["connection"], str):
        raise AssertionError("what was read is not the status of a cloud")


def _seeds() -> Iterator[bytes]:
    told = json.dumps({"pid": 1, "metrics": "127.0.0.1:9", "connection": "isthmus://a:1#SHA256:"}).encode()
    yield block(told) + b'{"state": "serving", "workers": []}'
    yield block(told) + b"{}"
    yield block(told.replace(b"127.0.0.1:9", b"")) + b"{}"
    yield block(b"{}")
    yield block(b"[]")
    yield block(b"\xff")
    yield block(b"[" * 2000)
    yield block(told) + b"[]"
    yield block(told) + b"[" * 2000


TARGET = Target(
    _run,
    _seeds,
    [serve_state.read_status, serve_state._read_state],
    floor=0.8,
    max_len=2048,
    words=[b'"pid": ', b'"metrics": ', b'"connection": ', b'"workers": ', b"null", b"\\ud800"],
)
