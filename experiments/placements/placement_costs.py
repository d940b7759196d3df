"""What a step of each mode costs, beside a single process with the same trainables: time, bytes, round trips, memory,
and whether the adapters are equal bit for bit.

Both are runs of `edge train`'s own trainer over the same batches, each in a process of its own, and take turns, a step
each; ratios are medians over the rounds. All sequences have one length, and an epoch has few steps, so that the modes
with a span cache are seen in later epochs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.training_config import load_config
from isthmus.edge.run_report import WireTotals
from isthmus.edge.split_run import train_over
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.process_memory import own_bytes
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve
from isthmus.experiments.harness.prose import write_long_texts
from isthmus.experiments.harness.single_process import StepWatch, parity_of, train_in_one_process
from isthmus.experiments.placements.placement_modes import SINGLE, Mode
from isthmus.training import run_checkpoint as checkpoints

EPOCH_STEPS = 3
"""Steps of an epoch. The first one is for warming up."""
_MODULE = "isthmus.experiments.placements.placement_costs"


@dataclass(frozen=True, slots=True)
class CostSettings:
    """What is measured.

    Attributes:
        shared: Fields of `TrainConfig` that all modes have: rank, taps and the like.
        dropout: In front of the adapters, in the modes that can have it.
        rounds: Steps that count, after an epoch of warming up.
        steps: Length that a run is planned for where a policy chooses among sites; only its first steps are made.
    """

    model: str
    edge_layers: str
    shared: dict[str, Any]
    dropout: float
    batch: int
    seq: int
    rounds: int
    steps: int
    threads: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a process: its seconds, what crossed the wire in it, and the process's peak memory until its end."""

    seconds: float
    spent: WireTotals
    peak: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a mode costs.

    Attributes:
        alone: The steps of the single process, one for each of `steps`.
        parity: `bitwise_equal` and `max_abs_diff` to the single process; both None where a policy chooses.
        shares: Of always-on's site traffic and adapter computation, over all steps, where a policy chooses.
    """

    steps: tuple[Step, ...]
    first_epoch: tuple[Step, ...]
    alone: tuple[Step, ...]
    parity: dict[str, Any]
    shares: dict[str, float]

    def per_step(self, name: str, *, first: bool = False) -> float:
        """A field of `WireTotals` per step, of the first epoch or of those after it."""
        steps = self.first_epoch if first else self.steps
        return statistics.mean(float(getattr(step.spent, name)) for step in steps)

    @property
    def ratio(self) -> float:
        """The time of a step over the single process's."""
        return statistics.median(
            ours.seconds / theirs.seconds for ours, theirs in zip(self.steps, self.alone, strict=True)
        )

    @property
    def seconds(self) -> float:
        """The median step's."""
        return statistics.median(step.seconds for step in self.steps)


def measure_cost(mode: Mode, settings: CostSettings, cloud: LocalCloud | None, folder: Path) -> Cost:
    """Measure a mode; see the module.

    Args:
        cloud: With the mode's plan; None for the single process.
    """
    folder.mkdir(parents=True)
    write_long_texts(folder / "texts.jsonl", EPOCH_STEPS * settings.batch, settings.seq)
    count = EPOCH_STEPS + settings.rounds
    theirs: list[Step] = []
    ours: list[Step] = theirs if cloud is None else []
    with ExitStack() as stack:
        turns = [(_start(stack, mode, settings, folder, cloud, count), ours)]
        if cloud is not None:
            turns.append((_start(stack, mode, settings, folder, None, count), theirs))
        for process, _ in turns:
            process.answer()  # it has its model
        for number in range(count):
            for process, steps in turns[:: 1 if number % 2 else -1]:
                made = process.ask("step")
                steps.append(Step(made["seconds"], WireTotals(**made["spent"]), made["peak"]))
        for process, steps in turns:
            if not (mode.chooses and steps is ours):
                process.ask("step")  # the last one, whose end nobody sees; and the run's
    return Cost(
        steps=tuple(ours[EPOCH_STEPS:]),
        first_epoch=tuple(ours[:EPOCH_STEPS]),
        alone=tuple(theirs[EPOCH_STEPS:]),
        parity=_parity(mode, folder),
        shares=site_shares(folder / "split") if mode.chooses else {},
    )


def _start(
    stack: ExitStack, mode: Mode, settings: CostSettings, folder: Path, cloud: LocalCloud | None, count: int
) -> TaskProcess:
    where = "alone" if cloud is None else "split"
    config = {
        "data": str(folder / "texts.jsonl"),
        "validation_split": 0.0,
        "out": str(folder / where),
        "steps": settings.steps if mode.chooses and cloud is not None else count + 1,
        "batch": settings.batch,
        "max_length": settings.seq,
        "learning_rate": 1e-3,
        "save_every": count,
        "threads": settings.threads,
        "dropout": settings.dropout if mode.drops_out else 0.0,
        **settings.shared,
        **(mode.alone if cloud is None else mode.options),
        "cloud": "-" if cloud is None else cloud.connection,
        "key": None if cloud is None else str(cloud.edge_key),
    }
    task = {
        "model": settings.model,
        "edge_layers": mode.edge_layers(settings.edge_layers),
        "config": config,
        "split": cloud is not None,
        "everywhere": mode.everywhere,
    }
    return stack.enter_context(TaskProcess(f"{mode.name}, {where}", _MODULE, task, threads=settings.threads))


def _parity(mode: Mode, folder: Path) -> dict[str, Any]:
    if mode.chooses or mode.name == SINGLE:
        return {"bitwise_equal": None, "max_abs_diff": None}
    found = parity_of(folder / "split", folder / "alone")
    return {
        "bitwise_equal": found["bitwise_equal"],
        "max_abs_diff": max(found["max_abs_loss_diff"], found["adapter_max_abs_diff"]),
    }


def site_shares(out: Path) -> dict[str, float]:
    """The shares of always-on's site traffic and adapter computation that a run had; empty where it saved nothing."""
    folder = checkpoints.latest(out)
    if folder is None:
        return {}
    accounting = checkpoints.load(folder).entries["observers"][0]["accounting"]
    return {name: accounting["spent"][name] / accounting["always_on"][name] for name in ("traffic", "computation")}


# Inside one of the processes ------------------------------------------------------------------------------------------


class Turns(StepWatch):
    """Makes a step when it is its turn: a `StepObserver` of the trainer that waits for a question before each."""

    def __init__(self, parent: Parent, totals: Callable[[], WireTotals] = WireTotals) -> None:
        self._parent, self._totals = parent, totals
        self._before = WireTotals()
        self._begun: float | None = None

    def before_step(self, step: int) -> None:
        """Report the last step, and wait."""
        self.report()
        self._parent.question()
        self._before, self._begun = self._totals(), time.perf_counter()

    def report(self) -> None:
        """Say what the step was that has just ended, or that there will be one."""
        made = None
        if self._begun is not None:
            seconds, spent = time.perf_counter() - self._begun, self._totals() - self._before
            made = {"seconds": seconds, "spent": asdict(spent), "peak": own_bytes("VmHWM")}
        self._parent.say(made)


def _main(parent: Parent) -> None:
    task = parent.task
    config = load_config(None, task["config"])
    if task["split"]:
        with open_link(config) as link:
            turns = Turns(parent, link.totals)
            train_over(link, config, [turns])
    else:
        turns = Turns(parent)
        everywhere = task["everywhere"]
        train_in_one_process(task["model"], task["edge_layers"], config, everywhere=everywhere, watchers=[turns])
    turns.report()


if __name__ == "__main__":
    serve(_main)
