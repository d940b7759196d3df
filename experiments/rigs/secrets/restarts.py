"""Edges and workers, real processes, that are killed at any moment and started again, and what they have sealed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.common.errors import UnreachableError
from isthmus.experiments.harness.launch import free_ports
from isthmus.experiments.rigs.secrets.nonce_log import PAIR, Sealed, entries_of
from isthmus.experiments.rigs.secrets.nursery import PATIENCE, Nursery, Role
from isthmus.protocol.enrolment import ConnectionString, Quota, add_line
from isthmus.protocol.secure.keys import generate_edge, generate_root, issue_worker

EDGES = 2
WORKER_SHARE = 0.2
"""Of the crashes that are a worker's: both edges' sessions end with it."""
MOST_SECONDS = 0.4
"""Between two crashes, at most: an edge needs about half of it for connecting, handshake and its first calls."""
CRASHES_OF_A_NURSERY = 100
"""Then another process, started anew, forks the next ones."""
BROKEN_EDGES = 3
HANDSHAKE_RECORDS = 1
"""That an edge seals before its session stands."""


class Restarts:
    """Processes around one cloud's folder.

    Args:
        folder: For keys, logs and output; a new one.
        checkpoint: Of the model that is served.
        plan: How it is split.
        seed: Says who crashes when.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, plan: str, seed: int) -> None:
        self._folder, self._checkpoint, self._plan = folder, checkpoint, plan
        self._draw = random.Random(seed)  # noqa: S311  # is no secret
        self._home, self._key = folder / "cloud", folder / "edge"
        self._home.mkdir(parents=True, mode=0o700)
        pin = generate_root(self._home)
        issue_worker(self._home)
        line = generate_edge(self._key, "edge")
        add_line(self._home / "authorized_edges", line, "edge", Quota(max_sessions=1000))  # the dead are still counted
        (port,) = free_ports("127.0.0.1", 1)
        self._address = str(ConnectionString("127.0.0.1", port, pin, False))

    def crash(self, crashes: int, advance: Callable[[], None]) -> dict[str, Any]:
        """Kill and start again so many times; returns what was sealed, and who was killed where."""
        logs = self._logs("good")
        left, workers = crashes, 0
        while left:
            with self._nursery(logs) as nursery:
                alive: list[tuple[Role, int]] = [("worker", nursery.bear("worker"))]
                alive += [("edge", nursery.bear("edge")) for _ in range(EDGES)]
                self._first_session(logs)
                for _ in range(min(left, CRASHES_OF_A_NURSERY)):
                    time.sleep(self._draw.uniform(0, MOST_SECONDS))
                    at = 0 if self._draw.random() < WORKER_SHARE else self._draw.randint(1, EDGES)
                    role, pid = alive[at]
                    nursery.end(pid)
                    alive[at] = (role, nursery.bear(role))
                    workers += role == "worker"
                    left -= 1
                    advance()
        sizes = [path.stat().st_size // PAIR for path in logs.iterdir() if path.name.startswith("edge")]
        return {
            "crashes": crashes,
            "workers": workers,
            "processes": len(list(logs.iterdir())),
            "edges_in_handshake": sum(size <= HANDSHAKE_RECORDS for size in sizes),
            "edges_in_session": sum(size > HANDSHAKE_RECORDS for size in sizes),
            **asdict(Sealed.of(entries_of(logs.iterdir()))),
        }

    def broken(self) -> Sealed:
        """What processes have sealed whose random sources are all constant: edges one after the other, killed each."""
        logs = self._logs("broken")
        with self._nursery(logs) as nursery:
            nursery.bear("worker", "all_constant")
            for count in range(1, BROKEN_EDGES + 1):
                edge = nursery.bear("edge", "all_constant")
                self._first_session(logs, count)
                nursery.end(edge)
        return Sealed.of(entries_of(logs.iterdir()))

    def _nursery(self, logs: Path) -> Nursery:
        where = (self._home, self._key, self._address, logs, self._folder / "nursery.log")
        return Nursery(self._checkpoint, self._plan, *where)

    def _logs(self, name: str) -> Path:
        logs = self._folder / f"nonces-{name}"
        logs.mkdir()
        return logs

    def _first_session(self, logs: Path, edges: int = 1) -> None:
        """Wait until so many edges have sealed something in a session. Raises UnreachableError."""
        before: Sequence[Path] = ()
        deadline = time.monotonic() + PATIENCE
        while len(before) < edges:
            if time.monotonic() > deadline:
                raise UnreachableError(f"no edge has reached the worker: see {self._folder / 'nursery.log'}")
            time.sleep(0.02)
            before = [path for path in logs.glob("edge-*") if path.stat().st_size > HANDSHAKE_RECORDS * PAIR]
