"""The edge of the fault benchmark: `isthmus edge train`'s own path, and a parent that says when each phase may begin.

    python -m isthmus.experiments.rigs.faults.fault_edge '{"config": {…}, "socket": 5}'

`config` holds the fields of `TrainConfig`; `socket` is an inherited descriptor of a socket pair, or -1 for a run that
nobody disturbs. Before each phase of each question a line of JSON (a `Moment`) goes to the parent, and training goes on
when a byte comes back: whatever the parent does in between is done exactly there.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isthmus.common.errors import IsthmusError, UnreachableError
from isthmus.common.shutdown import run_to_end
from isthmus.edge.client.link import Link
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.training_config import load_config
from isthmus.edge.split_run import train_over
from isthmus.experiments.rigs.faults.fault_plan import Moment

SILENCE_SECONDS = 300.0  # an edge that reports nothing for so long hangs


class Reporter:
    """The edge's side: tells the parent of each phase and waits for its word.

    Args:
        link: whose phases these are.
        wire: one end of a socket pair.
    """

    def __init__(self, link: Link, wire: socket.socket) -> None:
        self._link = link
        self._wire = wire

    def __call__(self, question: str, phase: str) -> None:
        """A phase begins. Raises BrokenPipeError when the parent is gone, so that no edge outlives it."""
        traffic = self._link.traffic
        moment = Moment(question, phase, self._link.step, traffic.retries, traffic.bytes_up)
        self._wire.sendall(moment.line())
        if not self._wire.recv(1):
            raise BrokenPipeError("the benchmark that this edge belongs to has ended")


class Edge:
    """The parent's side: an edge in a process of its own that stops at every phase.

    Args:
        config: the fields of `TrainConfig`.
        log: file for its output.
        watched: whether it reports its phases.
    """

    def __init__(self, config: dict[str, Any], log: Path, *, watched: bool = True) -> None:
        self._log = log
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            task = json.dumps({"config": config, "socket": theirs.fileno() if watched else -1})
            self._process = subprocess.Popen(
                [sys.executable, "-m", "isthmus.experiments.rigs.faults.fault_edge", task],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        ours.settimeout(SILENCE_SECONDS)
        self._wire = ours
        self._lines = ours.makefile("rb")

    def moments(self) -> Iterator[Moment]:
        """The phases as they begin; the edge goes on when the next one is asked for. Ends with the edge's process."""
        while line := self._line():
            yield Moment.parse(line)
            with contextlib.suppress(BrokenPipeError):
                self._wire.sendall(b".")

    def finish(self) -> None:
        """Wait for its end. Raises IsthmusError if it did not end well."""
        code = self._process.wait(SILENCE_SECONDS)
        if code:
            tail = self._log.read_text(errors="replace").strip()[-2000:]
            raise IsthmusError(f"the edge ended with exit code {code}; the end of its output: {tail}")

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def _line(self) -> bytes:
        try:
            return self._lines.readline()
        except ConnectionResetError:  # it was killed with a byte of ours unread
            return b""
        except TimeoutError:
            raise UnreachableError(
                f"the edge reported nothing for {SILENCE_SECONDS:.0f} s; its output is in {self._log}"
            ) from None

    def __enter__(self) -> Edge:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._lines.close()
        self._wire.close()


def main(task: dict[str, Any]) -> None:
    """Train as the task says; raises what `isthmus.edge.split_run.run_training` raises."""
    config = load_config(None, task["config"])
    with open_link(config) as link:
        if task["socket"] < 0:
            train_over(link, config)
            return
        with socket.socket(fileno=task["socket"]) as wire:
            link.observer = Reporter(link, wire)
            train_over(link, config)
            link.observer = lambda question, phase: None


def _process() -> None:
    try:
        main(json.loads(sys.argv[1]))
    except IsthmusError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    run_to_end(_process)
