"""What the processes of `tenants_crowd` do: train in turns, or flood a cloud."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

import torch

from isthmus.edge.client.link import connect
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.training_config import load_config
from isthmus.edge.split_run import train_over
from isthmus.experiments.harness.processes import Parent, serve
from isthmus.experiments.harness.single_process import StepWatch, train_in_one_process, train_parts_alone

MODULE: Final = "isthmus.experiments.serving.tenants_process"
WARM_UP: Final = 2
"""Steps before the first turn."""
FLOOD_SESSIONS: Final = 10


class Enough(Exception):  # noqa: N818 - nothing went wrong
    """There are no further turns."""


class Moments(StepWatch):
    """Notes when steps begin: a `StepObserver` of the trainer that waits between turns for what to do next."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._moments: list[float] = []
        self._made, self._steps, self._cpu = 0, 0, 0.0

    def before_step(self, step: int) -> None:
        """Note it; wait before the first step after warming up, and after the last one of each turn."""
        self._made += 1
        if self._made <= WARM_UP:
            return
        if self._made == WARM_UP + 1:
            self._wait("warm")
        self._moments.append(time.monotonic())
        if len(self._moments) > self._steps:
            self._wait({"moments": self._moments, "cpu_s": time.process_time() - self._cpu})
            self._moments = [time.monotonic()]

    def _wait(self, done: object) -> None:
        self._parent.say(done)
        steps = self._parent.question()
        if steps == "end":
            raise Enough
        self._steps, self._cpu = steps, time.process_time()


def _main(parent: Parent) -> None:
    task = parent.task
    if "flood" in task:
        _pour(parent)
        return
    config = load_config(None, task["config"])
    with contextlib.suppress(Enough):
        if task["parts"]:
            train_parts_alone(task["model"], task["edge_layers"], config, watchers=[Moments(parent)])
        elif config.key is None:
            train_in_one_process(task["model"], task["edge_layers"], config, watchers=[Moments(parent)])
        else:
            with open_link(config) as link:
                train_over(link, config, [Moments(parent)])
    parent.say("done")


class _Flood:
    """Sessions that call again and again, all of them or none."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        self._task = task
        self._changed = threading.Condition()
        self._pouring = False
        self._working = FLOOD_SESSIONS  # sessions that have something to do: at first, to connect
        for _ in range(FLOOD_SESSIONS):
            threading.Thread(target=self._run, daemon=True).start()

    def turn(self, *, pouring: bool) -> None:
        """Have all sessions call, or wait until none does."""
        with self._changed:
            self._pouring = pouring
            self._changed.notify_all()
            self._changed.wait_for(lambda: pouring or not self._working)

    def _run(self) -> None:
        try:
            self._session()
        except BaseException as error:  # noqa: BLE001  # else whoever waits for the session would wait for ever
            print(error, file=sys.stderr, flush=True)
            os._exit(1)

    def _session(self) -> None:
        with connect(self._task["flood"], key=self._task["key"]) as link:
            hidden = torch.randn(1, self._task["tokens"], link.info.hidden_size)
            while True:
                with self._changed:
                    self._working -= 1
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._pouring)
                    self._working += 1
                _, kept = link.forward_span(hidden, None, None, keep=True)
                link.backward_span(kept, torch.ones_like(hidden), hidden, None, None)


def _pour(parent: Parent) -> None:
    flood = _Flood(parent.task)
    flood.turn(pouring=False)
    parent.say("connected")
    for question in parent.questions():
        flood.turn(pouring=question == "pour")
        parent.say("done")
    os._exit(0)  # the sessions never end by themselves


if __name__ == "__main__":
    serve(_main)
