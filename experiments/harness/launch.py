"""Real parts for benchmarks and the demo: servers in processes of their own, as a user starts them, and a cloud among
them, with keys made for the occasion."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from isthmus.cloud.control.ports import Ports
from isthmus.common.errors import IsthmusError, PortInUseError, UnreachableError
from isthmus.common.progress import bar
from isthmus.common.shutdown import uninterrupted
from isthmus.experiments.harness.processes import isthmus
from isthmus.protocol.enrolment import Quota, add_line
from isthmus.protocol.secure.keys import generate_edge, generate_root, issue_worker

START_SECONDS = 180.0
FIRST_PORT, PORT_TRIES = 10_000, 20


class LocalServer(ABC):
    """A server of this machine in a process of its own, as a user starts it. A context manager, which ends it.

    Args:
        name: What an error calls it.
        arguments: Of `isthmus`.
        log: File that its output is added to.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None):
        self._name, self._arguments, self._log = name, arguments, log
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        """The command line that starts it."""
        return isthmus(*self._arguments)

    @abstractmethod
    def is_up(self) -> bool:
        """Whether it answers."""

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises UnreachableError where it does not; the message has the end of its output.
        """
        with self._log.open("ab") as log, uninterrupted():
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, env=self._environment,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self.is_up():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = self._log.read_text(errors="replace")[-2000:]
                raise UnreachableError(
                    f"the {self._name} did not start within {START_SECONDS:.0f} s; the end of its output: {tail}"
                )
            time.sleep(0.1)

    def stop(self) -> int | None:
        """End it, gracefully where that works. Returns its exit code; None where it was not started."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return None if process is None else process.returncode
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # Ctrl-C, say, while it starts
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class LocalCloud(LocalServer):
    """`isthmus cloud serve`, with keys of its own and one enrolled edge."""

    def __init__(self, folder: Path, model: str, *options: str, environment: Mapping[str, str] | None = None) -> None:
        self.home = folder / "cloud"
        self.edge_key = folder / "edge" / "id_ed25519"
        self.connection_file = folder / "connection"
        arguments = [
            *("cloud", "serve", "--model", model, "--home", str(self.home)),
            *("--connection-file", str(self.connection_file)),
            *("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"),
            *options,
        ]
        super().__init__("cloud", arguments, folder / "serve.log", environment)
        if not self.home.exists():
            self.home.mkdir(parents=True, mode=0o700)
            generate_root(self.home)
            issue_worker(self.home)
            self.enroll("edge", self.edge_key)

    @property
    def connection(self) -> str:
        """The connection string."""
        return self.connection_file.read_text().strip()

    def enroll(self, name: str, key: Path, quota: Quota | None = None) -> None:
        """Make a key and enrol it."""
        key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        add_line(self.home / "authorized_edges", generate_edge(key, name), name, quota)

    def start(self) -> None:
        """Start it, and wait until its workers answer; again at the same addresses only where `--listen` names a port.

        Raises what `LocalServer.start` does.
        """
        self.connection_file.unlink(missing_ok=True)
        super().start()

    def is_up(self) -> bool:
        """Whether the workers answer."""
        return self.connection_file.exists()

    def status(self) -> dict[str, Any]:
        """The first worker's status, `pid` among it. Raises UnreachableError where that one does not answer."""
        first: dict[str, Any] = self.cloud_status()["workers"][0]
        if "pid" not in first:
            raise UnreachableError(f"the first worker of {self.home} is {first['state']}: ask again in a moment")
        return first

    def worker(self) -> int:
        """The first worker's process, as soon as there is one. Raises UnreachableError where none starts."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return int(self.status()["pid"])
            except UnreachableError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def cloud_status(self) -> dict[str, Any]:
        """What `isthmus cloud status` shows: of the cloud, and in `workers` of each."""
        state = json.loads((self.home / "serving.json").read_text())
        with urllib.request.urlopen(f"http://{state['metrics']}/status", timeout=5) as response:
            status: dict[str, Any] = json.load(response)
        return status

    def control_store(self) -> int | None:
        """The process of Ray's control store; None while there is none."""
        for pid in () if self._process is None else _of_session(self._process.pid):
            with contextlib.suppress(OSError):  # it has ended
                program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
                if program.endswith(b"gcs_server"):
                    return pid
        return None

    def kill(self) -> None:
        """SIGKILL to every process of it, those of Ray too, as when a machine loses its power."""
        process, self._process = self._process, None
        if process is None:
            raise IsthmusError("the cloud was not started")
        while alive := _of_session(process.pid):  # Ray may start further ones meanwhile
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.01)
        process.wait()


def free_ports(host: str, count: int) -> list[int]:
    """Ports one after the other on which nobody listens, below those that the kernel gives away by itself.

    Raises PortInUseError where there are none.
    """
    for _ in range(PORT_TRIES):
        first = FIRST_PORT + secrets.randbelow(FIRST_PORT)  # others may look at the same time
        with contextlib.suppress(PortInUseError), contextlib.closing(Ports()) as ports:
            ports.take_several(f"{host}:{first}", count)
            return list(range(first, first + count))
    raise PortInUseError(f"{host} has no {count} free ports in a row above {FIRST_PORT}: ask for fewer workers")


def _of_session(leader: int) -> list[int]:
    """Processes of a session, by the process that began it, without zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it is gone, or no process
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def working_folder(keep: Path | None = None) -> Iterator[Path]:
    """A private folder that is gone afterwards, or `keep`, which stays."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    folder = Path(tempfile.mkdtemp(prefix="isthmus-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stderr_progress(what: str, total: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """A progress bar on standard error; call what it yields once for each unit of work."""
    return bar(None, what, total)


def write_key(path: Path, seed: int) -> Path:
    """Write a key for defences that follows from a seed, for figures that can be had again; it protects nothing."""
    path.write_text(f"{seed:064x}\n")
    return path
