"""Clouds for tests.

A tiny model's span and parts, keys, and the real gRPC server on a thread of this process (no Ray).
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.control.worker_setup import edges_in, served_by
from isthmus.cloud.gateway.pipeline import NextStage
from isthmus.cloud.gateway.server import GatewayServer, ServerTls
from isthmus.cloud.home.identity import IdentityFiles
from isthmus.cloud.session.served_model import Served
from isthmus.edge.client.link import Link
from isthmus.privacy.recording.recorder import Recorder
from isthmus.protocol.enrolment import ConnectionString, Quota, add_line
from isthmus.protocol.secure.keys import Fingerprint, generate_edge, generate_root, issue_worker, load_edge, load_worker
from isthmus.rpc.transport import GrpcTransport, Tls

PLAN = "2:2"


def served(
    model: Path,
    parts: Path,
    *,
    dtype: str = "fp32",
    plan: str = PLAN,
    stash_bytes: int = 1 << 26,
    max_tokens: int = 4096,
    home: Path | None = None,
    emulator: Path | Mapping[str, Path] | None = None,
    quantize: str = "none",
    saved_span: Path | None = None,
    layers: str = "",
) -> Served:
    """Load the span of a checkpoint; the edge's parts are written to `parts` where they are not there yet.

    The tenants' adapters lie in `home`, by default beside the parts; a package needs a `home` with the signer's key.
    """
    emulators = {"package": emulator} if isinstance(emulator, Path) else emulator or {}
    spec = WorkerSpec(
        checkpoint=str(model),
        model="tiny",
        plan=plan,
        dtype=dtype,
        parts=str(parts),
        home=str(home or parts.parent / "home"),
        listen="",
        stash_bytes=stash_bytes,
        max_tokens=max_tokens,
        threads=1,
        log_file="",
        emulators=tuple((name, str(each)) for name, each in emulators.items()),
        quantize=quantize,
        saved_span="" if saved_span is None else str(saved_span),
        layers=layers,
    )
    return served_by(spec)


def with_info(cloud: Served, **changes: Any) -> Served:
    """The same span described otherwise."""
    return dataclasses.replace(cloud, info=dataclasses.replace(cloud.info, **changes))


class Home:
    """The cloud's folder and the keys of one enrolled edge; made where they are not there yet."""

    def __init__(self, folder: Path, *, days: float = 1, quota: Quota | None = None) -> None:
        self.folder = folder / "cloud"
        self.key_file = folder / "id_ed25519"
        if self.folder.exists():
            self.pin: Fingerprint = load_worker(self.folder).pin
            return
        self.folder.mkdir(parents=True, mode=0o700)
        self.pin = generate_root(self.folder)
        issue_worker(self.folder, days)
        add_line(self.folder / "authorized_edges", generate_edge(self.key_file, "alice"), "alice", quota)

    def new_edge(self, name: str, *, enrolled: bool = True, quota: Quota | None = None, stage: bool = False) -> Path:
        """Make a further edge's key, or a stage's."""
        path = self.folder.parent / name
        line = generate_edge(path, name)
        if enrolled:
            add_line(self.folder / "authorized_edges", line, name, quota, stage=stage)
        return path


class ThreadServer:
    """`GatewayServer` on an event loop of its own thread; a context manager."""

    def __init__(
        self,
        cloud: Served,
        home: Home,
        tls: ServerTls | None = None,
        listen: str = "127.0.0.1:0",
        next_stage: NextStage | None = None,
        batching: bool = True,
        clock: Callable[[], float] = time.monotonic,
        bounds: Bounds | None = None,
        threads: int = 1,
        recorder: Recorder | None = None,
    ) -> None:
        if not batching:
            bounds = bounds or Bounds()
            bounds = replace(bounds, engine=replace(bounds.engine, batching=False))
        self.served = cloud
        self.home = home
        self._tls = tls
        self._listen = listen
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-server", daemon=True)
        self.server = GatewayServer(
            cloud,
            IdentityFiles(home.folder, now=lambda: 0.0),
            edges_in(home.folder),
            threads,
            next_stage,
            bounds=bounds,
            clock=clock,
            recorder=recorder,
        )
        self.port = 0

    @property
    def address(self) -> str:
        """The connection string."""
        return str(ConnectionString("127.0.0.1", self.port, self.home.pin, self._tls is not None))

    def link(self, key: Path | None = None, tls: Tls | None = None, **options: Any) -> Link:
        """A link to this server that is not open yet."""
        transport = GrpcTransport(f"127.0.0.1:{self.port}", tls)
        return Link(transport, self.home.pin, load_edge(key or self.home.key_file), name="test", **options)

    def run(self, coroutine: Any, timeout: float = 30.0) -> Any:
        """Run something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def start(self) -> Self:
        """Listen."""
        if not self._thread.is_alive():
            self._thread.start()
        self.port = self.run(self.server.start(self._listen, self._tls))
        return self

    def drain(self, grace: float = 10.0) -> bool:
        """Stop gracefully."""
        return bool(self.run(self.server.drain(grace)))

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop_loop()
            raise

    def __exit__(self, *_: object) -> None:
        self.drain(0.5)
        self.stop_loop()

    def stop_loop(self) -> None:
        """End the thread; what has not been drained is cut off."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
