"""A stream to a cloud for a thread that decides itself what is sent and read, and when: for attacks and for tests."""

from __future__ import annotations

import asyncio

from isthmus.common.errors import ConnectionLostError
from isthmus.rpc.transport import GrpcTransport, Tls, run

SEND_SECONDS = 0.5
"""That sending waits for room by default."""


class NothingYetError(ConnectionLostError):
    """The time given to one wait is over. The stream is as it was, and the wait may be repeated."""


class BlockingStream:
    """One stream of frames over a connection of its own. Not for two threads at once.

    Args:
        connect_timeout: seconds to wait for the cloud's first sign.

    Raises ConnectionLostError where the cloud does not take the stream.
    """

    def __init__(self, target: str, tls: Tls | None = None, connect_timeout: float = 5.0) -> None:
        self._transport = GrpcTransport(target, tls, connect_timeout)
        self._sending: asyncio.Future[None] | None = None
        self.stream = run(self._transport.open())

    def send(self, frame: bytes, seconds: float = SEND_SECONDS) -> None:
        """Send a frame. Raises NothingYetError where the cloud does not take it in time: send the same one again."""
        run(self._send(frame, seconds))

    def receive(self, seconds: float) -> bytes:
        """The next frame. Raises ConnectionLostError on a broken stream, NothingYetError after so many seconds."""
        try:
            return run(asyncio.wait_for(self.stream.receive(), seconds))
        except TimeoutError:
            raise NothingYetError(f"no answer within {seconds:.0f} s") from None

    def close(self) -> None:
        """Close the stream and its connection."""
        run(self.stream.close())
        run(self._transport.close())

    async def _send(self, frame: bytes, seconds: float) -> None:
        if self._sending is None:
            self._sending = asyncio.ensure_future(self.stream.send(frame))
        done, _ = await asyncio.wait({self._sending}, timeout=seconds)
        if not done:
            raise NothingYetError("the cloud takes no more frames at present")
        self._sending = None
