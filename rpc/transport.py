"""The bytes' way to the cloud: one small interface for gRPC, for a transport in memory, and for faulty ones in tests.

A stream carries whole frames, in order, both ways. Anything that goes wrong with it is a `ConnectionLostError`, and
whoever has the stream opens another. How long a wait may take, the caller decides, who cancels it.

Streams are asynchronous, and the edge is not: `run` has a coroutine run on the process's event loop, on one thread
that drives all streams.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import random
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from isthmus.common.errors import ConfigError, ConnectionLostError, KeyFileError, LocalProtocolError
from isthmus.protocol.limits import KEEPALIVE_SECONDS, MIB
from isthmus.protocol.service import CLIENT_CODING, METHOD, stream_options

T = TypeVar("T")

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
        keepalive: seconds without a sign of the cloud until it is asked for one; it counts as gone after as long again.
    """

    def __init__(
        self,
        target: str,
        tls: Tls | None = None,
        connect_timeout: float = 5.0,
        keepalive: float = KEEPALIVE_SECONDS,
    ) -> None:
        self._target, self._keepalive = target, keepalive
        self._credentials = None if tls is None else tls.credentials()
        self._connect_timeout = connect_timeout
        self._channel: grpc.aio.Channel | None = None

    async def open(self) -> Stream:
        """Open a new stream and wait until the cloud has taken it."""
        if self._channel is None:
            options = [
                *stream_options(WINDOW_BYTES, self._keepalive),
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


# The event loop -------------------------------------------------------------------------------------------------------

# Called again and again while a wait lasts; what it raises ends the wait.
Check = Callable[[], None]

CHECK_SECONDS = 0.25
"""Between two looks at whether a wait is still wanted."""
EXIT_SECONDS = 2.0
"""That the process waits, when it ends, for what still runs on the loop."""


class EventLoop:
    """An event loop on a thread of its own, until the process ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="isthmus-rpc", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def run(self, work: Coroutine[Any, Any, T], check: Check = lambda: None) -> T:
        """Have a coroutine run on the loop, and wait for what it returns or raises.

        Whatever ends the wait before, Ctrl-C or what `check` raises, cancels the coroutine.

        Raises:
            LocalProtocolError: this process is a fork of the one that has the loop.
        """
        if os.getpid() != self._process or threading.current_thread() is self._thread:
            work.close()
            raise LocalProtocolError(
                "a connection to a cloud cannot be used in a forked process, nor in a callback of its own: start "
                "processes by `spawn`, and connect there"
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while True:
                check()
                try:
                    return future.result(CHECK_SECONDS)
                except TimeoutError:
                    if future.done():  # it is the coroutine's own, or it was done just now
                        return future.result()
        except BaseException:
            future.cancel()  # harmless where it is done
            raise

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._stop_wait())

    async def _stop_wait(self) -> None:
        await self._stop.wait()

    def _end(self) -> None:
        if os.getpid() == self._process:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(EXIT_SECONDS)


_lock = threading.Lock()
_loop: EventLoop | None = None


def run(work: Coroutine[Any, Any, T], check: Check = lambda: None) -> T:
    """Have a coroutine run on the process's event loop; see `EventLoop.run`."""
    return (_loop or _start()).run(work, check)


def _start() -> EventLoop:
    global _loop  # noqa: PLW0603  # one for the process: gRPC wakes every loop there is for each event of any
    with _lock:
        _loop = _loop or EventLoop()
        return _loop
