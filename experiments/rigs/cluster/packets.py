"""All that crosses the switch between machines, in a file."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from isthmus.experiments.rigs.cluster.net_machines import Machines

_ALL_PROTOCOLS, _PACKET = 3, 1 << 17
_SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS = 33, 263, 6  # socket(7), packet(7)
WAITING_BYTES = 1 << 26
"""Of packets that the kernel keeps for each port until they are read: a second of a fast machine's traffic."""
LOOK_SECONDS = 0.2


class Packets:
    """All that crosses the switch inside the context, in a file. A context manager.

    Args:
        machines: those on the switch; each has been added.
        path: the file, new.
        waiting_bytes: of packets that the kernel keeps for each port until they are read; further ones are dropped.

    Attributes:
        path: the file.
        count: packets so far; one between two machines counts at the port of each.
        dropped: packets that crossed and are not in the file; known once `end` was called.
    """

    def __init__(self, machines: Machines, path: Path, waiting_bytes: int = WAITING_BYTES) -> None:
        self._machines, self.path, self._waiting = machines, path, waiting_bytes
        self.count = self.dropped = 0
        self.lock = threading.Lock()  # of the file: who holds it keeps packets waiting
        self._end = threading.Event()
        self._reading: list[Future[int]] = []

    def __enter__(self) -> Packets:
        self._file = self.path.open("wb")
        self._pool = ThreadPoolExecutor(len(self._machines.all))
        for machine in self._machines.all.values():
            with self._machines.on_the_switch():
                wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
            wire.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, self._waiting)
            wire.bind((machine.port, 0))
            wire.settimeout(LOOK_SECONDS)
            self._reading.append(self._pool.submit(self._read, wire))
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Write down what has crossed until now, and no more. Raises OSError where the file could not be written."""
        self._end.set()
        self._pool.shutdown()
        self._file.close()
        while self._reading:
            self.dropped += self._reading.pop().result()

    def parts(self) -> Iterator[bytes]:
        """The packets."""
        with self.path.open("rb") as file:
            while head := file.read(4):
                yield file.read(struct.unpack("!I", head)[0])

    def _read(self, wire: socket.socket) -> int:
        """Write down a port's packets until the end; returns how many the kernel has dropped."""
        with wire:
            while not self._end.is_set():
                self._write(_next(wire))
            wire.setblocking(False)
            while packet := _next(wire):  # those that wait
                self._write(packet)
            _, dropped = struct.unpack("II", wire.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
            return int(dropped)

    def _write(self, packet: bytes) -> None:
        if packet:
            with self.lock:
                self._file.write(struct.pack("!I", len(packet)) + packet)
                self.count += 1


def _next(wire: socket.socket) -> bytes:
    """The next packet; b"" where none came for a while, or the machine's end of the link is down."""
    try:
        return wire.recv(_PACKET)
    except OSError:
        return b""
