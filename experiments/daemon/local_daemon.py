"""A daemon in a process of its own, as a user starts it, with a home and a token of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping
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
        settings: Of daemon.toml, besides the cloud and the address.
    """

    def __init__(self, folder: Path, cloud: LocalCloud, settings: Mapping[str, Any] | None = None) -> None:
        self.home = folder / "daemon"
        self._home = Home.make(self.home)
        super().__init__("daemon", ("edge", "daemon", "start", "--home", str(self.home)), folder / "daemon.log")
        given = {"listen": "127.0.0.1:0", **(settings or {})}
        table = ["[clouds.local]", f'cloud = "{cloud.connection_file}"', f'key = "{cloud.edge_key}"', ""]
        lines = [*(f"{name} = {json.dumps(value)}" for name, value in given.items()), *table]
        (self.home / FILE).write_text("\n".join(lines))

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
        return self._home.token.read_text().strip()

    @property
    def model(self) -> str:
        """What the cloud calls its model: of a folder, its last name."""
        return str(self.client.get("/isthmus/v1/status")["models"][0]["name"])

    @property
    def client(self) -> DaemonClient:
        """Asks it over its Unix socket."""
        return DaemonClient(self._home, timeout=60.0)

    def kill(self) -> None:
        """SIGKILL to the process that serves clients; those that compute for it notice by themselves."""
        os.kill(self.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def is_up(self) -> bool:
        """Whether it answers, and knows the cloud's model."""
        with contextlib.suppress(NotRunningError):
            return bool(self.client.get("/isthmus/v1/status")["models"])
        return False

    @property
    def _running(self) -> dict[str, Any]:
        running: dict[str, Any] = json.loads(self._home.running.read_bytes())
        return running
