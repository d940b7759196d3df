"""The session's information, which the cloud sends in the handshake's last flight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fuzz.target import Target
from fuzz.targets.sessions import _check, info_with
from support.protocol.wire import TENANT, session_info

from isthmus.common.errors import MessageError
from isthmus.edge.client.fetch import _name
from isthmus.protocol import encoding
from isthmus.protocol.encoding import pack_info, unpack_info
from isthmus.protocol.messages import MAX_INFO, SessionInfo

INFO = session_info(TENANT, bytes(16))


def _run(data: bytes) -> None:
    try:
        info = unpack_info(data)
    except MessageError:
        return
    _check(info)
    if not _name(info).replace("-", "").isalnum():
        raise AssertionError("the edge's cache has no safe name")


def _seeds() -> Iterator[bytes]:
    yield pack_info(INFO)
    yield pack_info(replace(INFO, codecs=()))
    yield info_with(plan="a")
    yield info_with(model="\u200b")
    yield info_with(codecs=["x" * 257])
    yield info_with(limits=None)
    yield info_with(limits={"activation_cache_bytes": 1})
    yield pack_info(INFO) + b"\xfa\x07\x00"
    yield pack_info(INFO)[:-1]
    yield b" " * (MAX_INFO + 1)


TARGET = Target(
    _run,
    _seeds,
    [unpack_info, encoding._parse, encoding._read, encoding.check, SessionInfo.check],
    floor=0.7,
    max_len=MAX_INFO + 2,
    words=[b"1:1", b"\x0a\x20", b"\x1a\x40", b"\x5a", b"\x60"],
)
