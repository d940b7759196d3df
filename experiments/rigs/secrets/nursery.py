"""A process that forks edges and workers, which are killed and started again.

Each is a process of its own, with its own connections, and begins with the same memory: of what an edge or a worker
could seal with twice, nothing differs between two of them but what it draws at random after the fork. The worker is the
server of `serve` without Ray around it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.control.worker_setup import EdgesFile, served_by
from isthmus.cloud.gateway.server import GatewayServer
from isthmus.cloud.home.identity import IdentityFiles
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.telemetry.logs import log_to
from isthmus.common.errors import IsthmusError
from isthmus.common.torch_threads import set_torch_threads
from isthmus.edge.client.link import connect
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve
from isthmus.experiments.rigs.secrets.broken_random import SOURCES
from isthmus.experiments.rigs.secrets.nonce_log import file_sink, logged

Role = Literal["edge", "worker"]
STASH_BYTES = 1 << 26
TOKENS = 4
PATIENCE = 120.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl


class Nursery(TaskProcess):
    """The process; a context manager.

    Args:
        checkpoint: Of the model that workers serve.
        plan: How it is split.
        home: The cloud's folder.
        key: The edges' key.
        address: Connection string of the workers, which are there one after the other.
        logs: Folder that each process adds a file of entries to.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: str, home: Path, key: Path, address: str, logs: Path, output: Path
    ) -> None:
        task = {
            **{"model": str(checkpoint.folder), "plan": plan, "home": str(home), "key": str(key)},
            **{"address": address, "logs": str(logs)},
        }
        module = "isthmus.experiments.rigs.secrets.nursery"
        super().__init__("the nursery", module, task, threads=1, log=output, patience=PATIENCE)

    def bear(self, role: Role, source: str = "good") -> int:
        """Start a process whose random bytes come from such a source; returns its id."""
        pid: int = self.ask({"role": role, "source": source})
        return pid

    def end(self, pid: int) -> None:
        """SIGKILL to one of them. Raises IsthmusError where it had ended by itself."""
        code = self.ask({"kill": pid})
        if code != -signal.SIGKILL:
            raise IsthmusError(f"a process of the nursery ended by itself, with exit code {code}: see its output")


def _main(parent: Parent) -> None:
    task = parent.task
    set_torch_threads(1)
    served = _served(task)
    if threading.active_count() > 1:
        raise IsthmusError("a process with several threads must not fork: none may be started before")
    lives: dict[Role, Callable[[dict[str, Any], Served], None]] = {"edge": _edge, "worker": _worker}
    for number, question in enumerate(parent.questions()):
        if "kill" in question:
            os.kill(question["kill"], signal.SIGKILL)
            parent.say(os.waitstatus_to_exitcode(os.waitpid(question["kill"], 0)[1]))
            continue
        role, source = question["role"], question["source"]
        pid = os.fork()
        if not pid:
            log = Path(task["logs"]) / f"{role}-{os.getppid()}-{number}"
            _live(partial(lives[role], task, served), log, source)
        parent.say(pid)


def _live(work: Callable[[], None], log: Path, source: str) -> NoReturn:
    """Be one of the processes, which ends with the nursery at the latest."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.close(0)
    with logged(file_sink(log)), SOURCES[source]():
        work()
    os._exit(0)


def _served(task: dict[str, Any]) -> Served:
    home = Path(task["home"])
    spec = WorkerSpec(
        checkpoint=task["model"],
        model="model",
        plan=task["plan"],
        dtype="fp32",
        parts=str(home.parent / "parts"),
        home=str(home),
        listen="",
        stash_bytes=STASH_BYTES,
        max_tokens=1 << 10,
        threads=1,
        log_file="",
    )
    return served_by(spec)


def _worker(task: dict[str, Any], served: Served) -> None:
    home, listen = Path(task["home"]), task["address"].removeprefix("isthmus://").partition("#")[0]

    log_to(None)

    async def run() -> None:
        bounds = Bounds(engine=EngineOptions(batching=False))  # nothing is measured before it listens
        server = GatewayServer(served, IdentityFiles(home), EdgesFile(home), 1, bounds=bounds)
        await server.start(listen, None)
        await asyncio.Event().wait()

    asyncio.run(run())


def _edge(task: dict[str, Any], _served: Served) -> None:
    with connect(task["address"], key=task["key"], connect_timeout=PATIENCE) as link:
        hidden = torch.randn(1, TOKENS, link.info.hidden_size)
        while True:
            _, kept = link.forward_span(hidden, None, None, keep=True)
            link.backward_span(kept, hidden, hidden, None, None)


if __name__ == "__main__":
    serve(_main)
