"""A daemon in a process of its own, as a user starts it, with a home and a token of its own."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from isthmus.common.errors import NotRunningError
from isthmus.daemon.daemon_client import DaemonClient
from isthmus.daemon.daemon_settings import FILE
from isthmus.daemon.home import Home
from isthmus.experiments.harness.launch import LocalCloud, LocalServer


class LocalDaemon(LocalServer):
    """`isthmus edge daemon start`, which knows one cloud.

    Args:
        folder: Its home lies in it.
    """

    def __init__(self, folder: Path, cloud: LocalCloud) -> None:
        self.home = Home.make(folder / "daemon")
        arguments = ("edge", "daemon", "start", "--home", str(self.home.path))
        super().__init__("daemon", arguments, folder / "daemon.log")
        table = f'[clouds.local]\ncloud = "{cloud.connection_file}"\nkey = "{cloud.edge_key}"\n'
        (self.home.path / FILE).write_text(f'listen = "127.0.0.1:0"\n\n{table}')

    @property
    def pid(self) -> int:
        """The process that serves clients."""
        return int(self._running["pid"])

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        host, _, port = self._running["url"].removeprefix("http://").rpartition(":")
        return host, int(port)

    @property
    def token(self) -> str:
        """The first owner's token."""
        return self.home.token.read_text().strip()

    @property
    def client(self) -> DaemonClient:
        """Asks it over its Unix socket."""
        return DaemonClient(self.home, timeout=60.0)

    def is_up(self) -> bool:
        """Whether it answers, and knows the cloud's model."""
        with contextlib.suppress(NotRunningError):
            return bool(self.client.get("/isthmus/v1/status")["models"])
        return False

    @property
    def _running(self) -> dict[str, Any]:
        running: dict[str, Any] = json.loads(self.home.running.read_bytes())
        return running
