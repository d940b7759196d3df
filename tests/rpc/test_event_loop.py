"""The event loop of a synchronous process: waits that end early, forks, and the end of the process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from isthmus.common.errors import LocalProtocolError
from isthmus.rpc.event_loop import EventLoop, run


class WantedNoMoreError(Exception):
    pass


async def name_of_thread() -> str:
    return threading.current_thread().name


async def fail(error: BaseException) -> None:
    raise error


def test_all_threads_share_one_loop() -> None:
    names: list[str] = [run(name_of_thread())]
    thread = threading.Thread(target=lambda: names.append(run(name_of_thread())))
    thread.start()
    thread.join()
    assert names == ["isthmus-rpc"] * 2
    assert threading.current_thread().name != names[0]


@pytest.mark.parametrize("error", [TimeoutError("its own"), ValueError("its own")])
def test_an_error_of_the_work_is_raised(error: Exception) -> None:
    with pytest.raises(type(error), match="its own"):
        run(fail(error))


def test_a_wait_that_nobody_wants_is_cancelled() -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def check() -> None:
        if begun.is_set():
            raise WantedNoMoreError

    with pytest.raises(WantedNoMoreError):
        run(wait(), check)
    assert cancelled.wait(10)
    assert run(name_of_thread()) == "isthmus-rpc"  # the loop goes on


def test_what_would_wait_for_itself_is_refused() -> None:
    async def inner() -> str:
        return run(name_of_thread())

    with pytest.raises(LocalProtocolError, match="a callback of its own"):
        run(inner())


def test_a_forked_process_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = EventLoop()
    assert loop.run(name_of_thread()) == "isthmus-rpc"
    mine = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: mine + 1)
    with pytest.raises(LocalProtocolError, match="cannot be used in a forked process"):
        loop.run(name_of_thread())


PROGRAM = """
import asyncio, concurrent.futures, contextlib, os, sys, threading
from isthmus.rpc.event_loop import run
from isthmus.rpc.transport import GrpcTransport

async def forever():
    await asyncio.Event().wait()

async def open_a_channel():
    transport = GrpcTransport("127.0.0.1:1", connect_timeout=0.05)
    try:
        await transport.open()
    except Exception as error:
        return type(error).__name__

def wait():
    with contextlib.suppress(concurrent.futures.CancelledError):
        run(forever())

print(run(open_a_channel()), flush=True)
threading.Thread(target=wait, daemon=True).start()
{rest}
"""
FORKS = """
child = os.fork()
if child == 0:
    raise SystemExit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize(
    ("rest", "printed", "code"),
    [("", [], 0), ("raise SystemExit(3)", [], 3), (FORKS, ["7"], 0)],
    ids=["end", "error", "fork"],
)
def test_a_process_that_has_not_closed_its_streams_ends(rest: str, printed: list[str], code: int) -> None:
    program = PROGRAM.format(rest=rest)
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.stdout.split() == ["ConnectionLostError", *printed]
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr


WAITS = """
import asyncio
from isthmus.rpc.event_loop import run

async def wait():
    print("waiting", flush=True)
    try:
        await asyncio.sleep(600)
    finally:
        print("given up", flush=True)

run(wait())
"""


def test_ctrl_c_ends_a_wait() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waiting\n"
        waiting.send_signal(signal.SIGINT)
        printed, said = waiting.communicate(timeout=60)
    assert waiting.returncode == -signal.SIGINT
    assert said.endswith("KeyboardInterrupt\n")
    assert printed == "given up\n"  # the work was cancelled, not left behind
