"""Messages about a session itself: attaching, where the workers are, signs of life, and its end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from isthmus.common.errors import MessageError
from isthmus.protocol.enrolment import TENANT_NAME
from isthmus.protocol.limits import MAX_NAME, MAX_WORKERS, Size, Text
from isthmus.protocol.secure.certificates import ISSUER_BYTES

MAX_TEXT = 1024
LINK_BYTES = 16

ForPeople = Annotated[str, Size(0, MAX_TEXT)]
Address = Annotated[
    str,
    Text(
        re.compile(r"([A-Za-z0-9_.\-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9_.\-]+)?\]):[0-9]{1,5}"),
        "a worker's address is host:port",
    ),
]


def cut(text: str) -> str:
    """A text for people, cut to what a message carries: `MAX_TEXT` bytes of UTF-8."""
    return text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore")


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask for a sign of life."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The sign of life, with the ping's number.

    `peak_bytes`: the cloud's estimate of what the largest call of this session so far takes while it is computed; 0
    before the first. It says nothing of other tenants.
    """

    nonce: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """This side ends the session on purpose. A stream that ends without it was cut."""

    reason: ForPeople


@dataclass(frozen=True, slots=True)
class Account:
    """Whose work a pipeline's stage passes on: the edge's tenant, and its weight against the others', 1 or more."""

    tenant: Annotated[str, Text(TENANT_NAME, "the account of a tenant has the name of one")]
    weight: Annotated[int, Size(1, (1 << 32) - 1)]


@dataclass(frozen=True, slots=True)
class Attach:
    """The edge's first message: which of its links this is (16 random bytes, the same after every reconnect).

    The cloud ends an older session of the same edge and link, and counts the session against the tenant's quota.
    `interactive`: whether somebody waits for the session's calls, which then come before training. `deadline_ms`:
    within how many milliseconds a call without sites has to begin, or else is refused; 0 for no deadline.
    `settled`: the edge was sent here, or cannot reach where it was sent, and is not to be sent elsewhere. `account`:
    the tenant that a pipeline's stage attaches for; nobody but a stage may name one. `transcript`: whether the cloud
    keeps a transcript of the session's calls, which the edge asks for by `SignTranscript`.
    """

    link: Annotated[bytes, Size(LINK_BYTES, LINK_BYTES)]
    interactive: bool = False
    deadline_ms: int = 0
    settled: bool = False
    account: Account | None = None
    transcript: bool = False


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers of this cloud, `host:port` each, any of which may take the edge's sessions.

    `go_to`: the one to go to instead, as it has fewer sessions; the session ends. Empty where the edge is
    attached here.
    """

    addresses: Annotated[tuple[Address, ...], Size(1, MAX_WORKERS)]
    go_to: str = ""

    def check(self) -> None:
        """Check that the addresses differ, and that the edge is sent to one of them."""
        if len(set(self.addresses)) != len(self.addresses):
            raise MessageError("a list of workers names one address twice")
        if self.go_to and self.go_to not in self.addresses:
            raise MessageError(f"{self.go_to[:MAX_NAME]!r} is refused: the edge is sent to a worker that is not listed")


@dataclass(frozen=True, slots=True)
class SignTranscript:
    """Ask for the cloud's signature under the session's transcript so far: of `exchanges`, by the edge's count."""

    exchanges: int


@dataclass(frozen=True, slots=True)
class SignedTranscript:
    """The cloud's word for what it was sent and what it answered in a session (`isthmus.privacy.transcript`).

    `head`: of the hash chain after so many `exchanges`. `signed_at`: Unix seconds. `signature`: by the worker's key.
    The others are the worker's certificate; `issuer` is that of who has signed it, empty where that is the root.
    """

    exchanges: int
    head: Annotated[bytes, Size(32, 32)]
    signed_at: int
    signature: Annotated[bytes, Size(64, 64)]
    root: Annotated[bytes, Size(32, 32)]
    worker: Annotated[bytes, Size(32, 32)]
    not_after: int
    root_signature: Annotated[bytes, Size(64, 64)]
    issuer: Annotated[bytes, Size(0, ISSUER_BYTES)] = b""

    def check(self) -> None:
        """Check that an issuer's certificate is whole."""
        if self.issuer and len(self.issuer) != ISSUER_BYTES:
            raise MessageError(f"{len(self.issuer)} bytes are no issuer's certificate: {ISSUER_BYTES} are needed")
