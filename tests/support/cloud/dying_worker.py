"""A worker that dies and is there again on the same port, as Ray does it, in a fraction of the time."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Self

from support.cloud.clouds import Home
from support.cloud.server_process import start
from support.warm_processes import WarmPopen

from isthmus.experiments.rigs.fault_points import fault_points
from isthmus.protocol.enrolment import ConnectionString

END_SECONDS = 60.0


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
        self._model, self._parts = model, folder / "parts"
        self._turn = threading.Lock()
        self._ending = False
        self._process: WarmPopen | None = None
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    @property
    def connection(self) -> str:
        return str(ConnectionString("127.0.0.1", self._port, self.home.pin))

    def __enter__(self) -> Self:
        self._begin()
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._ending = True
            if self._process is not None:
                self._process.kill()
        self._keeper.join(END_SECONDS)

    def _begin(self) -> None:
        environment = {fault_points.ENVIRONMENT: str(self.points)}
        self._process = start(self._model, self._parts, self.home, self._port, environment)
        self.lives += 1

    def _keep(self) -> None:
        while self._process is not None:
            with self._process as process:
                process.wait()
            with self._turn:
                if self._ending:
                    return
                self._begin()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
