"""A sealed session over one grpc.aio stream, seen from the server: messages instead of frames, metered and paced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from isthmus.cloud.telemetry.metrics import Metrics
from isthmus.common.errors import RemoteProtocolError
from isthmus.protocol.limits import TransferTimeout
from isthmus.protocol.messages import Message
from isthmus.protocol.secure.framing import seconds_left
from isthmus.protocol.session import CloudSession, Established, Oversized, Received, Refused


class StalledError(RemoteProtocolError):
    """An edge sends a message, or takes an answer, too slowly: what is held for it would be held for ever."""


class SealedStream:
    """Drives a `CloudSession`.

    Args:
        session: the protocol's state.
        frames: what arrives.
        context: the grpc.aio context to write to.
        metrics: where bytes are counted.
        timeout: how slowly the edge may send a message, or take an answer.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        session: CloudSession,
        frames: AsyncIterator[bytes],
        context: Any,
        metrics: Metrics,
        timeout: TransferTimeout,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._frames = aiter(frames)
        self._context = context
        self._metrics = metrics
        self._timeout = timeout
        self._clock = clock
        self._crypto_ns = 0
        self._delivered_by = clock()  # when the answers so far have arrived, at the timeout's least rate

    @property
    def in_transit(self) -> float:
        """Seconds that an answer may still take to arrive, at the timeout's least rate; 0 where none was sent.

        Bytes that were written may lie in the system's buffers, before a slow network.
        """
        return max(0.0, self._delivered_by - self._clock())

    async def handshake(self) -> str:
        """Run the handshake. Returns "accepted", "refused", or "abandoned" where the stream ended in the middle."""
        while True:
            frame = await self._next()
            if frame is None:
                return "abandoned"
            event = self._session.receive(frame)
            for reply in event.frames:
                await self._write(reply)
            if isinstance(event, Refused):
                return "refused"
            if isinstance(event, Established):
                return "accepted"

    async def receive(self, stop: asyncio.Event, patience: float | None = None) -> Received | Oversized | None:
        """Wait for the next whole message.

        Args:
            stop: set to receive no further message, not even one that has just arrived: the edge repeats it elsewhere.
            patience: seconds until the message has to begin; None for no limit. From its first frame on, it keeps to
                the timeout. A control frame counts as its first frame, as it comes just before a message.

        Returns:
            The message; None where the stream ended, or `stop` was set.

        Raises:
            StalledError: the edge sends nothing, or too slowly.
        """
        stopped = asyncio.ensure_future(stop.wait())
        arrival: asyncio.Future[bytes | None] | None = None
        begun, size = self._clock(), 0  # of the message; it has begun when its size is not 0
        try:
            while True:
                arrival = asyncio.ensure_future(self._next())
                left = seconds_left(self._timeout, self._clock() - begun, size) if size else patience
                done, _ = await asyncio.wait({arrival, stopped}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    raise StalledError(f"nothing came in time, {size} bytes into a message, where something was due")
                frame = arrival.result() if arrival.done() else None
                if frame is None or stop.is_set():
                    return None
                if not size:
                    begun = self._clock()
                size += len(frame)
                start = time.perf_counter_ns()
                event = self._session.receive(frame)
                self._crypto_ns += time.perf_counter_ns() - start
                if isinstance(event, Received | Oversized):
                    return event
        finally:
            stopped.cancel()
            if arrival is not None:
                arrival.cancel()  # harmless where it is done

    async def send(self, message: Message) -> None:
        """Seal and write a message frame by frame: the network carries one frame while the next one is sealed.

        Raises:
            StalledError: the edge takes it too slowly.
        """
        frames = self._session.send(message)
        begun, size = self._clock(), 0
        while True:
            start = time.perf_counter_ns()
            frame = next(frames, None)
            self._crypto_ns += time.perf_counter_ns() - start
            if frame is None:
                return
            try:
                async with asyncio.timeout(seconds_left(self._timeout, self._clock() - begun, size)):
                    await self._write(frame)
            except TimeoutError:
                raise StalledError(f"an answer was not taken in time, {size} bytes into it") from None
            size += len(frame)
            carried = seconds_left(replace(self._timeout, stall_seconds=0.0), 0.0, size)
            self._delivered_by = max(self._delivered_by, begun + carried)  # a short goodbye may follow a long answer

    def take_crypto_ns(self) -> int:
        """Nanoseconds of sealing and opening since the last call: of the last answer, and of the message since."""
        taken, self._crypto_ns = self._crypto_ns, 0
        return taken

    async def _next(self) -> bytes | None:
        frame = await anext(self._frames, None)
        if frame is not None:
            self._metrics.bytes.labels("in").inc(len(frame))
        return frame

    async def _write(self, frame: bytes) -> None:
        self._metrics.bytes.labels("out").inc(len(frame))
        await self._context.write(frame)
