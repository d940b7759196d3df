"""The session's information: JSON that the cloud sends in the handshake's last flight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from fuzz.target import Target
from fuzz.targets.sessions import _check
from support.wire import TENANT, session_info

from isthmus.common.errors import MessageError
from isthmus.edge.client.fetch import _name
from isthmus.protocol import messages
from isthmus.protocol.messages import SessionInfo


def _run(data: bytes) -> None:
    try:
        info = SessionInfo.from_json(data)
    except MessageError:
        return
    _check(info)
    if not _name(info).replace("-", "").isalnum():
        raise AssertionError("the edge's cache has no safe name")


def _seeds() -> Iterator[bytes]:
    plain: dict[str, Any] = asdict(session_info(TENANT, bytes(16)))
    yield json.dumps(plain).encode()
    yield json.dumps(plain | {"plan": "a"}).encode()
    yield json.dumps(plain | {"codecs": [1]}).encode()
    yield json.dumps(plain | {"model": "\u200b"}).encode()
    yield json.dumps(plain | {"n_layers": True, "more": 1}).encode()
    yield json.dumps(plain | {"limits": {"stash_bytes": -1}}).encode()
    yield b"[" * 2000
    yield b" " * (messages.MAX_INFO + 1)


TARGET = Target(
    _run,
    _seeds,
    [SessionInfo.from_json, messages._strict],
    floor=0.9,
    max_len=messages.MAX_INFO + 2,
    words=[b"session_id", b"digest", b"plan", b"codecs", b"limits", b"stash_bytes", b"\\u", b"1:1", b"true", b"1e9"],
)
