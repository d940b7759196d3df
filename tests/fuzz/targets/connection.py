"""Connection strings and fingerprints, which people are sent."""

from __future__ import annotations

from collections.abc import Iterator

from fuzz.target import Target
from support.protocol.wire import PIN

from isthmus.common.errors import ConfigError
from isthmus.protocol.enrolment import MAX_PLACES, ConnectionString
from isthmus.protocol.secure.keys import Fingerprint


def _run(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        parsed = ConnectionString.parse(text)
    except ConfigError as error:
        str(error).encode(errors="backslashreplace")
        return
    if ConnectionString.parse(str(parsed)) != parsed:
        raise AssertionError(f"{text!r} is another connection when it is read again")
    if not 0 < parsed.port < 1 << 16 or not parsed.host.isprintable() or set(parsed.host) & set("/@[]?#, "):
        raise AssertionError(f"{parsed.address!r} is no address")
    if len(parsed.addresses) > MAX_PLACES:
        raise AssertionError(f"{text!r} names more places than it may")


def _seeds() -> Iterator[bytes]:
    for start in (
        "isthmus://cloud.example:7443",
        "isthmus+tls://[fe80::1%25eth0]:1",
        "isthmus://[::1]:65535",
        "isthmus://a:1,[::1]:2,b:3",
    ):
        yield f"{start}#{PIN}".encode()
    for wrong in ("https://a:1", "isthmus://a", "isthmus://a:b@c:1", "isthmus://a:1/x", "isthmus://a:99999", "a"):
        yield f"{wrong}#{PIN}".encode()
    yield b"isthmus://a:1#SHA256:" + b"A" * 42 + b"B"
    yield b"isthmus://a:1#MD5:aa"


TARGET = Target(
    _run,
    _seeds,
    [ConnectionString, Fingerprint.parse],
    floor=0.9,
    max_len=256,
    words=[b"isthmus://", b"isthmus+tls://", b"#SHA256:", str(PIN).encode(), b"[::1]", b"[v1.a]", b"%", b"\t"],
)
