"""A server without Ray in a process of its own, in which a weakness can be planted.

    python -m isthmus.experiments.rigs.abuse.bare_server '{"model": "…", "parts": "…", "home": "…"}'

It prints its port. Each line of its standard input names a weakness, which it has from then on, and is answered by an
empty line; it ends when its standard input does. The planted weaknesses are the control of the measurement: ceilings
that such a server keeps would say nothing about another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final, Literal

import grpc

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.control.worker_setup import EdgesFile, make_parts, served_by
from isthmus.cloud.gateway.server import GatewayServer
from isthmus.cloud.home.identity import IdentityFiles
from isthmus.common.errors import IsthmusError

Weakness = Literal["none", "memory", "processor", "descriptors"]
HASH_ROUNDS = 200_000

_kept: list[object] = []


def _keep_frame(frame: bytes) -> None:
    _kept.append(bytes(frame))


def _hash_frame(frame: bytes) -> None:
    hashlib.pbkdf2_hmac("sha256", frame[:64], b"salt", HASH_ROUNDS)


def _open_file(frame: bytes) -> None:
    _kept.append(os.open(os.devnull, os.O_RDONLY))


PLANTED: Final[dict[Weakness, Callable[[bytes], None]]] = {
    "memory": _keep_frame,
    "processor": _hash_frame,
    "descriptors": _open_file,
}
"""What is done with the first frame of each stream, before anybody has said who they are."""


class WeakServer(GatewayServer):
    """A server that does for every stranger what none should, once a weakness is planted in it."""

    weakness: Weakness = "none"

    async def _session(self, frames: AsyncIterator[bytes], context: Any) -> None:
        if self.weakness == "none":
            await super()._session(frames, context)
            return
        async for frame in frames:
            PLANTED[self.weakness](frame)
            break
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the session's rules were broken")


class BareServer:
    """The process; a context manager.

    Args:
        model: Folder of a checkpoint.
        parts: Folder for the edge's parts, made where they are not there yet.
        home: Folder with the worker's key, its certificate and `authorized_edges`.
        log: File for the server's output.
        options: Further fields of `WorkerSpec`.

    Attributes:
        address: Where it listens, host:port, on the loopback.
        port: The port of it.
        pid: Its process.
    """

    def __init__(self, model: Path, parts: Path, home: Path, log: Path, **options: Any) -> None:
        task = {"model": str(model), "parts": str(parts), "home": str(home), "options": options}
        self.address, self.port = "", 0
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "isthmus.experiments.rigs.abuse.bare_server", json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def plant(self, weakness: Weakness) -> None:
        """Give it a weakness, instead of the one before."""
        if self._process.stdin is not None:
            self._process.stdin.write(f"{weakness}\n".encode())
            self._process.stdin.flush()
        self._line()

    def _line(self) -> bytes:
        line = b"" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            self.__exit__()
            raise IsthmusError(f"the server has ended; its output is in {self._log}")
        return line

    def __enter__(self) -> BareServer:
        line = self._line()
        self.port = int(line)
        self.address = f"127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


async def _serve(task: dict[str, Any]) -> None:
    folder, home = Path(task["model"]), Path(task["home"])
    checkpoint = Checkpoint(folder, "model")
    plan = SplitPlan.parse("2:2", checkpoint.config.num_hidden_layers)
    make_parts(checkpoint, plan, Path(task["parts"]))
    options = {
        "checkpoint": str(folder),
        "model": "model",
        "plan": str(plan),
        "dtype": "fp32",
        "parts": task["parts"],
        "home": str(home),
        "listen": "127.0.0.1:0",
        "stash_bytes": 1 << 26,
        "max_tokens": 4096,
        "threads": 1,
        "log_file": "",
        **task["options"],
    }
    spec = WorkerSpec(**options)
    server = WeakServer(served_by(spec), IdentityFiles(home), EdgesFile(home), spec.threads)
    port = await server.start(spec.listen, None)
    print(port, flush=True)
    while weakness := (await asyncio.to_thread(sys.stdin.readline)).strip():
        server.weakness = weakness
        print(flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
