"""HTTP/2 (RFC 9113) written by hand, frame by frame, as no client library sends what breaks the rules."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Final

CONNECT_SECONDS = 5.0
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9  # RFC 9113, section 6
ACK, END_HEADERS = 1, 4  # flags
INITIAL_WINDOW = 4  # the number of a setting
WINDOW_BYTES = 65_535  # what the windows begin with
FRAME_BYTES = 16384
"""Of one frame of HTTP/2, where the server has not allowed more."""


class Connection:
    """A connection that speaks HTTP/2 frame by frame: it acknowledges what it must, and keeps to the windows.

    Args:
        opening: what it sends first; by default the preface and empty settings, as it should.
        deaf: whether it reads nothing of what comes back.
        mute: whether it sends only what the caller sends: it acknowledges nothing.
    """

    def __init__(
        self, host: str, port: int, opening: bytes | None = None, *, deaf: bool = False, mute: bool = False
    ) -> None:
        self._socket = socket.create_connection((host, port), CONNECT_SECONDS)
        self._socket.settimeout(CONNECT_SECONDS if deaf else None)  # as the server takes nothing for ever, then
        self._next_stream = 1
        self._windows: dict[int, int] = {0: WINDOW_BYTES}  # what may be sent: of the connection, and of each stream
        self._first_window = WINDOW_BYTES
        self._changed = threading.Condition()
        self._over = False
        self._mute = mute
        self.send(PREFACE + frame(SETTINGS, 0, 0) if opening is None else opening)
        if not deaf:
            threading.Thread(target=self._read, daemon=True).start()

    def send(self, raw: bytes) -> None:
        """Send bytes. A server that has hung up is no error."""
        with contextlib.suppress(OSError):
            self._socket.sendall(raw)

    def request(self, path: str, extra: bytes = b"", flags: int = END_HEADERS) -> int:
        """Open a stream for a method; returns its number."""
        with self._changed:
            stream, self._next_stream = self._next_stream, self._next_stream + 2
            self._windows[stream] = self._first_window
        fields = {
            b":method": b"POST",
            b":scheme": b"http",
            b":path": path.encode(),
            b":authority": b"cloud",
            b"te": b"trailers",
            b"content-type": b"application/grpc",
        }
        block = b"".join(field(name, value) for name, value in fields.items()) + extra
        self.send(frame(HEADERS, flags, stream, block))
        return stream

    def data(self, stream: int, raw: bytes, patience: float = 1.0) -> int:
        """Send bytes of a stream, as far as the windows let it within `patience` seconds; returns how many."""
        sent = 0
        while sent < len(raw):
            with self._changed:
                if not self._changed.wait_for(lambda: self._over or self._room(stream) > 0, patience) or self._over:
                    break
                size = min(FRAME_BYTES, len(raw) - sent, self._room(stream))
                for each in (0, stream):
                    self._windows[each] -= size
            self.send(frame(DATA, 0, stream, raw[sent : sent + size]))
            sent += size
        return sent

    def hung_up(self, seconds: float) -> bool:
        """Whether the server hangs up within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._over, seconds)

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _room(self, stream: int) -> int:
        return min(self._windows[0], self._windows[stream])

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError), self._socket.makefile("rb") as incoming:
            while len(head := incoming.read(9)) == 9:
                size, kind, flags, stream = int.from_bytes(head[:3]), head[3], head[4], int.from_bytes(head[5:])
                self._take(kind, flags, stream, incoming.read(size))
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in (SETTINGS, PING) and not flags & ACK and not self._mute:
            self.send(frame(kind, ACK, 0, payload if kind == PING else b""))
        with self._changed:
            if kind == SETTINGS:
                for number, value in struct.iter_unpack("!HI", payload):
                    if number == INITIAL_WINDOW:
                        for each in self._windows.keys() - {0}:
                            self._windows[each] += value - self._first_window
                        self._first_window = value
            elif kind == WINDOW_UPDATE and stream in self._windows:
                self._windows[stream] += int.from_bytes(payload)
            self._changed.notify_all()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    """A header field as HPACK (RFC 7541) has it, a literal that no table remembers."""
    return b"\0" + _string(name) + _string(value)


def _string(raw: bytes) -> bytes:
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    size, rest = bytearray((127,)), len(raw) - 127
    while rest >= 128:
        size.append(rest % 128 + 128)
        rest //= 128
    return bytes(size) + bytes((rest,)) + raw
