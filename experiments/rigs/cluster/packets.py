"""All that crosses the switch between machines, in a file."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from isthmus.experiments.rigs.cluster.net_machines import Machines

_ALL_PROTOCOLS, _RECEIVE_BYTES, _PACKET = 3, 1 << 26, 1 << 17
_SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS = 33, 263, 6  # socket(7), packet(7)


class Packets:
    """All that crosses the switch inside the context, in a file. A context manager.

    Attributes:
        path: the file.
        count: packets so far.
        dropped: those that the kernel could not hand over.
    """

    def __init__(self, machines: Machines, path: Path) -> None:
        self._machines, self.path = machines, path
        self.count = self.dropped = 0
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Packets:
        self._file = self.path.open("wb")
        for machine in self._machines.all.values():
            with self._machines.on_the_switch():
                wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
            wire.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
            wire.bind((machine.port, 0))
            wire.settimeout(0.2)
            thread = threading.Thread(target=self._read, args=(wire,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._file.close()

    def parts(self) -> Iterator[bytes]:
        """The packets."""
        with self.path.open("rb") as file:
            while head := file.read(4):
                yield file.read(struct.unpack("!I", head)[0])

    def _read(self, wire: socket.socket) -> None:
        with wire:
            while not self._end.is_set():
                try:
                    packet = wire.recv(_PACKET)
                except OSError:  # nothing came for a while, or the machine's end of the link is down
                    continue
                with self._lock:
                    self._file.write(struct.pack("!I", len(packet)) + packet)
                    self.count += 1
            _, dropped = struct.unpack("II", wire.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
            with self._lock:
                self.dropped += dropped
