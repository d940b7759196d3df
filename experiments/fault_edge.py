"""The edge of the fault benchmark: `isthmus edge train`'s own path, with a parent that is told of every phase and decides what happens in it.

    python -m isthmus.experiments.fault_edge '{"config": {…}, "socket": 5}'

`config` holds the fields of `TrainConfig`; `socket` is an inherited descriptor of a socket pair, or -1 for a run that nobody disturbs. Before
each phase of each question a line of JSON (a `Moment`) goes to the parent, and training goes on when a byte comes back: whatever the parent
does in between is done exactly there.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

from isthmus.backbone.errors import IsthmusError
from isthmus.edge.config import load_config
from isthmus.edge.link import Link
from isthmus.edge.run import open_link, train_over
from isthmus.experiments.fault_plan import Moment


class Reporter:
    """Tells the parent of each phase and waits for its word.

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


def main(task: dict[str, Any]) -> None:
    """Train as the task says; raises what `isthmus.edge.run.run_training` raises."""
    config = load_config(None, task["config"])
    with open_link(config) as link:
        if task["socket"] < 0:
            train_over(link, config)
            return
        with socket.socket(fileno=task["socket"]) as wire:
            link.observer = Reporter(link, wire)
            train_over(link, config)
            link.observer = lambda question, phase: None


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except IsthmusError as error:
        sys.exit(f"{type(error).__name__}: {error}")
