"""Training runs over the cloud while something happens: how far they are, what they lost, and their adapters."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS
from isthmus.common.errors import IsthmusError, UnreachableError
from isthmus.edge.training.edge_steps import COSTS_FILE
from isthmus.experiments.harness.processes import isthmus, train_flags
from isthmus.experiments.rigs.cluster.net_machines import Machine

RUN_SECONDS: Final = 900.0
"""For a run, whatever happens in it."""
KEEPALIVE: Final = 1.0
"""Seconds: the fast setting of an edge."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that has ended.

    Attributes:
        adapter: SHA-256 (hex) of its weights; "" where it failed.
        repeated: calls that were made again.
        seconds: of each of its steps.
        failure: why it has ended before its last step; "" where it has not.
    """

    adapter: str
    repeated: int
    seconds: tuple[float, ...]
    failure: str = ""

    @property
    def usual(self) -> float:
        """Seconds of a usual step: the median of all."""
        return statistics.median(self.seconds)

    def lost_after(self, step: int) -> float:
        """Seconds by which the run ended later than it would have, had all steps behind a step been usual ones.

        It is the sum over these steps of what each took beyond a usual one. So several pauses add up, and slow steps
        until the run's end count as well; a single longest step would show neither. Steps that were faster than usual
        are counted too, or the sum would grow with the steps' spread. Of a run that failed it says nothing.
        """
        return max(0.0, sum(each - self.usual for each in self.seconds[step:]))


class EdgeRun:
    """`isthmus edge train` on a machine, in a process of its own. A context manager, which ends it.

    Args:
        machine: where it runs; None for this one, without namespaces.
        environment: of its process.
        out: the run's folder, new.
        options: the fields of `TrainConfig` beside `out`.
    """

    def __init__(self, machine: Machine | None, environment: Mapping[str, str], out: Path, options: Mapping[str, Any]):
        self._machine, self._out, self._log = machine, out, out.with_suffix(".txt")
        command = isthmus("edge", "train", *train_flags({**options, "out": out}), "--json")
        if machine is not None:
            self._process = machine.start(command, environment, self._log, stdout=subprocess.PIPE)
        else:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )

    def __enter__(self) -> EdgeRun:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            if self._machine is not None:
                self._machine.signal(self._process, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.communicate()

    def steps(self) -> int:
        """Optimizer steps that it has made."""
        costs = self._out / COSTS_FILE
        return costs.read_bytes().count(b"\n") if costs.exists() else 0

    def check_trains(self, when: str) -> None:
        """Check that it trains still, or has failed. Raises IsthmusError where it has made all steps by `when`."""
        if self._process.poll() == 0:
            raise IsthmusError(f"the edge had made all its steps when {when}: give it more --steps")

    def wait_for_step(self, step: int) -> None:
        """Wait until it has made so many steps.

        Raises:
            IsthmusError: it has ended before.
            UnreachableError: it takes too long.
        """
        deadline = time.monotonic() + RUN_SECONDS
        while self.steps() < step:
            if self._process.poll() is not None:
                raise IsthmusError(f"the edge ended after {self.steps()} steps: {self._last_line()}")
            if time.monotonic() > deadline:
                raise UnreachableError(f"the edge has made {self.steps()} steps in {RUN_SECONDS:.0f} s")
            time.sleep(0.02)

    def finish(self) -> Finished:
        """Wait for its end.

        Raises:
            IsthmusError: it has made no step.
            UnreachableError: it takes too long.
        """
        try:
            said, _ = self._process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            raise UnreachableError(f"the edge has made {self.steps()} steps in {RUN_SECONDS:.0f} s") from None
        seconds, why = tuple(self._seconds()), f"exit code {self._process.returncode}: {self._last_line()}"
        if self._process.returncode and not seconds:
            raise IsthmusError(f"the edge ended with {why}")
        if self._process.returncode:  # a call has got no answer
            return Finished("", 0, seconds, why)
        report = json.loads(said)
        return Finished(weights_digest(self._out), report["retries"], seconds)

    def _seconds(self) -> list[float]:
        path = self._out / COSTS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        return [float(json.loads(line)["seconds"]) for line in lines if line.endswith("}")]

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it says nothing"


def weights_digest(out: Path) -> str:
    """SHA-256 (hex) of the weights of the adapter in a run's folder."""
    return sha256((out / "adapter" / ADAPTER_WEIGHTS).read_bytes()).hexdigest()


def run_options(connection: str, key: Path, data: Path, steps: int, threads: int) -> dict[str, Any]:
    """The fields of a run's `TrainConfig`, without `out`: LoRA with dropout, whose random state matters."""
    return {
        "cloud": connection,
        "key": key,
        "data": data,
        "validation_split": 0.0,
        "steps": steps,
        "batch": 2,
        "max_length": 64,
        "learning_rate": 1e-3,
        "dropout": 0.1,
        "save_every": steps,
        "threads": threads,
        "keepalive": KEEPALIVE,
        "connect_timeout": 60.0,
    }
