"""`authorized_edges`, whose lines are made of public keys that edges send."""

from __future__ import annotations

from collections.abc import Iterator

from fuzz.target import Target
from support.protocol.wire import EDGE, WORKER

from isthmus.common.errors import ConfigError
from isthmus.protocol import enrolment
from isthmus.protocol.enrolment import TENANT_NAME, AuthorizedEdges, Quota
from isthmus.protocol.secure.keys import format_public_key, parse_public_key


def _run(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        edges = AuthorizedEdges.parse(text)
    except ConfigError:
        return
    for key, tenant in edges._tenants.items():
        if not TENANT_NAME.fullmatch(tenant.name):
            raise AssertionError(f"{tenant.name!r} is no tenant's name")
        options = ",".join(filter(None, ("stage" if tenant.stage else "", tenant.quota.format())))
        line = f"{options} {format_public_key(key, tenant.name)}".strip()
        if AuthorizedEdges.parse(line).require(key) != tenant:
            raise AssertionError(f"{line!r} is another tenant when it is read again")


def _seeds() -> Iterator[bytes]:
    one, other = (
        format_public_key(key.public_key().public_bytes_raw(), name) for key, name in ((EDGE, "a"), (WORKER, "b@c"))
    )
    options = "max-sessions=2,max-bytes-in-flight=64MiB,weight=3,max-tokens-per-second=4,max-tokens=5"
    yield f"# who\n{options} {one}\n\n{other}\n".encode()
    yield f"stage,weight=2 {one}\nstage {other}".encode()
    yield f"{one}\n{one}".encode()
    yield f"weight=0 {one}".encode()
    yield f"weight=1,weight=1 {one}".encode()
    yield f"max-bytes-in-flight=a,b=1 {one}".encode()
    yield f"{one} b c".encode()
    yield "ssh-ed25519 AAAAé a".encode()
    yield b"ssh-rsa AAAA a"
    yield b"ssh-ed25519 AAAA a"


TARGET = Target(
    _run,
    _seeds,
    [AuthorizedEdges.parse, Quota, enrolment._parse_line, enrolment._count, enrolment.parse_size, parse_public_key],
    floor=0.95,
    max_len=1024,
    words=[name.encode() + b"=" for name in enrolment._OPTIONS] + [b"stage", b"ssh-ed25519 ", b"KiB", b"GiB", b"\n"],
)
