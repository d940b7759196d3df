"""Commands that are told to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from isthmus.common.interrupt import INTERRUPTED, interruptible, uninterrupted


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
