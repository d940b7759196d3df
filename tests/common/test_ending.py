"""The end of a process: nothing that must happen is left out, and nothing else is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import IO

import pytest


def run(body: str, stdout: IO[str] | int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent("""
        import atexit, sys, threading, time
        from isthmus.common.ending import run_to_end

        class Apart:
            def __del__(self):
                sys.stdout.write("taken apart\\n")

        apart = Apart()

        def main():
        {body}

        run_to_end(main)
    """).format(body=textwrap.indent(textwrap.dedent(body).strip(), "    "))
    command = [sys.executable, "-c", program]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, env=buffered, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize(("said", "code"), [("", 0), ("0", 0), ("None", 0), ("42", 42), ("'no'", 1)])
def test_the_code_is_the_commands(said: str, code: int) -> None:
    done = run(f"print('done'); sys.exit({said})")
    assert (done.returncode, done.stdout) == (code, "done\n")  # and nothing is taken apart
    assert done.stderr == ("no\n" if code == 1 else "")


def test_a_command_that_only_returns_has_succeeded() -> None:
    done = run("print('done')")
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_what_was_registered_is_called_and_threads_come_to_their_end() -> None:
    done = run("""
        atexit.register(lambda: print("registered"))
        threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
        sys.exit(3)
    """)
    assert (done.returncode, done.stdout) == (3, "thread\nregistered\n")


@pytest.mark.parametrize(("error", "code"), [("ValueError('odd')", 1), ("KeyboardInterrupt", -2)])
def test_other_exceptions_end_a_process_as_ever(error: str, code: int) -> None:
    done = run(f"raise {error}")
    assert done.returncode == code
    assert error.partition("(")[0] in done.stderr
    assert "taken apart" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_what_cannot_be_written_is_no_success() -> None:
    with Path("/dev/full").open("w") as full:
        done = run("print('done'); sys.exit(0)", stdout=full)
    assert done.returncode == 120
    assert "No space left on device" in done.stderr
