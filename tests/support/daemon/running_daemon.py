"""A daemon in a process of its own, by default that of `support.daemon.daemon_parts`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from isthmus.daemon.home import Home


class RunningDaemon:
    """A daemon in a process of its own.

    Args:
        parts: What it is made of.
    """

    def __init__(self, home: Path, settings: str = "", parts: str = "support.daemon.daemon_parts") -> None:
        self.home = Home(home)
        command = [sys.executable, "-m", parts, str(home)]
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(settings)
        self.process.stdin.close()
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.home.log.read_text()

    @property
    def token(self) -> str:
        return self.home.token.read_text().strip()

    def get(self, path: str, token: str | None = None, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, headers={"X-API-Key": token or self.token}, trust_env=False, **options)

    def post(self, path: str, token: str | None = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, headers={"X-API-Key": token or self.token}, trust_env=False, **options)

    def end(self, number: signal.Signals) -> str:
        """Send a signal; returns what the process still says."""
        assert self.process.stdout is not None
        if self.process.stdout.closed:
            return ""
        self.process.send_signal(number)
        rest = self.process.stdout.read()
        self.process.wait()
        self.process.stdout.close()
        return rest


@contextlib.contextmanager
def running_daemon(
    home: Path, settings: str = "", parts: str = "support.daemon.daemon_parts"
) -> Iterator[RunningDaemon]:
    running = RunningDaemon(home, settings, parts)
    try:
        yield running
    finally:
        running.end(signal.SIGKILL)
