"""What an owner with a token of a daemon can do to it, and what another owner has of it meanwhile.

deep_json          bodies of 8 MiB of empty lists, or of lists inside each other, from eight clients
many_streams       ninety streams of answers of 4,096 tokens, each begun anew when it ends
unfinished_bodies  six hundred bodies that are begun and never ended, each begun anew when the daemon gives it up
huge_settings      jobs, each with one setting beyond all bounds

Beside each eighth client, another one has no token. Run as a program, this is a daemon that does not count a body's
values before it parses them: the control of the measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final
from unittest import mock

from isthmus.common.errors import IsthmusError
from isthmus.daemon.home import Home
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import give_token
from isthmus.daemon.web import json_object
from isthmus.experiments.daemon.local_daemon import LocalDaemon
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.rigs.abuse.gauge import Gauge, Taken
from isthmus.experiments.rigs.abuse.honest import CALM_SECONDS, Calls

MODULE: Final = "isthmus.experiments.rigs.abuse.daemon_attacks"
COMPLETIONS, JOBS, FILES = "/v1/completions", "/isthmus/v1/jobs", "/v1/files"
BODY = 8 << 20
"""Bytes of the largest body that a daemon takes by default."""
BEGUN = 64 << 10
"""Bytes that come of an unfinished one."""
HONEST_TOKENS, LONGEST = 4, 4096
"""Of the other owner's answers, and of those of the ninety streams."""
CLIENT_SECONDS = 120.0
PROBE_SECONDS = 0.1
"""Between two questions for the daemon's health."""
HUGE: Final[dict[str, object]] = {
    **dict.fromkeys(("threads", "rank", "batch", "accumulate"), 100_000),
    **dict.fromkeys(("max_length", "virtual_tokens", "taps", "steps", "epochs", "save_every"), 1 << 40),
    **dict.fromkeys(("alpha", "learning_rate", "weight_decay"), 1e300),
}
"""Settings of a job, each of which is refused as it is here."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A daemon, and the token of an owner who asks it."""

    host: str
    port: int
    token: str
    model: str

    def head(self, path: str, length: int, kind: str = "application/json") -> bytes:
        """The head of a POST, on a connection for it alone. Without a token, it has none."""
        lines = [f"POST {path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Connection: close"]
        lines += [f"Authorization: Bearer {self.token}"] * bool(self.token)
        return "\r\n".join([*lines, f"Content-Type: {kind}", f"Content-Length: {length}", "", ""]).encode()

    def post(self, path: str, values: Any) -> bytes:
        """A POST of JSON."""
        body = values if isinstance(values, bytes) else json.dumps(values).encode()
        return self.head(path, len(body)) + body

    def answer(self, tokens: int, *, stream: bool = False) -> bytes:
        """A POST that asks for an answer."""
        asked = {"model": self.model, "prompt": "Once upon", "max_tokens": tokens, "temperature": 0, "stream": stream}
        return self.post(COMPLETIONS, asked)

    def ask(self, request: bytes) -> Any:
        """What a request is answered. Raises IsthmusError where it is refused."""
        try:
            with socket.create_connection((self.host, self.port), CLIENT_SECONDS) as connection:
                connection.sendall(request)
                with contextlib.closing(http.client.HTTPResponse(connection)) as response:
                    response.begin()
                    answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise IsthmusError(f"the daemon does not answer an owner who behaves: {error}") from error
        if response.status != 200:
            raise IsthmusError(f"the daemon answers {response.status} to an owner who behaves: {answer[:200]!r}")
        return json.loads(answer)

    def ask_answer(self) -> None:
        """Ask for a short answer."""
        self.ask(self.answer(HONEST_TOKENS))

    def ask_health(self) -> None:
        """Ask how the daemon is."""
        self.ask(f"GET /healthz HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n\r\n".encode())


