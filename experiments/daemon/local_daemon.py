"""A daemon in a process of its own, as a user starts it, with a home and a token of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from isthmus.common.errors import NotRunningError, UnreachableError
from isthmus.common.shutdown import uninterrupted
from isthmus.daemon.daemon_client import DaemonClient
from isthmus.daemon.home import Home
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.processes import isthmus

START_SECONDS = 60.0


class LocalDaemon:
    """`isthmus edge daemon start`, which knows one cloud. A context manager, which ends it.

    Args:
        folder: Its home lies in it.
        settings: Lines of daemon.toml before the cloud's table, as values.
    """

    def __init__(self, folder: Path, cloud: LocalCloud, settings: Mapping[str, Any] | None = None) -> None:
        self.home = folder / "daemon"
        self._log = folder / "daemon.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        lines = [
            f"{name} = {json.dumps(value)}" for name, value in {"listen": "127.0.0.1:0", **(settings or {})}.items()
        ]
        table = f'[clouds.local]\ncloud = "{cloud.connection_file}"\nkey = "{cloud.edge_key}"\n'
        (self.home / "daemon.toml").write_text("\n".join([*lines, "", table]))

    def start(self) -> None:
        """Start it, and wait until it answers and knows a model. Raises UnreachableError where it does not."""
        with self._log.open("ab") as log, uninterrupted():
            self._process = subprocess.Popen(
                isthmus("edge", "daemon", "start", "--home", str(self.home)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self._is_up():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = self._log.read_text(errors="replace")[-2000:]
                raise UnreachableError(f"the daemon did not start; the end of its output: {tail}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """The process that serves clients."""
        return int(self._state()["pid"])

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        host, _, port = self._state()["url"].removeprefix("http://").rstrip("/").rpartition(":")
        return host, int(port)

    @property
    def token(self) -> str:
        """The first owner's token."""
        return (self.home / "token").read_text().strip()

    @property
    def client(self) -> DaemonClient:
        """Asks it over its Unix socket."""
        return DaemonClient(Home(self.home), timeout=60.0)

    def kill(self) -> None:
        """SIGKILL to the process that serves clients; those that compute for it notice by themselves."""
        os.kill(self.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """End it, gracefully where that works."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.home / "daemon.json").read_text())
        return state

    def _is_up(self) -> bool:
        """Whether it answers, and knows the cloud's model."""
        with contextlib.suppress(OSError, ValueError, KeyError, NotRunningError):
            return bool(self.client.get("/isthmus/v1/status")["models"])
        return False

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # Ctrl-C, say, while it starts
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
