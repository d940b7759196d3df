"""Bounds of connections: how many there are, and how long one may leave the daemon waiting.

Uvicorn bounds requests and not what comes before them, nor what a client does not take. Here:

- A connection has `HEAD_SECONDS` for the head of a request, from its first byte or the connection's start on, and the
  head has `h11_max_incomplete_event_size` bytes (of uvicorn's configuration; the daemon's is `HEAD_BYTES`).
- After an answer to a request whose body still comes, it has `REST_SECONDS` to end it; what comes is dropped, as many
  clients look for an answer only once they have sent all. Of a body whose length is not said, no more than `REST_BYTES`
  are read then.
- A client that takes nothing of its answer for `STALL_SECONDS` loses its connection. Until then the kernel keeps
  `SEND_BYTES` for it (twice so much by its own counting). By default that is some MiB, which no process's size shows.
- There are `MOST` connections. One more closes the one that is without a request for longest.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0
REST_SECONDS = 5.0
REST_BYTES = 4 << 20
STALL_SECONDS = 60.0
SEND_BYTES = 128 << 10
KEEP_ALIVE_SECONDS = 60
HEAD_BYTES = 64 << 10
"""Bytes of a request's head: its first line and its headers."""


class _BoundedHeads(h11.Connection):
    """A connection's parser that takes no larger head, even where one comes in a single read of the socket.

    h11 itself bounds a head that waits for its end.
    """

    def __init__(self, most: int) -> None:
        super().__init__(h11.SERVER, most)
        self._most = most

    def next_event(self) -> Any:
        """What comes next; RemoteProtocolError for a head that is too large."""
        before = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        event = super().next_event()
        if isinstance(event, h11.Request) and before - len(self.trailing_data[0]) > self._most:
            raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)
        return event


class BoundedConnection(H11Protocol):
    """A connection of uvicorn's with these bounds."""

    most = 1024
    """Connections at most; a subclass has the settings' own."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = _BoundedHeads(self.config.h11_max_incomplete_event_size or HEAD_BYTES)
        self._phase: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._dropped = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection in, and close another one where there are too many."""
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn's own annotation is narrower
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if len(self.connections) > self.most:
            resting = (
                one for one in self.connections if isinstance(one, BoundedConnection) and one.rests and one is not self
            )
            # A set has no order; the timers of what rests say when each will be closed.
            first = min(resting, key=BoundedConnection.closes_at, default=self)
            first.transport.abort()
        self._enter("head")

    def connection_lost(self, exc: Exception | None) -> None:
        """End the timers with the connection."""
        self._enter(None)
        self._set_stall(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came, and see what is to come."""
        super().data_received(data)
        self._look()
        if self._phase == "rest":
            self._dropped += len(data)
            if self._dropped > REST_BYTES and not any(name == b"content-length" for name, _ in self.headers):
                self.flow.pause_reading()

    def on_response_complete(self) -> None:
        """See what is to come."""
        super().on_response_complete()
        if self.rests and self.conn.their_state is h11.SEND_BODY:  # else it is the body of the next request
            self._enter("rest")
        elif self._phase == "rest":
            self._enter(None)
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._enter("head")  # the next request's head has begun to come already
        if self.transport.is_closing():
            self._set_stall(STALL_SECONDS)

    def pause_writing(self) -> None:
        """The client takes nothing."""
        super().pause_writing()
        self._set_stall(STALL_SECONDS)

    def resume_writing(self) -> None:
        """It does."""
        super().resume_writing()
        self._set_stall(None)

    @property
    def rests(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def closes_at(self) -> float:
        """When the connection is closed if nothing comes, in the loop's time."""
        timers = (self._timer, self.timeout_keep_alive_task)
        return min((timer.when() for timer in timers if timer is not None), default=0.0)

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._enter("head")
        elif self.rests and self.conn.their_state is h11.SEND_BODY:
            self._enter("rest")
        else:
            self._enter(None)

    def _enter(self, phase: str | None) -> None:
        """Begin a phase; its time runs from its beginning, whatever comes in it."""
        if phase == self._phase:
            return
        if self._timer is not None:
            self._timer.cancel()
        seconds = {None: None, "head": HEAD_SECONDS, "rest": REST_SECONDS}[phase]
        self._phase, self._dropped = phase, 0
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _set_stall(self, seconds: float | None) -> None:
        if self._stall is not None:
            self._stall.cancel()
        self._stall = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
