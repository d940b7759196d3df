"""A folder with a cloud, in processes of its own, and an edge, as users have them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.models.tiny import tiny_checkpoint
from support.warm_processes import warm

TRAIN = (
    "--data",
    "tickets.jsonl",
    "--steps",
    "4",
    "--batch",
    "2",
    "--learning-rate",
    "0.01",
    "--rank",
    "2",
    "--threads",
    "1",
)


@dataclass
class Place:
    """One cloud and one edge in a folder, and the way to run commands there."""

    folder: Path
    model: Path
    environment: dict[str, str]
    serving: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def cloud(self) -> str:
        return str(self.folder / "connection")

    @property
    def key(self) -> str:
        return str(self.folder / "alice")

    def run(self, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return warm().run(tuple(map(str, arguments)), self.environment, self.folder, timeout)

    def good(self, *arguments: object) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def edge(self, command: str, *arguments: object, cloud: str | None = None, key: str | None = None) -> Any:
        """An edge command with this place's cloud and key."""
        own = ("--cloud", cloud or self.cloud, "--key", key or self.key, "--connect-timeout", 5)
        return self.run("edge", command, *own, *arguments)


@contextmanager
def served_place(folder: Path) -> Iterator[Place]:
    """A cloud that serves a tiny model, with an enrolled edge, until its end or the test's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "ISTHMUS_"))}
    environment |= {"OMP_NUM_THREADS": "1", "ISTHMUS_CACHE": str(folder / "cache"), "HOME": str(folder)}
    place = Place(folder, tiny_checkpoint("llama", folder / "tiny"), environment)
    home = folder / "cloud"
    assert "fingerprint  SHA256:" in place.good("cloud", "keygen", "--home", home, "--no-passphrase")
    assert "public key" in place.good("edge", "keygen", "--out", place.key, "--comment", "alice")
    assert "enrolled alice" in place.good("cloud", "enroll", f"{place.key}.pub", "--home", home)
    write_tickets(folder / "tickets.jsonl", 24)
    arguments = [
        "cloud", "serve", "--model", str(place.model), "--home", str(home), "--listen", "127.0.0.1:0",
        "--metrics", "127.0.0.1:0",
        "--connection-file", place.cloud, "--threads", "1", "--stash-bytes", "64MiB",
    ]  # fmt: skip
    with (folder / "serve.out").open("wb") as out:
        place.serving = subprocess.Popen(
            [sys.executable, "-m", "isthmus.cli.main", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not Path(place.cloud).exists():
            assert place.serving.poll() is None, (folder / "serve.out").read_text()
            assert time.monotonic() < deadline, (folder / "serve.out").read_text()
            time.sleep(0.1)
        yield place
    finally:
        if place.serving.poll() is None:
            place.serving.send_signal(signal.SIGTERM)
            try:
                place.serving.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(place.serving.pid, signal.SIGKILL)
                place.serving.wait()


def write_tickets(path: Path, count: int) -> None:
    with path.open("w") as file:
        for n in range(count):
            file.write(
                json.dumps({"prompt": f"Ticket {n}: card {n % 5} lost.", "completion": f" triage {n % 3}"}) + "\n"
            )
