"""A tenant of `isthmus bench chaos`: a thread that trains the same again and again, by edges in processes of their own.

Its first training is one that nobody disturbs; every later one is compared with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.experiments.rigs.chaos.chaos_plan import Span
from isthmus.experiments.rigs.faults.fault_edge import Edge
from isthmus.experiments.rigs.faults.faults import compare_runs

CALM = "calm"


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished step: when it was, and when the cloud gave its last answer for it, by the monotonic clock."""

    at: float
    answered_at: float


class Tenant:
    """Trains from `start` on; a context manager, which ends it in the middle of whatever it does.

    Args:
        config: the fields of `TrainConfig`, without `out`.
        inside: enters the namespace of the edges.

    Attributes:
        rounds: Of each finished training but the first, what differs from the first.
        finished: The steps so far; those that a killed edge had to make again, too.
        steps: When those were that another one of the same edge followed: the last one ends with the edge's process.
        error: What ended the tenant, where something has that must not.
        calm: Whether its first training is over; it waits for `disturb` then.
    """

    def __init__(
        self, name: str, config: dict[str, Any], folder: Path, inside: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.rounds: list[dict[str, Any]] = []
        self.finished: list[Finished] = []
        self.steps: list[Span] = []
        self.retries = 0
        self.error: BaseException | None = None
        self.calm = False
        self._config = config
        self._folder = folder / name
        self._inside = inside
        self._begun = 0.0  # when the step did that the edge is at
        self._answered = 0.0  # when the cloud last did
        self._step = 0  # that the edge is at; 0 while it only begins or ends
        self._edge: Edge | None = None
        self._killed = False
        self._lock = threading.Lock()  # of the two before
        self._go, self._last, self._closed = threading.Event(), False, False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def training(self) -> bool:
        """Whether it is in the middle of a step."""
        return self._step > 0

    @property
    def early(self) -> bool:
        """Whether it is in the middle of a step of a training's first half."""
        half: int = self._config["steps"] // 2
        return 0 < self._step <= half

    @property
    def done(self) -> bool:
        """Whether it has trained for the last time."""
        return not self._thread.is_alive()

    def recovered_at(self, fault: float) -> float | None:
        """When it finished the first step for which the cloud has answered something after a fault; None if not yet."""
        return next((step.at for step in tuple(self.finished) if step.answered_at > fault), None)

    def disturb(self) -> None:
        """Go on with trainings that may be disturbed."""
        self._go.set()

    def last_round(self) -> None:
        """Begin no further training."""
        self._last = True

    def kill_edge(self) -> None:
        """SIGKILL to the edge's process; another one goes on from its last checkpoint."""
        with self._lock:
            if self._edge is not None:
                self._killed = True
                self._edge.kill()

    def __enter__(self) -> Tenant:
        self._folder.mkdir()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._last = self._closed = True
        self._go.set()
        while self._thread.is_alive():
            self.kill_edge()
            self._thread.join(0.1)

    def _run(self) -> None:
        try:
            with self._inside():
                self._train(CALM)
                self.calm, self.retries = True, 0
                self._go.wait()
                while not self._last:
                    name = f"round-{len(self.rounds) + 1}"
                    if self._train(name):
                        self.rounds.append(
                            compare_runs(self._config["steps"], self._folder / CALM, self._folder / name)
                        )
        except BaseException as error:  # noqa: BLE001  # raised again in the thread of the benchmark
            self.error = error

    def _train(self, name: str) -> bool:
        """Train to the end, with as many edges as that takes; False where it was ended before."""
        while not self._closed:
            if self._one_life({**self._config, "out": str(self._folder / name), "resume": True}):
                return True
        return False

    def _one_life(self, task: dict[str, Any]) -> bool:
        """Run one edge; True if it came to the training's end, False if it was killed."""
        retries = 0
        with Edge(task, self._folder / "edge.log") as edge:
            with self._lock:
                self._edge, self._killed = edge, False
            try:
                for moment in edge.moments():
                    retries = moment.retries
                    if moment.step > self._step:
                        now = time.monotonic()
                        if self._step:
                            self.steps.append((self._begun, now))
                            self._note_step()
                        self._begun = now
                    self._step = moment.step
                    if moment.phase == "idle":
                        self._answered = time.monotonic()
                with self._lock:
                    if self._killed:
                        return False
                    self._edge = None  # from here on it only ends
                edge.finish()
                self._note_step()
                return True
            finally:
                self.retries += retries
                self._step = 0
                with self._lock:
                    self._edge = None

    def _note_step(self) -> None:
        self.finished.append(Finished(time.monotonic(), self._answered))
