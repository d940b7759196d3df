"""Commands in processes that have imported everything when they begin.

An interpreter takes seconds to import torch, transformers and PEFT. So one process per test process imports them, does
nothing else, and forks for each command; the fork runs the command's entry point and ends as any process does.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = "isthmus.cli.main"
TESTS = Path(__file__).parents[1]


class Forked:
    """A started process; what `subprocess.Popen` can do, of which the tests need this much."""

    def __init__(self, warm: Warm, program: str, words: Sequence[str], environment: Mapping[str, str], folder: Path):
        self.args = words
        self.returncode: int | None = None
        self._warm = warm
        self._place = tempfile.TemporaryDirectory()
        self._out, self._errors = (str(Path(self._place.name, name)) for name in ("out", "errors"))
        self.pid: int = warm.ask(["start", program, words, dict(environment), str(folder), self._out, self._errors])

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def poll(self) -> int | None:
        """The exit code, or None where there is none yet."""
        if self.returncode is None:
            self.returncode = self._warm.ask(["poll", self.pid])
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired where that takes too long; it is killed then."""
        if self.returncode is None:
            self.returncode = self._warm.ask(["wait", self.pid], timeout, lambda: os.kill(self.pid, signal.SIGKILL))
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; returns what it has printed, once. Raises what `wait` raises."""
        with self._place:
            self.wait(timeout)
            return Path(self._out).read_text(), Path(self._errors).read_text()


class Warm:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._turn = threading.Lock()

    def start(
        self, words: Sequence[str], environment: Mapping[str, str], folder: Path, program: str = COMMAND
    ) -> Forked:
        """Start a command, or a program that is a file of the tests."""
        return Forked(self, program, words, environment, folder)

    def run(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        seconds: float,
        program: str = COMMAND,
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end. Raises subprocess.TimeoutExpired where that takes too long."""
        process = self.start(words, environment, folder, program)
        out, errors = process.communicate(seconds)
        return subprocess.CompletedProcess(words, process.wait(), out, errors)

    def ask(self, task: Sequence[Any], seconds: float | None = None, late: Any = None) -> Any:
        """The answer of the process that forks; after so many seconds `late` is called, which has to hasten it."""
        ours, theirs = self._process.stdin, self._process.stdout
        assert ours is not None
        assert theirs is not None
        with self._turn:
            ours.write(json.dumps(task) + "\n")
            ours.flush()
            if select.select([theirs], [], [], seconds)[0]:
                return json.loads(theirs.readline())
            late()
            theirs.readline()
            raise subprocess.TimeoutExpired(str(task), seconds or 0)

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@functools.cache
def warm() -> Warm:
    """The one of this process."""
    made = Warm()
    atexit.register(made.end)
    return made


def _main() -> None:
    import isthmus.cli.main
    import isthmus.edge.split_run
    import isthmus.emulator.package.build  # noqa: F401  # all that is heavy

    if threading.active_count() > 1:
        raise RuntimeError("a process with several threads must not fork")
    gc.collect()
    gc.freeze()  # else each fork looks through everything, and so copies it
    for line in sys.stdin:
        what, *given = json.loads(line)
        if what == "start":
            answer: int | None = os.fork()
            if not answer:
                _become(*given)
                return
        else:
            pid, status = os.waitpid(given[0], os.WNOHANG if what == "poll" else 0)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


def _become(
    program: str, words: Sequence[str], environment: Mapping[str, str], folder: str, out: str, errors: str
) -> None:
    """Be a process that a shell has started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, errors, os.O_WRONLY)):
        opened = os.open(path, flags | (os.O_CREAT if number else 0), 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *words]
    if program == COMMAND:
        del sys.modules[COMMAND]
        runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(TESTS)
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    _main()
