"""A server without Ray in a process of its own, in which a weakness can be planted.

It says its port first. Each question names a weakness, which it has from then on. The planted weaknesses are the
control of the measurement: ceilings that such a server keeps would say nothing about another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final, Literal, Self

import grpc

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.control.worker_setup import EdgesFile, make_parts, served_by
from isthmus.cloud.gateway.server import GatewayServer
from isthmus.cloud.home.identity import IdentityFiles
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve

Weakness = Literal["none", "memory", "processor", "descriptors"]
HASH_ROUNDS = 200_000

_kept: list[object] = []


PLANTED: Final[dict[Weakness, Callable[[bytes], object]]] = {
    "memory": lambda frame: _kept.append(bytes(frame)),
    "processor": lambda frame: hashlib.pbkdf2_hmac("sha256", frame[:64], b"salt", HASH_ROUNDS),
    "descriptors": lambda frame: _kept.append(os.open(os.devnull, os.O_RDONLY)),
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


class BareServer(TaskProcess):
    """The process; a context manager.

    Args:
        parts: Folder for the edge's parts, made where they are not there yet.
        home: Folder with the worker's key, its certificate and `authorized_edges`.
    """

    def __init__(self, model: Path, parts: Path, home: Path, log: Path) -> None:
        task = {"model": str(model), "parts": str(parts), "home": str(home)}
        super().__init__("the bare server", "isthmus.experiments.rigs.abuse.bare_server", task, log=log)
        self.address, self.port = "", 0

    def plant(self, weakness: Weakness) -> None:
        """Give it a weakness, instead of the one before."""
        self.ask(weakness)

    def __enter__(self) -> Self:
        self.port = self.answer()
        self.address = f"127.0.0.1:{self.port}"
        return self


async def _serve(parent: Parent) -> None:
    task = parent.task
    folder, home = Path(task["model"]), Path(task["home"])
    checkpoint = Checkpoint(folder, "model")
    plan = SplitPlan.parse("2:2", checkpoint.config.num_hidden_layers)
    make_parts(checkpoint, plan, Path(task["parts"]))
    spec = WorkerSpec(
        checkpoint=str(folder),
        model="model",
        plan=str(plan),
        dtype="fp32",
        parts=task["parts"],
        home=str(home),
        listen="127.0.0.1:0",
        stash_bytes=1 << 26,
        max_tokens=4096,
        threads=1,
        log_file="",
    )
    server = WeakServer(served_by(spec), IdentityFiles(home), EdgesFile(home), spec.threads)
    parent.say(await server.start(spec.listen, None))
    while True:
        server.weakness = await asyncio.to_thread(parent.question)
        parent.say()


if __name__ == "__main__":
    serve(lambda parent: asyncio.run(_serve(parent)))
