"""A worker that dies and is there again on the same port, as Ray does it, in a fraction of the time.

Lives are forked from a server that has imported everything and has started nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from pathlib import Path
from typing import Any, Self

from support.cloud.clouds import Home, ThreadServer, served

from isthmus.experiments.rigs.fault_points import fault_points
from isthmus.protocol.enrolment import ConnectionString

START_SECONDS = 60.0
FAMILY = ["transformers.models.llama.modeling_llama"]  # what the tests serve


def live(model: Path, parts: Path, home: Home, port: int, points: Path) -> None:
    """One life: serve until somebody kills this process."""
    os.environ[fault_points.ENVIRONMENT] = str(points)
    fault_points.install()
    with ThreadServer(served(model, parts), home, listen=f"127.0.0.1:{port}"):
        threading.Event().wait()


class MortalWorker:
    """A context manager; `points` is the folder of its fault points.

    Args:
        model: a checkpoint.
        folder: where its files go.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self.points = folder / "points"
        self.points.mkdir(parents=True)
        self.home = Home(folder)
        self.lives = 0
        self._port = free_port()
        self._arguments = (model, folder / "parts", self.home, self._port, self.points)
        self._context: Any = multiprocessing.get_context("forkserver")
        # By what they import: the server of forks has not the path of the tests.
        self._context.set_forkserver_preload(["isthmus.cloud.control.worker", "isthmus.edge.client.link", *FAMILY])
        self._ending = False
        self._process: Any = None
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    @property
    def connection(self) -> str:
        return str(ConnectionString("127.0.0.1", self._port, self.home.pin))

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Self:
        self._begin()
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self.kill()
        self._keeper.join(START_SECONDS)

    def _begin(self) -> None:
        self._process = self._context.Process(target=live, args=self._arguments, daemon=True)
        self._process.start()
        self.lives += 1

    def _keep(self) -> None:
        while True:
            self._process.join()
            if self._ending:
                return
            self._begin()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
