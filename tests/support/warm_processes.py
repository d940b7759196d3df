"""Python processes that have imported everything when they begin.

An interpreter takes seconds to import torch, transformers and PEFT. So one process imports them, does nothing else,
and forks for each program that a test process asks for; the fork runs the program's entry point and ends as any process
does. The processes that tests are spread over share it: whoever needs it first starts it, and it ends with the last.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = "isthmus.cli.main"
TESTS = Path(__file__).parents[1]
MESSAGE_BYTES = 1 << 17
POLL_SECONDS = 0.01
LAST_SECONDS = 1.0  # how long the process waits for another one that asks, when the last has ended
FOLDER = "ISTHMUS_TESTS_FOLDER"
"""Names a folder of this run of tests, which the processes share that tests are spread over."""
NETWORK = Path("/proc/thread-self/ns/net")
_Popen = subprocess.Popen  # tests put the one below in its place


class WarmPopen(_Popen[Any]):
    """`subprocess.Popen`, but `python -m isthmus.…`, and `python FILE` for a file of the tests, fork a warm process.

    The fork gets what a child gets of its parent: standard streams, `pass_fds`, environment, folder, session, and the
    network namespace of the thread. It does not get the parent's limits and priorities. All else is started as
    `subprocess.Popen` does it, and so is `isthmus cloud serve`, whose process imports none of what is heavy.
    """

    def _execute_child(  # the place where Popen starts the process
        self, args: Sequence[str], executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Sequence[int],
        cwd: Any, env: Mapping[str, str] | None, startupinfo: Any, creationflags: Any, shell: Any, *rest: Any,
    ) -> None:  # fmt: skip
        self._forked = _forks(args)
        if not self._forked:
            super()._execute_child(  # type: ignore[misc]  # it is not public
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *rest
            )
            return
        pipes, new_session = rest[:6], rest[-2]
        streams = [own if given < 0 else given for own, given in enumerate((pipes[0], pipes[3], pipes[5]))]
        words = [os.fspath(word) for word in args[1:]]
        module = words[0] == "-m"
        task = {
            "program": words[module],
            "module": module,
            "words": words[module + 1 :],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
            "session": bool(new_session),
            "targets": [0, 1, 2, *pass_fds],
        }
        network = os.open(NETWORK, os.O_RDONLY)
        try:
            self.pid = warm().ask(["start", task], [*streams, *pass_fds, network])
        finally:
            os.close(network)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]  # as Popen's own method does

    def _internal_poll(self, *others: Any, **options: Any) -> int | None:  # what `poll` calls
        if not self._forked:
            return super()._internal_poll(*others, **options)  # type: ignore[misc,no-any-return]  # it is not public
        if self.returncode is None:
            self.returncode = warm().ask(["poll", self.pid])
        return self.returncode

    def _wait(self, timeout: float | None) -> int:  # what `wait` calls
        if not self._forked:
            return super()._wait(timeout)  # type: ignore[misc,no-any-return]  # it is not public
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self._internal_poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(POLL_SECONDS)
        return code


def _forks(args: Any) -> bool:
    if not isinstance(args, list | tuple) or len(args) < 2 or args[0] != sys.executable:
        return False
    if args[1] == "-m":
        return str(args[2]).startswith("isthmus.") and list(args[3:5]) != ["cloud", "serve"]
    return TESTS in Path(args[1]).parents


class Warm:
    """The process that forks.

    Args:
        folder: where its socket is.
    """

    def __init__(self, folder: Path) -> None:
        self._ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with (folder / "warm.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._ours.connect(str(folder / "warm"))
            except OSError:  # there is none, or it has ended
                _start(folder / "warm")
                self._ours.connect(str(folder / "warm"))
        self._turn = threading.Lock()

    def start(
        self, words: Sequence[str], environment: Mapping[str, str], folder: Path, program: str = COMMAND
    ) -> WarmPopen:
        """Start a command, or a program that is a file of the tests."""
        return WarmPopen(
            [sys.executable, *(("-m", program) if program == COMMAND else (program,)), *words],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        seconds: float,
        program: str = COMMAND,
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end. Raises subprocess.TimeoutExpired where that takes too long; it is killed then."""
        with self.start(words, environment, folder, program) as process:
            try:
                out, errors = process.communicate(timeout=seconds)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(words, process.returncode, out, errors)

    def ask(self, task: Sequence[Any], descriptors: Sequence[int] = ()) -> Any:
        """The answer of the process that forks, which gets these descriptors."""
        with self._turn:
            socket.send_fds(self._ours, [json.dumps(task).encode()], descriptors)
            return json.loads(self._ours.recv(MESSAGE_BYTES))

    def end(self) -> None:
        """Ask for no more."""
        self._ours.close()


@functools.cache
def warm() -> Warm:
    """The one of this run of tests."""
    made = Warm(Path(os.environ[FOLDER]))
    atexit.register(made.end)
    return made


def _start(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()
        started = _Popen(
            [sys.executable, __file__, str(listening.fileno())],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            pass_fds=[listening.fileno()],
        )
    started.returncode = 0  # nobody waits for it


def _main(listening: socket.socket) -> None:
    gc.disable()  # else it looks again and again through what stays
    import isthmus.cli.main
    import isthmus.edge.split_run
    import isthmus.emulator.package.build  # noqa: F401  # all that is heavy

    if threading.active_count() > 1:
        raise RuntimeError("a process with several threads must not fork")
    gc.collect()
    gc.freeze()  # else each fork looks through everything, and so copies it
    gc.enable()
    asking: list[socket.socket] = []
    while True:
        ready, _, _ = select.select([listening, *asking], [], [], None if asking else LAST_SECONDS)
        if not ready:
            return
        if listening in ready:
            asking.append(listening.accept()[0])
            continue
        tasks = ready[0]
        text, descriptors, _, _ = socket.recv_fds(tasks, MESSAGE_BYTES, 64)
        if not text:
            tasks.close()
            asking.remove(tasks)
            continue
        what, about = json.loads(text)
        if what == "start":
            answer: int | None = os.fork()
            if not answer:
                for each in (listening, *asking):
                    each.close()
                try:
                    _become(descriptors, **about)
                finally:
                    gc.unfreeze()  # else the end finds objects that are left, and says so
                return
            for each in descriptors:
                os.close(each)
        else:
            pid, status = os.waitpid(about, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        with contextlib.suppress(BrokenPipeError):  # whoever asked has ended
            tasks.send(json.dumps(answer).encode())


def _become(
    descriptors: Sequence[int],
    *,
    program: str,
    module: bool,
    words: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    session: bool,
    targets: Sequence[int],
) -> None:
    """Be a process that was started anew."""
    if session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    above = 1 + max((*targets, *descriptors))
    *moved, network = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, above) for each in descriptors]
    for each in descriptors:
        os.close(each)
    for each, target in zip(moved, targets, strict=True):
        os.dup2(each, target)
        os.close(each)
    if os.fstat(network).st_ino != NETWORK.stat().st_ino and ctypes.CDLL(None, use_errno=True).setns(network, 0):
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")
    os.close(network)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if (threads := environment.get("OMP_NUM_THREADS")) != "1":  # what this process has begun with
        sys.modules["torch"].set_num_threads(int(threads or len(os.sched_getaffinity(0))))
    sys.argv = [program, *words]
    if module:
        sys.path[0] = folder
        sys.modules.pop(program, None)
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(TESTS)
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