def deep_json(asked: Asked) -> Sequence[bytes]:
    """See the module."""
    kinds = (b'{"messages":[' + b"[]," * (BODY // 3 - 8) + b"[]]}", b'{"messages":' + b"[" * (BODY - 64))
    return [asked.post("/v1/chat/completions", kinds[number % 2]) for number in range(8)]


def many_streams(asked: Asked) -> Sequence[bytes]:
    """See the module."""
    return [asked.answer(LONGEST, stream=True)] * 90


def unfinished_bodies(asked: Asked) -> Sequence[bytes]:
    """See the module."""
    return [asked.head(COMPLETIONS, BODY) + b" " * BEGUN] * 600


def huge_settings(asked: Asked) -> Sequence[bytes]:
    """See the module."""
    part = b"--x\r\nContent-Disposition: form-data; name=%b\r\n\r\n%b\r\n"
    example = b'{"prompt": "a", "completion": "b"}\n'
    form = part % (b"purpose", b"fine-tune") + part % (b"file; filename=data.jsonl", example) + b"--x--\r\n"
    data = asked.ask(asked.head(FILES, len(form), "multipart/form-data; boundary=x") + form)["id"]
    job = {"kind": "train", "model": asked.model}
    return [asked.post(JOBS, {**job, "spec": {"data": data, "steps": 1, name: most}}) for name, most in HUGE.items()]


DAEMON_ATTACKS: Final[dict[str, tuple[Callable[[Asked], Sequence[bytes]], tuple[int, ...]]]] = {
    "deep_json": (deep_json, (400,)),
    "many_streams": (many_streams, (200, 429)),
    "unfinished_bodies": (unfinished_bodies, (408, 503)),
    "huge_settings": (huge_settings, (400,)),
}
"""What the clients of each attack send, each its own again and again, and the statuses that they may get."""


def attack_daemon(name: str, asked: Asked, seconds: float) -> int:
    """Make an attack of `DAEMON_ATTACKS`; returns how many requests were sent.

    Raises IsthmusError where the daemon has answered one as it must not.
    """
    requests, statuses = DAEMON_ATTACKS[name]
    sent, wrong = 0, list[int]()

    async def client(request: bytes, allowed: tuple[int, ...], limit: asyncio.Timeout) -> None:
        nonlocal sent
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(asked.host, asked.port)
                with contextlib.ExitStack() as ending:
                    ending.callback(writer.transport.abort)  # what is not sent yet is dropped
                    writer.write(request)
                    sent += 1
                    head = (await reader.readline()).split()
                    if head and int(head[1]) not in allowed:
                        wrong.append(int(head[1]))
                        if not limit.expired():
                            limit.reschedule(0.0)  # the attack ends
                    while await reader.read(1 << 16):
                        pass
            await asyncio.sleep(0.01)

    async def make() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds) as limit, asyncio.TaskGroup() as group:
                for number, request in enumerate(made):
                    group.create_task(client(request, statuses, limit))
                    if number % 8 == 0:
                        group.create_task(client(request.replace(token, b"", 1), (401,), limit))

    made, token = requests(asked), f"Authorization: Bearer {asked.token}\r\n".encode()
    asyncio.run(make())
    if wrong:
        raise IsthmusError(f"the daemon answers a request of the attack {name!r} with {wrong[0]}")
    return sent


def attacked(
    name: str, attacker: TaskProcess, daemon: LocalDaemon, seconds: float
) -> tuple[Taken, int, dict[str, float]]:
    """Have an attack made on a daemon by an owner, while another one asks for answers, and how the daemon is.

    Returns what the daemon took, how many requests the attack was made of, and how many times as long as just before
    the longest of each kind of the other owner's requests took.
    """
    owner = Asked(*daemon.address, daemon.token, daemon.model)
    with contextlib.closing(Database(Home(daemon.home).database)) as database:
        mallory = replace(owner, token=give_token(database, "mallory"))
    with Calls(owner.ask_answer) as answers, Calls(owner.ask_health, PROBE_SECONDS) as health:
        answers.latency_s(time.monotonic())  # the first ones warm both sides up
        kinds = {"answers": answers, "health": health}
        begun = time.monotonic()
        time.sleep(CALM_SECONDS)
        calm = {kind: calls.longest_s(begun, time.monotonic()) for kind, calls in kinds.items()}
        begun = time.monotonic()
        with Gauge(daemon.pid) as gauge:
            sent = attacker.ask([name, seconds, asdict(mallory)])
        over = time.monotonic()
        slower = {kind: calls.longest_s(begun, over) / calm[kind] for kind, calls in kinds.items()}
    return gauge.taken, sent, slower


class WeakDaemon(LocalDaemon):
    """A daemon that does not count the values of JSON before it parses them."""

    @property
    def command(self) -> list[str]:
        """That of a daemon, by way of this module."""
        return [sys.executable, "-m", MODULE, *self._arguments]


if __name__ == "__main__":
    with mock.patch.object(json_object, "check_json"):
        runpy.run_module("isthmus.cli.main", run_name="__main__")
