"""Commands as a user types them, and what each must say when it refuses.

They run in processes of their own, without any network where a test wants that; or, where only what a command says and
leaves behind counts, through the entry point in this process, which saves the seconds of starting one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import offline_command
from support.warm_processes import WarmPopen, warm

from isthmus.cli.main import main


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class Shell:
    """A folder, and the commands that are run in it.

    Args:
        folder: the working folder; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *words: object) -> WarmPopen:
        """Start a command."""
        return warm().start(tuple(map(str, words)), _environment(), self.folder)

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return warm().run(tuple(map(str, words)), _environment(), self.folder, 240)

    def good(self, *words: object) -> str:
        """What a command that succeeds prints."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *words: object) -> Any:
        """What a command that succeeds prints with `--json`."""
        return json.loads(self.good(*words, "--json"))

    def offline(self, port: int, *words: object) -> str:
        """What a command that succeeds prints in a network namespace whose only interface, the loopback, is down.

        Before the command starts, and in its process, a connection to `port` of 127.0.0.1 fails.
        """
        skip_without_namespaces()
        program, arguments = offline_command.__file__, tuple(map(str, (port, *words)))
        done = warm().run(arguments, _environment(), self.folder, 240, program=program)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[0] == "the probe says ENETUNREACH"
        return done.stdout


def ended(process: WarmPopen, number: signal.Signals | None = None) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a command, which a signal may hasten."""
    if number is not None:
        process.send_signal(number)
    out, errors = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def wait_for(happened: Callable[[], bool], process: WarmPopen) -> None:
    """Wait until something happens while a command runs; the command is killed if it does not."""
    deadline = time.monotonic() + 120
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it did not happen: {process.communicate()}")
        time.sleep(0.005)


def skip_without_namespaces() -> None:
    """Skip the test where the kernel refuses a network namespace."""
    prefix = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") is None:
        pytest.skip("a network namespace needs the command unshare, which is not here")
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"the kernel refuses a network namespace: {tried.stderr.strip()}")


def in_process(capsys: pytest.CaptureFixture[str], *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command through the entry point of the console script, in this process."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["isthmus", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
    said = capsys.readouterr()
    return subprocess.CompletedProcess(words, int(end.value.code or 0), said.out, said.err)


def refused(done: subprocess.CompletedProcess[str], code: int, *texts: str) -> None:
    """A command ended with this exit code and one line that says these texts."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("isthmus: ")
    assert sum(line.startswith("isthmus: ") for line in lines) == 1
    assert all(text in lines[-1] for text in texts), lines[-1]
