"""The attacks on a worker, one function each, and the process that makes them.

    python -m isthmus.experiments.abuse.attacks KEY

Each line of its standard input is `ATTACK SECONDS CONNECTION_STRING`, and is answered by the number of attempts that
were made. What the cloud does to defend itself (it ends streams, say) is no error here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import grpc

from isthmus.backbone.errors import IsthmusError
from isthmus.experiments.hostile import Hostile, yield_to_all
from isthmus.protocol.enrolment import ConnectionString
from isthmus.protocol.errors import ConnectionLostError, RefusedError
from isthmus.protocol.service import METHOD

WATCH: Final = "/grpc.health.v1.Health/Watch"
CHECK: Final = "/grpc.health.v1.Health/Check"
STREAMS = 64
"""Opened at once by the attacks that hold streams."""
CONNECTIONS = 256
"""Opened at once by the attack that holds connections."""
HOLD_SECONDS = 1.0
BATCH, SEQUENCE = 2, 64
"""Of a hostile tenant's calls."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What is attacked.

    Attributes:
        where: The worker.
        key: The private key of an enrolled edge, for attacks by a tenant.
        seconds: How long the attack goes on.
    """

    where: ConnectionString
    key: Path
    seconds: float

    def rounds(self, least: int = 1) -> Iterator[int]:
        """Numbers from 1 on, until the time is over and there have been as many as that."""
        end, number = time.monotonic() + self.seconds, 0
        while number < least or time.monotonic() < end:
            number += 1
            yield number

    @contextlib.contextmanager
    def channel(self, **options: int) -> Iterator[grpc.Channel]:
        """A connection of its own to the worker."""
        own = [("grpc.use_local_subchannel_pool", 1), *((f"grpc.{name}", value) for name, value in options.items())]
        with grpc.insecure_channel(self.where.address, options=own) as channel:
            yield channel


def health_names(aim: Aim) -> int:
    """Ask the health service about compressed names of nearly 4 MB, and keep the streams open."""
    name = b"\x0a" + _varint(4_000_000) + b"x" * 4_000_000
    attempts = 0
    for _ in aim.rounds():
        with aim.channel() as channel:
            watch = channel.unary_stream(WATCH, request_serializer=None, response_deserializer=None)
            calls = [watch(name, compression=grpc.Compression.Gzip) for _ in range(16)]
            attempts += len(calls)
            time.sleep(HOLD_SECONDS)
            for call in calls:
                call.cancel()
    return attempts


def garbage_streams(aim: Aim) -> int:
    """Send 1 MiB of noise as the first frame of many streams at once."""
    noise = os.urandom(1 << 20)
    return _hold(aim, lambda stream: stream(iter([noise])), least=3)


def silent_streams(aim: Aim) -> int:
    """Open streams and say nothing on them."""
    return _hold(aim, lambda stream: stream(_nothing(aim.seconds)))


def silent_connections(aim: Aim) -> int:
    """Open connections, begin HTTP/2 on half of them, and say nothing more."""
    attempts = 0
    for _ in aim.rounds():
        with contextlib.ExitStack() as stack:
            for number in range(CONNECTIONS):
                with contextlib.suppress(OSError):
                    plain = stack.enter_context(socket.create_connection((aim.where.host, aim.where.port), 5))
                    attempts += 1
                    if number % 2:
                        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            time.sleep(HOLD_SECONDS)
    return attempts


def large_headers(aim: Aim) -> int:
    """Open streams with as many bytes of headers as gRPC lets a client send."""
    headers = [(f"x-{number}", "y" * 1000) for number in range(64)]
    return _hold(aim, lambda stream: stream(_nothing(aim.seconds), metadata=headers))


def _hold(aim: Aim, begin: Callable[[Any], grpc.Call], least: int = 1) -> int:
    """Begin `STREAMS` calls on a connection of their own, keep them for a second, and again with another connection."""
    attempts = 0
    for _ in aim.rounds(least):
        with aim.channel() as channel:
            stream = channel.stream_stream(METHOD, request_serializer=None, response_deserializer=None)
            calls = [begin(stream) for _ in range(STREAMS)]
            attempts += len(calls)
            time.sleep(HOLD_SECONDS)
            for call in calls:
                call.cancel()
    return attempts


def _as_tenant(deed: str) -> Callable[[Aim], int]:
    """What a hostile tenant of the chaos benchmark does, as an attack."""

    def attack(aim: Aim) -> int:
        getattr(Hostile(str(aim.where), aim.key, BATCH, SEQUENCE), deed)(aim.seconds)
        return 1

    attack.__doc__ = getattr(Hostile, deed).__doc__
    return attack


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack on a worker.

    Attributes:
        by: Who makes it: somebody without a key, or an enrolled tenant.
        run: Makes it, and returns the number of attempts.
    """

    by: Literal["stranger", "tenant"]
    run: Callable[[Aim], int]


ATTACKS: Final[dict[str, Attack]] = {
    "garbage_streams": Attack("stranger", garbage_streams),
    "health_names": Attack("stranger", health_names),
    "silent_streams": Attack("stranger", silent_streams),
    "silent_connections": Attack("stranger", silent_connections),
    "large_headers": Attack("stranger", large_headers),
    "garbage": Attack("tenant", _as_tenant("garbage")),
    "flood": Attack("tenant", _as_tenant("flood")),
    "held_sessions": Attack("tenant", _as_tenant("held_sessions")),
    "slow_reader": Attack("tenant", _as_tenant("slow_reader")),
    "slow_writer": Attack("tenant", _as_tenant("slow_writer")),
    "stash_evicted": Attack("tenant", _as_tenant("stash_evicted")),
}


def _nothing(seconds: float) -> Iterator[bytes]:
    """A stream of requests that has none, and does not end before the call is cancelled."""
    time.sleep(seconds)
    yield from ()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Attacker:
    """A process that makes attacks, one after the other; a context manager, which ends it.

    Args:
        key: The private key of an enrolled edge, for attacks by a tenant.
        log: File for the output of the process.
    """

    def __init__(self, key: Path, log: Path) -> None:
        self._log = log
        self._attack = "none"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "isthmus.experiments.abuse.attacks", str(key)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )

    def begin(self, attack: str, seconds: float, connection: str) -> None:
        """Let it make an attack, a name of `ATTACKS`, for so long, on the worker of a connection string."""
        self._attack = attack
        if self._process.stdin is not None:
            self._process.stdin.write(f"{attack} {seconds} {connection}\n".encode())
            self._process.stdin.flush()

    def attempts(self) -> int:
        """Wait for the attack's end; how many attempts it made. Raises IsthmusError where it made none."""
        made = int(self._line())
        if not made:
            raise IsthmusError(f"the attack {self._attack!r} got nowhere; its output is in {self._log}")
        return made

    def __enter__(self) -> Attacker:
        try:
            self._line()  # it has imported what it needs
        except IsthmusError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> bytes:
        line = b"" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise IsthmusError(f"the attack {self._attack!r} ended with an error; its output is in {self._log}")
        return line


def _main(key: Path) -> None:
    yield_to_all()  # an attacker elsewhere would take none of these cores: what the server does is what counts
    print("ready", flush=True)
    for line in sys.stdin:
        attack, seconds, connection = line.split()
        aim = Aim(ConnectionString.parse(connection), key, float(seconds))
        made = 0
        with contextlib.suppress(ConnectionLostError, RefusedError):
            made = ATTACKS[attack].run(aim)
        print(made, flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
