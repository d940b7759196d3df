"""A server without Ray in a process of its own, healthy or with a weakness planted in it.

    python -m isthmus.experiments.abuse.bare '{"model": "…", "parts": "…", "home": "…", "weakness": "memory"}'

It prints its port, and ends when its standard input does. The planted weaknesses are the control of the measurement:
ceilings that such a server keeps would say nothing about another one.
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

from isthmus.backbone.errors import IsthmusError
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sources import Checkpoint
from isthmus.cloud.home.identity import IdentityFiles
from isthmus.cloud.loading import EdgesFile, make_parts, served_by
from isthmus.cloud.server import StripServer
from isthmus.cloud.worker import WorkerSpec

Weakness = Literal["none", "memory", "processor", "descriptors"]
HASH_ROUNDS = 300_000

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


class WeakServer(StripServer):
    """A server that does for every stranger what none should."""

    weakness: Weakness = "memory"

    async def _session(self, frames: AsyncIterator[bytes], context: Any) -> None:
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
        weakness: What is planted in it.
        options: Further fields of `WorkerSpec`.

    Attributes:
        port: Where it listens, on the loopback.
        pid: Its process.
    """

    def __init__(
        self, model: Path, parts: Path, home: Path, log: Path, *, weakness: Weakness = "none", **options: Any
    ) -> None:
        task = {"model": str(model), "parts": str(parts), "home": str(home), "weakness": weakness, "options": options}
        self.port = 0
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "isthmus.experiments.abuse.bare", json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def __enter__(self) -> BareServer:
        line = b"" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            self.__exit__()
            raise IsthmusError(f"the server did not start; its output is in {self._log}")
        self.port = int(line)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


async def _serve(task: dict[str, Any]) -> None:
    folder, home, weakness = Path(task["model"]), Path(task["home"]), task["weakness"]
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
    kind = StripServer if weakness == "none" else WeakServer
    server = kind(served_by(spec), IdentityFiles(home), EdgesFile(home), spec.threads)
    if isinstance(server, WeakServer):
        server.weakness = weakness
    port = await server.start(spec.listen, None)
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
