"""What others can make a worker hold, and for how long: every bound of its data plane, in one place.

Those with an option of `isthmus cloud serve` are the operator's to turn. docs/security.md lists what each one bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from isthmus.protocol.limits import MIB, Pace

REVIEW_SECONDS = 1.0
"""Between two looks at who is enrolled. A line counts as removed when two looks in a row agree on the file."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of one worker's data plane.

    Attributes:
        max_connections: TCP connections; a further one is closed at once. An edge has one for each of its sessions.
        max_streams: gRPC calls of all connections together, whatever they are for; a further one is refused.
        max_connection_streams: gRPC calls of one connection: a proxy may have many edges on one.
        max_half_open: calls whose peer has not been authenticated yet: handshakes, and questions about health.
        max_half_open_per_host: the same from one host, which is an IPv4 address, or the first 64 bits of an IPv6 one.
        handshake_seconds: until a peer has to be authenticated, or has to have its answer about health.
        stream_window: bytes that an edge may send on a stream before they are asked for (HTTP/2's flow control).
        pace: how slowly an edge may send a message, or take an answer.
        pings_per_minute: pings that a session is answered; one that sends more breaks the rules.
        max_session_age: seconds after which a session ends, between two calls; its edge opens another with fresh keys.
        linger_seconds: until a call that is over must be gone; then its connection is closed: its peer takes nothing.
            A session has besides what an answer may take at the least rate of `pace`, since its beginning.
    """

    max_connections: int = 1024
    max_streams: int = 4096
    max_connection_streams: int = 256
    max_half_open: int = 128
    max_half_open_per_host: int = 64
    handshake_seconds: float = 10.0
    stream_window: int = MIB
    pace: Pace = field(default_factory=Pace)
    pings_per_minute: int = 60
    max_session_age: float = 86_400.0
    linger_seconds: float = 2.0


class Allowance:
    """So many of something a minute, and as many at once (a token bucket). Pure.

    Args:
        per_minute: how many.
        now: seconds that never go back.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self._most = float(per_minute)
        self._left = self._most
        self._since = now

    def take(self, now: float) -> bool:
        """Take one; False where none is left."""
        self._left = min(self._most, self._left + (now - self._since) * self._most / 60)
        self._since = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
