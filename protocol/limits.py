"""The limits of a session: what this side accepts, and when it changes keys; and the rules of a message's fields.

Every number that arrives in a frame or a message is compared with one of these before anything is allocated for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MAX_WORKERS = 128
"""Most workers of a cloud."""

Buffer = bytes | bytearray | memoryview
SIGN_EVERY = 32
"""Exchanges of a session after which the edge asks for a signature under them, which costs a round trip."""
MAX_UNSIGNED = 2 * SIGN_EVERY
"""Exchanges that a cloud may leave unsigned in a run. Where a session breaks, fewer than `SIGN_EVERY` are lost, so two
may break at the worst moment; after each, the edge asks more often (`TranscriptLog.sign_every`)."""
SIGNED_FOR_ONE = 32
"""Signed exchanges for which one more may be unsigned: a long run may break often, and 3 % of it stay unsigned."""
KEEPALIVE_SECONDS = 20.0
"""Without a sign of the other side until it is asked for one, and as long again until it counts as gone."""
LEAST_KEEPALIVE_SECONDS = 1.0
"""The shortest that an edge may choose: a worker takes pings that often."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side of a session accepts and when it changes keys. Sizes are in bytes, times in seconds.

    Attributes:
        max_message_bytes: the largest body of one message.
        max_header_bytes: the largest message header (fixed fields, shapes, names).
        max_rank: the largest number of dimensions of a tensor.
        chunk_bytes: plaintext bytes of one body chunk. Both sides must use the same value.
        rekey_bytes: a sender changes its key before a message once it has sealed this much under the key.
        rekey_seconds: a sender changes its key before a message once the key is this old.
        rekey_frames: a sender changes its key before a message once it has sealed this many records under the key.
        renew_seconds: an edge renews the session's keys before a message once this much time has passed since the last
            renewal.
        renew_bytes: the same once this much was sealed and opened.
        least_renew_seconds: a cloud refuses an offer of a renewal that comes both within so many seconds and within
            `least_renew_bytes` of the last one.
        least_renew_bytes: the bytes, sealed and opened, of `least_renew_seconds`.
    """

    max_message_bytes: int = 256 * MIB
    max_header_bytes: int = 64 * KIB
    max_rank: int = 4
    chunk_bytes: int = MIB
    rekey_bytes: int = GIB
    rekey_seconds: float = 3600.0
    rekey_frames: int = 1 << 20
    renew_seconds: float = 120.0
    renew_bytes: int = GIB
    least_renew_seconds: float = 10.0
    least_renew_bytes: int = 64 * MIB

    @property
    def max_key_bytes(self) -> int:
        """A key's lifetime: a receiver takes no more under one than a sender changes it at, and a largest message."""
        return self.rekey_bytes + self.max_message_bytes + self.max_header_bytes

    @property
    def max_key_records(self) -> int:
        """The same in records: chunks and header of a largest message, and the change of keys itself."""
        return self.rekey_frames + -(-self.max_message_bytes // self.chunk_bytes) + 2


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class TransferTimeout:
    """How long the other side may take to send a message, or to take one.

    A message of n bytes may take `stall_seconds` + n / `least_rate` seconds, and never more than `message_seconds`. The
    rule holds at every frame, for the bytes so far: a frame gains the time that its bytes may take, and no more.

    Attributes:
        stall_seconds: seconds beside those that the bytes take at the least rate.
        least_rate: bytes per second.
        message_seconds: the most seconds that any message may take.
    """

    stall_seconds: float = 120.0
    least_rate: int = 16 * KIB
    message_seconds: float = 3600.0


MAX_NAME = 128
"""Most characters of a name."""


@dataclass(frozen=True, slots=True)
class Size:
    """A field's number, the bytes of its text, or the entries of its list are between these, both included."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Text:
    """A field's text is of this pattern, which `needed` tells people, and of `MAX_NAME` characters at most."""

    pattern: re.Pattern[str]
    needed: str
