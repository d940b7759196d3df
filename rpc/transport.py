"""The bytes' way to the cloud: one small interface for gRPC, for a transport in memory, and for faulty ones in tests.

A stream carries whole frames, in order, both ways. Anything that goes wrong with it is a `ConnectionLostError`, and
whoever has the stream opens another. How long a wait may take, the caller decides, who cancels it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from isthmus.common.errors import ConfigError, ConnectionLostError, KeyFileError
from isthmus.protocol.limits import MIB
from isthmus.protocol.service import CLIENT_CODING, METHOD, stream_options

WINDOW_BYTES = MIB
"""What the cloud may send before it is asked for. One frame is asked for at a time, so that HTTP/2's flow control holds
back a cloud that sends more."""
_WRITTEN_AFTER_END = "Internal error from Core"  # how grpc.aio reports a stream that has ended before a write
FIRST_PAUSE, PAUSE_FACTOR = 0.1, 1.7


def pauses(most: float, jitter: random.Random | None = None) -> Iterator[float]:
    """How long to wait before the next attempt to connect: seconds that grow from `FIRST_PAUSE` to `most`, without end.

    With `jitter` each is shortened by up to half, so that clients which lost one worker do not come back together.
    """
    pause = FIRST_PAUSE
    while True:
        yield pause if jitter is None else pause * jitter.uniform(0.5, 1.0)
        pause = min(pause * PAUSE_FACTOR, most)


class Stream(Protocol):
    """One bidirectional stream of frames."""

    async def send(self, frame: bytes) -> None:
        """Send one frame, and wait until the network takes it; the stream ends where that wait is cancelled.

        Of a broken stream it may raise ConnectionLostError; `receive` does, after what arrived before the break.
        """

    async def receive(self) -> bytes:
        """Wait for the next frame; a wait that is cancelled may be repeated.

        Raises ConnectionLostError on a stream that is broken or at its end.
        """

    async def finish(self) -> None:
        """End this side, and wait for the other side to end too."""

    async def close(self) -> None:
        """Close the stream; harmless when it is closed already."""


class Transport(Protocol):
    """Opens streams."""

    async def open(self) -> Stream:
        """Open a new stream. Raises ConnectionLostError where that is not possible at present."""

    async def close(self) -> None:
        """Release what the transport holds."""


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS around the sealed session: an outer layer, nothing is authorised by it.

    Args:
        ca: certificates to trust (PEM), or None for the system's.
        cert: the edge's own certificate chain (PEM), where the cloud asks for one.
        key: its private key (PEM).
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises KeyFileError for one that cannot be read, ConfigError for half a pair."""
        if (self.cert is None) != (self.key is None):
            raise ConfigError("--tls-cert and --tls-key belong together: give both or neither")
        return grpc.ssl_channel_credentials(*(_read(path) for path in (self.ca, self.key, self.cert)))


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"the TLS file {path} cannot be read ({error.strerror}): check the path") from None


class GrpcTransport:
    """A gRPC channel to one worker.

    Args:
        target: `host:port`.
        tls: the outer TLS layer, or None for none (the session is sealed in either case).
        connect_timeout: seconds to wait for the cloud's first sign when a stream is opened.
    """

    def __init__(self, target: str, tls: Tls | None = None, connect_timeout: float = 5.0) -> None:
        self._target = target
        self._credentials = None if tls is None else tls.credentials()
        self._connect_timeout = connect_timeout
        self._channel: grpc.aio.Channel | None = None

    async def open(self) -> Stream:
        """Open a new stream and wait until the cloud has taken it."""
        if self._channel is None:
            options = [
                *stream_options(WINDOW_BYTES),
                ("grpc.enable_retries", 0),  # a retry is a new session with a new key
                ("grpc.use_local_subchannel_pool", 1),  # transports share no connection and no fault
            ]
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self._target, options)
            else:
                self._channel = grpc.aio.secure_channel(self._target, self._credentials, options)
        call: Any = self._channel.stream_stream(METHOD, **CLIENT_CODING)()
        try:
            async with asyncio.timeout(self._connect_timeout):
                await call.initial_metadata()  # the cloud sends it at once; it is there as well when the call failed
            if not call.done() or await call.code() != grpc.StatusCode.UNAVAILABLE:
                return _GrpcStream(call)
        except TimeoutError:
            pass
        except BaseException:
            call.cancel()
            raise
        call.cancel()
        await self.close()  # a fresh channel starts without gRPC's own growing pauses
        raise ConnectionLostError(f"no answer from {self._target}")

    async def close(self) -> None:
        """Close the channel."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()


class _GrpcStream:
    """Frames over one bidirectional gRPC call.

    The next frame is always asked for already. So what the cloud has sent before the end is there when sending fails,
    after which gRPC gives out nothing more.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._next = asyncio.ensure_future(self._read())

    async def send(self, frame: bytes) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # `receive` reports it
            await self._call.write(frame)

    async def receive(self) -> bytes:
        frame = await asyncio.shield(self._next)
        if isinstance(frame, ConnectionLostError):
            raise frame
        self._next = asyncio.ensure_future(self._read())
        return frame

    async def finish(self) -> None:
        with contextlib.suppress(grpc.RpcError, grpc.aio.InternalError, asyncio.InvalidStateError):  # it is broken
            await self._call.done_writing()
        with contextlib.suppress(ConnectionLostError):
            while True:
                await self.receive()

    async def close(self) -> None:
        self._call.cancel()

    async def _read(self) -> bytes | ConnectionLostError:
        try:
            frame = await self._call.read()
        except grpc.aio.AioRpcError as error:
            if error.details() == _WRITTEN_AFTER_END:
                return ConnectionLostError("the cloud closed the stream")
            return ConnectionLostError(f"{error.code().name.lower()}: {error.details() or type(error).__name__}")
        except asyncio.CancelledError:
            return ConnectionLostError("the stream is closed")
        return ConnectionLostError("the cloud closed the stream") if frame is grpc.aio.EOF else bytes(frame)
