"""The bytes' way to the cloud: one small interface for gRPC, for a transport in memory, and for faulty ones in tests.

A stream carries whole frames, in order, both ways. Anything that goes wrong with it is a `ConnectionLostError`; the
link reconnects.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc

from isthmus.common.errors import ConfigError, ConnectionLostError, KeyFileError, VersionError
from isthmus.protocol.limits import MIB
from isthmus.protocol.service import CLIENT_CODING, METHOD, SERVICE, stream_options

QUEUED_FRAMES = 16  # on each way; whoever is ahead of the other waits, so that neither fills the edge's memory
WINDOW_BYTES = MIB  # that the cloud may send before they are asked for
SEND_SECONDS = 0.5  # one wait for room among the frames that go out


class NothingYetError(ConnectionLostError):
    """The time given to one wait is over. The stream is as it was, and the wait may be repeated."""


class Stream(Protocol):
    """One bidirectional stream of frames."""

    def send(self, frame: bytes) -> None:
        """Queue one frame.

        May raise ConnectionLostError; `receive` tells at the latest, after what arrived before the break. Raises
        NothingYetError when there was no room for a while: the frame is not queued, send it again.
        """

    def receive(self, timeout: float) -> bytes:
        """Wait for the next frame.

        Raises ConnectionLostError on a broken stream, NothingYetError after `timeout`, VersionError where the cloud
        does not know the service, as one of an older release.
        """

    def finish(self, timeout: float) -> None:
        """Send what is queued, end this side, and wait up to `timeout` seconds for the other side to end too."""

    def close(self) -> None:
        """Close the stream; harmless when it is closed already."""


class Transport(Protocol):
    """Opens streams."""

    def open(self) -> Stream:
        """Open a new stream. Raises ConnectionLostError where that is not possible at present."""

    def close(self) -> None:
        """Give up what the transport holds."""


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
        connect_timeout: seconds to wait for the channel when a stream is opened.
    """

    def __init__(self, target: str, tls: Tls | None = None, connect_timeout: float = 5.0) -> None:
        self._target = target
        self._credentials = None if tls is None else tls.credentials()
        self._connect_timeout = connect_timeout
        self._channel: grpc.Channel | None = None

    def open(self) -> Stream:
        """Open a new stream and wait until the cloud has taken it."""
        if self._channel is None:
            options = [
                *stream_options(WINDOW_BYTES),
                ("grpc.enable_retries", 0),  # a retry is a new session with a new key: the link does it
                ("grpc.use_local_subchannel_pool", 1),  # links share no connection and no fault
            ]
            if self._credentials is None:
                self._channel = grpc.insecure_channel(self._target, options)
            else:
                self._channel = grpc.secure_channel(self._target, self._credentials, options)
        stream = _GrpcStream(self._channel)
        if not stream.taken(self._connect_timeout):
            stream.close()
            self.close()  # a fresh channel starts without gRPC's own growing backoff
            raise ConnectionLostError(f"no answer from {self._target}")
        return stream

    def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class _Frames:
    """A queue of at most `QUEUED_FRAMES` frames, which ends."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._end = ""

    def put(self, frame: bytes, timeout: float | None = None) -> bool:
        """Wait for room, and add a frame. Returns False, without it, after `timeout` seconds.

        A frame behind the end is dropped.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._end or len(self._frames) < QUEUED_FRAMES, timeout):
                return False
            if not self._end:
                self._frames.append(frame)
                self._changed.notify_all()
            return True

    def get(self, timeout: float | None = None) -> bytes:
        """Take the next frame. Raises ConnectionLostError at the end, NothingYetError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._end or self._frames, timeout):
                raise NothingYetError(f"no answer within {timeout:.0f} s")
            if not self._frames:
                raise ConnectionLostError(self._end)
            self._changed.notify_all()
            return self._frames.popleft()

    def end(self, reason: str, *, drop: bool = False) -> None:
        """Let nothing more in; what is queued can still be taken, unless it is dropped. The first reason stays."""
        with self._changed:
            self._end = self._end or reason
            if drop:
                self._frames.clear()
            self._changed.notify_all()


class _GrpcStream:
    """Frames over one bidirectional gRPC call.

    A reader thread makes a timeout possible, which gRPC's own iterator has none of. It asks gRPC for the next frame
    when there is room for it, so that HTTP/2's flow control holds back a cloud that sends more than is asked for.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._outgoing = _Frames()
        self._incoming = _Frames()
        self._answered = threading.Event()
        self._unknown_service = False
        self._call = channel.stream_stream(METHOD, **CLIENT_CODING)(self._requests())
        threading.Thread(target=self._read, name="strip-reader", daemon=True).start()

    def taken(self, timeout: float) -> bool:
        """Whether the cloud takes the stream (or refuses it itself, which `receive` tells) within `timeout` seconds."""
        # Not grpc.channel_ready_future: its thread trips, with a traceback, over a channel that is closed soon after.
        if not self._answered.wait(timeout):
            return False
        return bool(self._call.is_active() or self._call.code() != grpc.StatusCode.UNAVAILABLE)

    def send(self, frame: bytes) -> None:
        # A broken stream is not told of here: the cloud's last word, a Goodbye say, may still wait to be received.
        if not self._outgoing.put(frame, SEND_SECONDS):
            raise NothingYetError("the cloud takes no more frames at present")

    def receive(self, timeout: float) -> bytes:
        try:
            return self._incoming.get(timeout)
        except NothingYetError:
            raise
        except ConnectionLostError:
            if not self._unknown_service:
                raise
        raise VersionError(
            f"the other side does not know the service {SERVICE}: it runs another release of Isthmus, or is no Isthmus "
            "cloud. Use the same release on both sides."
        )

    def close(self) -> None:
        self._outgoing.end("the stream is closed", drop=True)
        self._incoming.end("the stream is closed", drop=True)
        self._call.cancel()

    def finish(self, timeout: float) -> None:
        self._outgoing.end("this side has finished")
        deadline = time.monotonic() + timeout
        try:
            while True:
                self._incoming.get(max(0.0, deadline - time.monotonic()))
        except NothingYetError:
            self._call.cancel()
        except ConnectionLostError:
            pass  # the other side has ended too

    def _requests(self) -> Iterator[bytes]:
        while True:
            try:
                frame = self._outgoing.get()
            except ConnectionLostError:
                return
            yield frame

    def _read(self) -> None:
        reason = "the cloud closed the stream"
        try:
            self._call.initial_metadata()  # the cloud sends it at once; it is there as well when the call has failed
            self._answered.set()
            for frame in self._call:
                self._incoming.put(frame)
        except grpc.RpcError as error:
            self._unknown_service = self._call.code() == grpc.StatusCode.UNIMPLEMENTED
            reason = f"{self._call.code().name.lower()}: {self._call.details() or type(error).__name__}"
        self._incoming.end(reason)
        self._outgoing.end(reason, drop=True)  # nobody takes these any more
