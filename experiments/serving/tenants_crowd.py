"""Edges and single processes that work in turns, each in a process of its own.

Each has a PEFT method and a length of sequences of its own. In a turn all begin together, and what counts is the time
in which all of them are at work.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from isthmus.experiments.harness.bench_settings import TenantSettings
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.process_memory import forget_peak, peak_bytes, proportional_bytes
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.harness.prose import write_long_texts
from isthmus.experiments.serving.tenants_process import FLOOD_SESSIONS, MODULE, WARM_UP
from isthmus.protocol.enrolment import Quota

METHODS: Final = ("lora", "dora", "ia3", "vera", "adalora", "bottleneck", "lora", "dora")
LENGTHS: Final = (1.0, 0.75, 1.25, 1.0, 0.5, 1.5, 0.75, 1.25)
"""Of the tenants' sequences, over `TenantSettings.tokens`: 1 on average."""
TURNS: Final = 4


def steps_in_turn(settings: TenantSettings) -> int:
    """Steps of each tenant in a turn."""
    return max(1, settings.steps // TURNS)


def counts_of(settings: TenantSettings) -> list[int]:
    """How many tenants are measured by themselves too, for the figure: 1, 2, 4 … and all."""
    powers = (2**power for power in range(settings.n.bit_length()))
    return sorted({settings.n, *powers}) if settings.figure else []


def steps_at_most(settings: TenantSettings) -> int:
    """More steps than any process makes: those of AdaLoRA's schedule."""
    counts = len(counts_of(settings))
    of_singles = TURNS + 1 + (counts + 2) * (TURNS // 2 + 1)
    of_tenants = 3 * TURNS + counts * (TURNS // 2)
    return WARM_UP + steps_in_turn(settings) * max(of_singles, of_tenants) + 1


def length_of(settings: TenantSettings, tenant: int) -> int:
    """Tokens of a step of a tenant."""
    return round(settings.tokens * LENGTHS[tenant % len(LENGTHS)])


@dataclass(frozen=True, slots=True)
class Seen:
    """What a process reports: when its counted steps began and ended, and its processor time in them, in seconds."""

    moments: tuple[float, ...]
    cpu_s: float

    def done(self, since: float, until: float) -> float:
        """Steps between two moments, with the parts of those that lie across one."""
        return self._steps_at(until) - self._steps_at(since)

    def _steps_at(self, moment: float) -> float:
        for number, (begun, ended) in enumerate(pairwise(self.moments)):
            if moment < ended:
                return number + max(0.0, moment - begun) / (ended - begun)
        return len(self.moments) - 1.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of processes that worked together for some steps.

    Attributes:
        memory: The most PSS that each had, in bytes.
        cloud_memory: The most PSS that the cloud's worker had; 0 without one.
    """

    seen: Sequence[Seen]
    tokens: Sequence[int]
    memory: Sequence[int] = ()
    cloud_memory: int = 0

    @property
    def together(self) -> tuple[float, float]:
        """From when to when all were at work."""
        return max(each.moments[0] for each in self.seen), min(each.moments[-1] for each in self.seen)

    @property
    def steps(self) -> list[float]:
        """Steps that each has done while all were at work."""
        return [each.done(*self.together) for each in self.seen]

    @property
    def throughput(self) -> float:
        """Tokens per second of all together, while all were at work."""
        since, until = self.together
        return sum(n * tokens for n, tokens in zip(self.steps, self.tokens, strict=True)) / (until - since)

    @property
    def cpu_per_step(self) -> float:
        """Processor seconds of one step of each."""
        return sum(each.cpu_s / (len(each.moments) - 1) for each in self.seen)


@dataclass(frozen=True, slots=True)
class Beside:
    """A turn of tenants between two of single processes."""

    before: Turn
    tenants: Turn
    after: Turn

    @property
    def single(self) -> float:
        """Tokens per second of the single processes."""
        return statistics.mean((self.before.throughput, self.after.throughput))

    @property
    def ratio(self) -> float:
        """Tokens per second of the tenants over those of the single processes."""
        return self.tenants.throughput / self.single


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of the others do not exceed; None of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def p99(turns: Sequence[Turn], tenants: Sequence[int]) -> float:
    """The 99th percentile of these tenants' steps, in seconds."""
    moments = [turn.seen[tenant].moments for turn in turns for tenant in tenants]
    return percentile([after - before for each in moments for before, after in pairwise(each)], 0.99) or math.nan


class Crowd:
    """Processes that have done their first steps and wait for their turn.

    Args:
        cloud: Whose tenants they are; None for single processes.
        parts: Whether single processes have an edge's parts only, and not the whole model.
    """

    def __init__(
        self,
        settings: TenantSettings,
        folder: Path,
        cloud: LocalCloud | None,
        tenants: Sequence[int],
        *,
        parts: bool = False,
        precision: str = "fp32",
    ) -> None:
        folder.mkdir(parents=True)
        self._settings, self._cloud = settings, cloud
        with ExitStack() as stack:
            self._processes = {
                tenant: stack.enter_context(_process(settings, folder, cloud, tenant, parts=parts, precision=precision))
                for tenant in tenants
            }
            for process in self._processes.values():
                process.answer()  # it is warm
            self._stack = stack.pop_all()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if failure is None:
                for process in self._processes.values():
                    process.send("end")
                for process in self._processes.values():
                    process.answer()

    def work(self, steps: int, tenants: Sequence[int] | None = None) -> Turn:
        """Let all take so many steps, or some of them, and look at the memory that it takes.

        Raises IsthmusError where a process failed.
        """
        who = list(self._processes) if tenants is None else tenants
        worker = None if self._cloud is None else self._cloud.status()["pid"]
        looked_at = [self._processes[tenant].pid for tenant in who] + ([] if worker is None else [worker])
        for pid in looked_at:
            forget_peak(pid)
        for tenant in who:
            self._processes[tenant].send(steps)
        seen = [Seen(**self._processes[tenant].answer()) for tenant in who]
        memory = [peak_bytes(pid) for pid in looked_at]
        tokens = [length_of(self._settings, tenant) for tenant in who]
        return Turn(seen, tokens, memory[: len(who)], 0 if worker is None else memory[-1])

    @property
    def memory(self) -> list[int]:
        """PSS of each now, in bytes."""
        return [proportional_bytes(process.pid) for process in self._processes.values()]


def in_turns(
    singles: Crowd,
    crowd: Crowd,
    turns: int,
    steps: int,
    tenants: Sequence[int] | None = None,
    between: Callable[[], None] = lambda: None,
) -> list[Beside]:
    """Let tenants work in so many turns, and single processes before, between and after them."""
    before, done = singles.work(steps, tenants), []
    for _ in range(turns):
        between()
        of_tenants = crowd.work(steps, tenants)
        after = singles.work(steps, tenants)
        done.append(Beside(before, of_tenants, after))
        before = after
    return done


def cloud_of(settings: TenantSettings, folder: Path, dtype: str) -> LocalCloud:
    """A cloud in `folder`, which is made, that computes in a dtype; a context manager."""
    folder.mkdir(parents=True)
    options = ["--edge-layers", settings.edge_layers, "--threads", str(settings.threads), "--dtype", dtype]
    options += ["--batching", settings.batching, *settings.cloud_options]
    return LocalCloud(folder, settings.model, *options)


def _key(cloud: LocalCloud, tenant: int) -> Path:
    """The key of a tenant, enrolled when it is first asked for."""
    key = cloud.home.parent / f"tenant{tenant}" / "id_ed25519"
    if not key.exists():
        cloud.enroll(f"tenant{tenant}", key, Quota(max_sessions=2 * FLOOD_SESSIONS))
    return key


def _process(
    settings: TenantSettings, folder: Path, cloud: LocalCloud | None, tenant: int, *, parts: bool, precision: str
) -> TaskProcess:
    texts = folder / f"{tenant}.jsonl"
    write_long_texts(texts, WARM_UP + settings.steps, length_of(settings, tenant))
    config = {
        "data": str(texts),
        "validation_split": 0.0,
        "out": str(folder / str(tenant)),
        "steps": steps_at_most(settings),
        "batch": 1,
        "max_length": length_of(settings, tenant),
        "learning_rate": 1e-3,
        "save_every": steps_at_most(settings),
        "method": METHODS[tenant % len(METHODS)],
        "precision": precision,
        "seed": tenant,
        "threads": 1,
        "cloud": "-" if cloud is None else cloud.connection,
        "key": None if cloud is None else str(_key(cloud, tenant)),
    }
    task = {"model": settings.model, "edge_layers": settings.edge_layers, "parts": parts, "config": config}
    return TaskProcess(f"tenant {tenant}", MODULE, task, threads=1)


@contextlib.contextmanager
def flood_of(settings: TenantSettings, cloud: LocalCloud) -> Iterator[TaskProcess]:
    """A tenant with ten sessions in a process of its own; each wants computing all the time, from `pour` to `rest`."""
    task = {"flood": cloud.connection, "key": str(_key(cloud, 0)), "tokens": length_of(settings, 0)}
    with TaskProcess("the flood", MODULE, task, threads=1) as process:
        process.answer()
        yield process
