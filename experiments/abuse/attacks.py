"""The attacks on a worker, one function each, and the process that runs one.

    python -m isthmus.experiments.abuse.attacks '{"attack": "garbage_streams", "connection": "isthmus://…", "key": "…",
                                                 "seconds": 5}'

It prints how many attempts were made. What the cloud does to defend itself (it ends streams, say) is no error here.
"""

from __future__ import annotations

import contextlib
import json
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
LEAST_FRAMES = 192
"""Sent by the attack with noise on a machine however slow, so that a server which keeps them is past its ceiling."""
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
            time.sleep(min(1.0, aim.seconds))
            for call in calls:
                call.cancel()
    return attempts


def garbage_streams(aim: Aim) -> int:
    """Send 1 MiB of noise as the first frame of a stream, then of another one."""
    attempts = 0
    noise = os.urandom(1 << 20)
    with aim.channel() as channel:
        stream = channel.stream_stream(METHOD, request_serializer=None, response_deserializer=None)
        for attempts in aim.rounds(LEAST_FRAMES):  # noqa: B007 - their number is the result
            with contextlib.suppress(grpc.RpcError):
                for _ in stream(iter([noise]), timeout=20):
                    pass
    return attempts


def silent_streams(aim: Aim) -> int:
    """Open streams and say nothing on them."""
    attempts = 0
    for _ in aim.rounds():
        with aim.channel() as channel:
            stream = channel.stream_stream(METHOD, request_serializer=None, response_deserializer=None)
            calls = [stream(_nothing(aim.seconds)) for _ in range(STREAMS)]
            attempts += len(calls)
            time.sleep(min(1.0, aim.seconds))
            for call in calls:
                call.cancel()
    return attempts


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
            time.sleep(min(2.0, aim.seconds))
    return attempts


def large_headers(aim: Aim) -> int:
    """Open streams with as many bytes of headers as gRPC lets a client send."""
    attempts = 0
    headers = [(f"x-{number}", "y" * 1000) for number in range(64)]
    for _ in aim.rounds():
        with aim.channel() as channel:
            stream = channel.stream_stream(METHOD, request_serializer=None, response_deserializer=None)
            calls = [stream(_nothing(aim.seconds), metadata=headers) for _ in range(STREAMS)]
            attempts += len(calls)
            time.sleep(min(1.0, aim.seconds))
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
    """An attack in a process of its own; a context manager, which ends it where it is not done.

    Args:
        attack: A name of `ATTACKS`.
        connection: The worker's connection string.
        key: As in `Aim`.
        seconds: As in `Aim`.
        log: File for the output of the process.
    """

    def __init__(self, attack: str, connection: str, key: Path, seconds: float, log: Path) -> None:
        task = {"attack": attack, "connection": connection, "key": str(key), "seconds": seconds}
        self._attack, self._log = attack, log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "isthmus.experiments.abuse.attacks", json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self._line()  # it has imported what it needs

    def begin(self) -> None:
        """Let it begin."""
        if self._process.stdin is not None:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def attempts(self) -> int:
        """Wait for its end; how many attempts it made. Raises IsthmusError where it made none."""
        made = int(self._line())
        if not made:
            raise IsthmusError(f"the attack {self._attack!r} got nowhere; its output is in {self._log}")
        return made

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> bytes:
        line = b"" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise IsthmusError(f"the attack {self._attack!r} ended with an error; its output is in {self._log}")
        return line


def _main(task: dict[str, Any]) -> None:
    yield_to_all()  # an attacker elsewhere would take none of these cores: what the server does is what counts
    aim = Aim(ConnectionString.parse(task["connection"]), Path(task["key"]), task["seconds"])
    print("ready", flush=True)
    sys.stdin.readline()
    made = 0
    with contextlib.suppress(ConnectionLostError, RefusedError):
        made = ATTACKS[task["attack"]].run(aim)
    print(made, flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
