"""Commands that are asked to stop, and the end of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest

from isthmus.common.shutdown import INTERRUPTED, interruptible, uninterrupted


@pytest.fixture(autouse=True)
def python_answers_ctrl_c() -> Iterator[None]:
    """A shell has what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("error", "said"), [(KeyboardInterrupt(), "stopped"), (KeyboardInterrupt("at 7"), "at 7")])
def test_an_interrupt_ends_the_command_with_what_the_work_says(
    error: KeyboardInterrupt, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, interruptible():
        raise error
    assert end.value.code == INTERRUPTED
    assert capsys.readouterr().err == f"isthmus: {said}\n"


def test_sigterm_does_the_same_and_what_was_open_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    closed: list[bool] = []
    stack = ExitStack()
    stack.callback(closed.append, True)
    with pytest.raises(SystemExit) as end, interruptible("go on with it"), stack:
        _wait_for(signal.SIGTERM)
    assert (end.value.code, closed) == (INTERRUPTED, [True])
    assert capsys.readouterr().err == "isthmus: go on with it\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _wait_for(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(10)


def test_a_handler_of_the_works_own_stays() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [True]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="other"), interruptible():
        raise ValueError("other")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_what_must_not_be_interrupted(number: signal.Signals) -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            os.kill(os.getpid(), number)
            done.append("all of it")
        done.append("and no more")

    with pytest.raises(SystemExit) as end, interruptible():
        work()
    assert (end.value.code, done) == (INTERRUPTED, ["all of it"])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_ends_the_process_at_once_still_does() -> None:
    with uninterrupted():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# The end of a process -------------------------------------------------------------------------------------------------


def run(body: str, stdout: IO[str] | int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent("""
        import atexit, sys, threading, time
        from isthmus.common.shutdown import run_to_end

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
