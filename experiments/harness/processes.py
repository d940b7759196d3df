"""Processes of a measurement: `python -m MODULE '{…}'` does a task, and is asked and answers in lines of JSON.

The parent has a `TaskProcess`. The module ends with `serve(main)`, which gives `main` the other end, a `Parent`. A
process is killed when its parent leaves the `with` block, and ends by itself when its parent does. While one works,
others can wait and use no processor, so that several take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from isthmus.common.errors import IsthmusError, UnreachableError
from isthmus.common.shutdown import run_to_end


class TaskProcess:
    """One of the processes; a context manager, which kills it.

    Args:
        task: What it does, as JSON can say it.
        threads: Threads of torch in it; None for torch's choice.
        log: File that its output is added to; None to keep the output for the message of a failure alone.
        shown: Whether its output is the parent's instead.
        patience: Seconds that an answer and the end may take; None for no limit.
    """

    def __init__(
        self,
        name: str,
        module: str,
        task: Mapping[str, Any],
        *,
        threads: int | None = None,
        log: Path | None = None,
        shown: bool = False,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        patience: float | None = None,
    ) -> None:
        self._name, self._log, self._patience = name, log, patience
        extra = dict(environment or {})
        if threads is not None:
            # A thread that waits for its next work must not spin on a processor that another process uses.
            extra |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}
        # A pipe that nobody reads would fill up.
        self._output: IO[bytes] | None = None
        if not shown:
            # Closed in __exit__.
            self._output = tempfile.TemporaryFile() if log is None else log.open("ab+")  # noqa: SIM115
        self._wire, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(task)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._output,
                env=os.environ | extra,
                pass_fds=tuple(pass_fds),
                start_new_session=True,  # Ctrl-C at the terminal is the parent's, which ends the process then
            )
        self._wire.settimeout(patience)
        self._lines = self._wire.makefile("rb")

    @property
    def pid(self) -> int:
        """Its id."""
        pid: int = self._process.pid
        return pid

    def send(self, question: Any) -> None:
        """Ask it something, and do not wait for the answer."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its answer will say why
            self._wire.sendall(json.dumps(question).encode() + b"\n")

    def ask(self, question: Any) -> Any:
        """Ask it something; returns its answer. Raises what `answer` raises."""
        self.send(question)
        return self.answer()

    def answer(self) -> Any:
        """The next thing that it says.

        Raises:
            IsthmusError: It has ended; the message has the last line of its output.
            UnreachableError: It has said nothing for `patience`.
        """
        for answer in self.answers():
            return answer
        self._process.wait()
        raise IsthmusError(f"the process of {self._name} failed: {self._reason()}")

    def answers(self) -> Iterator[Any]:
        """Whatever it says, until it ends. Raises UnreachableError where it says nothing for `patience`."""
        while line := self._line():
            yield json.loads(line)

    def finish(self, seconds: float | None = None) -> None:
        """Have no more questions, and wait for its end; it is killed after so many seconds, by default `patience`.

        Raises IsthmusError where it did not end well.
        """
        with contextlib.suppress(OSError):  # it has ended already
            self._wire.shutdown(socket.SHUT_WR)
        try:
            code = self._process.wait(self._patience if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.returncode
        if code:
            raise IsthmusError(f"the process of {self._name} ended with exit code {code}: {self._reason()}")

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._lines.close()
        self._wire.close()
        if self._output is not None:
            self._output.close()

    def _line(self) -> bytes:
        try:
            return self._lines.readline()
        except ConnectionResetError:  # it has ended with a question unread
            return b""
        except TimeoutError:
            raise UnreachableError(f"the process of {self._name} said nothing for {self._patience:.0f} s") from None

    def _reason(self) -> str:
        if self._output is None:
            return "its own message is above"
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it says nothing'}{f' (its output is in {self._log})' if self._log else ''}"


class Parent:
    """What a process has of its parent: the task, and questions and answers.

    Whatever is printed otherwise goes to standard error, and is no answer.
    """

    def __init__(self) -> None:
        self.task: dict[str, Any] = json.loads(sys.argv[1])
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(self, answer: Any = None) -> None:
        """Answer. Raises BrokenPipeError where the parent has ended."""
        self._answers.write(json.dumps(answer).encode() + b"\n")

    def question(self) -> Any:
        """The next question. Raises EOFError where there are no more."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError("the parent has no more questions")
        return json.loads(line)

    def questions(self) -> Iterator[Any]:
        """The questions, until there are no more."""
        with contextlib.suppress(EOFError):
            while True:
                yield self.question()


def serve(main: Callable[[Parent], None]) -> None:
    """Do all that a process is for; an error that the project knows is one line."""

    def process() -> None:
        try:
            main(Parent())
        except IsthmusError as error:
            sys.exit(f"{type(error).__name__}: {error}")

    run_to_end(process)


def run_task(name: str, module: str, task: Mapping[str, Any], *, shown: bool = False) -> Any:
    """What a process says that does a task and ends. Raises IsthmusError where it fails."""
    with TaskProcess(name, module, task, shown=shown) as process:
        answer = process.answer()
        process.finish()
        return answer


class CommandFailedError(IsthmusError):
    """A command of `isthmus` failed, with this code."""

    def __init__(self, message: str, code: int = IsthmusError.exit_code) -> None:
        super().__init__(message)
        self.code = code


def isthmus(*arguments: str) -> list[str]:
    """The command line that runs `isthmus` with this interpreter."""
    return [sys.executable, "-m", "isthmus.cli.main", *arguments]


def run_isthmus(*arguments: str) -> dict[str, Any]:
    """What a command of `isthmus` prints with `--json`; the user sees its progress.

    Raises CommandFailedError where it failed.
    """
    done = subprocess.run(isthmus(*arguments, "--json"), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CommandFailedError(
            f"`isthmus {' '.join(arguments[:2])} …` ended with exit code {done.returncode}; its own message is above",
            done.returncode,
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def train_flags(options: Mapping[str, Any]) -> list[str]:
    """Fields of `TrainConfig` as flags of `isthmus edge train`."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags
