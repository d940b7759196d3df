"""Processes that take turns, so that whatever else the machine does hits all alike, and each has its own peak memory.

The parent starts `python -m MODULE '{…}'` for each and asks in lines; a process answers each question with one line
and says first that it is ready. While one works, the others wait and use no processor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from isthmus.common.errors import IsthmusError


class TurnProcess:
    """One of the processes.

    Args:
        name: Of what it does, for messages.
        module: What it runs.
        task: What it is told, as JSON can say it.
        threads: Threads of torch in it.
    """

    def __init__(self, name: str, module: str, task: Mapping[str, Any], threads: int) -> None:
        self._name = name
        # A thread that waits for its next piece of work must not spin on a processor that another process uses.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}
        # A pipe that nobody reads would fill up.
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )

    def __enter__(self) -> TurnProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    def tell(self, what: str) -> None:
        """Tell it something, and do not wait for the answer."""
        assert self._process.stdin is not None  # noqa: S101  # it is a pipe
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its answer will say why

    def ask(self, what: str) -> str:
        """Ask it something; returns its answer. Raises what `answer` raises."""
        self.tell(what)
        return self.answer()

    def answer(self) -> str:
        """The next line that it says.

        Raises:
            IsthmusError: It has ended; the message has the last line of what it said why.
        """
        assert self._process.stdout is not None  # noqa: S101  # it is a pipe
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            reason = (self._errors.read().strip().splitlines() or ["it ended without a word"])[-1]
            raise IsthmusError(f"the process of {self._name} failed: {reason}")
        return line.strip()


class StepWatch:
    """What a `StepObserver` of the trainer that only looks at the beginnings of steps does for the rest."""

    def after_step(self, step: int) -> None:
        """Nothing: what follows a step is a part of it."""

    def points(self) -> dict[str, float]:
        """No curves."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing that a next step depends on."""
        return {}

    def load_state(self, state: Any) -> None:
        """There is nothing in it."""
