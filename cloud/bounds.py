"""Limits on what others can make a worker hold, and for how long: all those of its data plane in one place.

The operator sets those that have an option of `isthmus cloud serve`. docs/security.md says what each one limits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from isthmus.protocol.limits import MIB, TransferTimeout

REVIEW_SECONDS = 1.0
"""Between two reviews of the enrolments: an editor has written its file by then.

A line counts as removed when two reviews in a row have read the same file.
"""
ROOM_SECONDS = 0.25
"""Between two looks for connections without a call that leave others no room: an edge that was shut out tries again
after about as long."""


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """How one worker takes turns. docs/scheduler.md has the formulas.

    Attributes:
        max_batch_tokens: token positions of a batch at most. With so many, what a pass takes by itself is a few percent
            of it, and a larger batch only makes others wait for its end.
        max_wait: seconds that a request is held back at most though it could begin, for batching partners or for memory
            of forward states; a session that has been silent for so long is not at work. Longer than an edge on a busy
            core computes between two calls of a step.
        interactive_lead: seconds of computing, over its weight, that a tenant may be ahead of the others' training by
            interactive requests, so that nobody gets more by calling everything interactive. A few calls' worth.
    """

    max_batch_tokens: int = 512
    max_wait: float = 2.0
    interactive_lead: float = 2.0


@dataclass(frozen=True, slots=True)
class EngineOptions(SchedulerOptions):
    """How one worker computes for several sessions.

    Attributes:
        batching: whether calls of several sessions may share a batch.
        compute_threads: batches that may run at a time, each with its even part of the torch threads, so that a pass
            does not wait at every product for a core that an edge or another pass is on.
        state_bytes: forward states that sessions at work leave before further forwards wait; None for half of what the
            span's weights take, so that many tenants take less than a second copy of the span.
        count_graphs: whether every graph's bytes are counted, and not only those that tell of the others. Counting
            takes Python's lock at each tensor that a graph keeps.
        trim_heap: whether free memory goes back to the system while batches run beside each other.
        cache_bytes: keys and values of past tokens, of all sessions that generate; None for a fifth of what the machine
            has.
        prefill_tokens: token positions of a decode call that are computed at once; the steps of others come in between.
        paused_calls: calls with sites of all sessions that may have begun and not ended. Each has a thread.
    """

    batching: bool = True
    compute_threads: int = 2
    state_bytes: int | None = None
    count_graphs: bool = False
    trim_heap: bool = True
    cache_bytes: int | None = None
    prefill_tokens: int = 512
    paused_calls: int = 16


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of one worker's data plane.

    Attributes:
        max_connections: TCP connections; a further one is closed at once. An edge has one for each of its sessions.
            Those without a call may have half of what the others leave.
        max_streams: gRPC calls of all connections together, whatever they are for; a further one is refused.
        max_connection_streams: gRPC calls of one connection: a proxy may have many edges on one.
        max_half_open: gRPC calls whose peer is not authenticated yet: handshakes and health checks.
        max_half_open_per_host: the same from one host, which is an IPv4 address, or the first 64 bits of an IPv6 one.
        handshake_seconds: within which a peer must be authenticated, or a health check be answered.
        stream_window: bytes that an edge may send ahead on a stream (HTTP/2's flow control).
        transfer: how slowly an edge may send a message, or take an answer.
        pings_per_minute: pings of a session that are answered; a session that sends more breaks the rules.
        max_session_age: seconds after which a session ends, between two calls; its edge opens another with fresh keys.
        linger_seconds: how long a gRPC call may take to end once its handler has returned; then its connection is
            closed, as its peer takes nothing. A session has in addition the time that its answers may take to arrive at
            the least rate of `transfer`.
        engine: how it computes for several sessions.
    """

    max_connections: int = 1024
    max_streams: int = 4096
    max_connection_streams: int = 256
    max_half_open: int = 128
    max_half_open_per_host: int = 64
    handshake_seconds: float = 10.0
    stream_window: int = MIB
    transfer: TransferTimeout = field(default_factory=TransferTimeout)
    pings_per_minute: int = 60
    max_session_age: float = 86_400.0
    linger_seconds: float = 2.0
    engine: EngineOptions = field(default_factory=EngineOptions)


class Allowance:
    """A token bucket: so many of something a minute, and as many at once. Pure.

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
