"""A server of Tinker's API in a process of its own, which can be killed; and a relay that loses its answers."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PATIENCE = 30.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class TinkerServer:
    """`support/daemon/tinker_server.py`, started at once.

    Args:
        folder: Where its home and its logs are.
        flags: Of the command line.
        environment: For it and what trains.
    """

    def __init__(self, folder: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.folder, self._flags = folder, flags
        self.home = folder / "home"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._environment = {
            **os.environ,
            "PYTHONPATH": path,
            "FAKE_TRAINER_LOG": str(folder / "questions"),
            "FAKE_TRAINER_CLOUD": str(folder / "cloud-is-back"),
            **(environment or {}),
        }
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        program = Path(__file__).with_name("tinker_server.py")  # a file, so that a warm process may run it
        command = [sys.executable, str(program), str(self.home), str(self.port), *self._flags]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < until
                time.sleep(0.02)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self._process.kill()
        self._process.wait()

    def token(self, name: str = "token") -> str:
        """An owner's: "token" or "second-token"."""
        return (self.home / name).read_text().strip()

    def questions(self, method: str) -> int:
        """How often what trains was asked something."""
        lines = (self.folder / "questions").read_text().splitlines()
        return Counter(json.loads(line)[0] for line in lines)[method]

    def state(self, model: str) -> dict[str, Any]:
        """A model's newest state on the disk."""
        found: dict[str, Any] = json.loads(
            (self.home / "tinker" / "models" / model.replace(":", "-") / "state.json").read_text()
        )
        return found

    def crossed(self) -> dict[str, int]:
        """What the database says has crossed to the cloud so far."""
        with closing(sqlite3.connect(self.home / "state.db")) as connection:
            query = "select sum(bytes_up), sum(bytes_down), sum(calls) from traffic where cloud = 'main'"
            (row,) = connection.execute(query).fetchall()
        return dict(zip(("bytes_up", "bytes_down", "calls"), (number or 0 for number in row), strict=True))

    def adapter(self, path: str) -> bytes:
        """The adapter's file of weights that were saved under a `tinker://` path."""
        with closing(sqlite3.connect(self.home / "state.db")) as rows:
            (folder,) = rows.execute("SELECT folder FROM tinker_weights WHERE path = ?", (path,)).fetchone()
        return (self.home / folder / "adapter_model.safetensors").read_bytes()

    def trainer(self) -> int:
        """The process that trains."""
        children = Path(f"/proc/{self._process.pid}/task").glob("*/children")
        (child,) = {int(pid) for path in children for pid in path.read_text().split()}
        return child


class LossyRelay:
    """Passes requests on, and loses answers: the server has done what was asked, and its client does not know.

    Args:
        port: The server's.
        loses: Whether the answer to a request is lost, by its path and how often the path was asked before.
    """

    def __init__(self, port: int, loses: Callable[[str, int], bool]) -> None:
        counts: Counter[str] = Counter()
        lost: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    connection.request(self.command, self.path, body, dict(self.headers.items()))
                    answer = connection.getresponse()
                    data = answer.read()
                finally:
                    connection.close()
                count = counts[self.path]
                counts[self.path] += 1
                if loses(self.path, count):
                    lost.append(self.path)
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in {"connection", "transfer-encoding", "date", "server"}:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _pass

            def log_message(self, *_: Any) -> None:
                pass

        self.lost = lost
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
