"""A cloud in a thread of this process, without Ray, whose executor may be another one than the honest one."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Self

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.control.worker_setup import EdgesFile, served_by
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.gateway.server import GatewayServer
from isthmus.cloud.home.identity import IdentityFiles
from isthmus.cloud.session.served_model import Served
from isthmus.protocol.enrolment import ConnectionString, add_line
from isthmus.protocol.secure.keys import Fingerprint, generate_edge, generate_root, issue_worker

TENANTS = ("alice", "bob", "carol", "dave")
STASH_BYTES = 1 << 28
GRACE_SECONDS = 10.0


class Keys:
    """A cloud's keys and those of its tenants, made for the occasion.

    Attributes:
        home: The cloud's folder.
        pin: Fingerprint of its root key.
        edges: The tenants' private keys.
    """

    def __init__(self, folder: Path) -> None:
        self.home = folder / "cloud"
        self.home.mkdir(parents=True, mode=0o700)
        self.pin: Fingerprint = generate_root(self.home)
        issue_worker(self.home, 1)
        self.edges = [folder / name for name in TENANTS]
        for name, path in zip(TENANTS, self.edges, strict=True):
            add_line(self.home / "authorized_edges", generate_edge(path, name), name, None)


def served(checkpoint: Checkpoint, plan: str, keys: Keys, *, quantize: str, threads: int) -> Served:
    """What an honest worker serves."""
    spec = WorkerSpec(
        checkpoint=str(checkpoint.folder),
        model="model",
        plan=plan,
        dtype="fp32",
        parts=str(keys.home / "parts"),
        home=str(keys.home),
        listen="",
        stash_bytes=STASH_BYTES,
        max_tokens=4096,
        threads=threads,
        log_file="",
        quantize=quantize,
    )
    return served_by(spec)


class ThreadCloud:
    """A worker's server on an event loop of its own thread. A context manager.

    Args:
        served: The model.
        keys: Whose.
        executor: What computes; the model's own by default.
        batching: Whether calls of several tenants share passes.
        threads: torch threads.
    """

    def __init__(
        self, served: Served, keys: Keys, executor: Executor | None = None, *, batching: bool = True, threads: int = 1
    ) -> None:
        model = served if executor is None else dataclasses.replace(served, executor=executor)
        bounds = Bounds(engine=EngineOptions(batching=batching))
        identity, edges = IdentityFiles(keys.home), EdgesFile(keys.home)
        self._server = GatewayServer(model, identity, edges, threads, bounds=bounds)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cloud", daemon=True)
        self._pin = keys.pin
        self.address = ""

    def __enter__(self) -> Self:
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(self._server.start("127.0.0.1:0", None), self._loop)
        self.address = str(ConnectionString("127.0.0.1", started.result(), self._pin, False))
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.drain(GRACE_SECONDS), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(GRACE_SECONDS)
        self._loop.close()

    @property
    def shared_calls(self) -> float:
        """Calls in a pass, on average."""
        return float(self._server.status()["calls_per_pass"])
