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
from pathlib import Path
from typing import Final

from isthmus.common.errors import ConfigError
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


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """What is measured.

    Attributes:
        model: As for `--model`.
        n: Tenants.
        tokens: Tokens of a tenant's step, on average over the tenants.
        edge_layers: The split plan.
        steps: Steps that count, of each tenant, over all its turns.
        threads: torch threads of the cloud; edges and single processes have one.
        batching: Whether the cloud computes calls of several tenants in one pass.
        counts: So many of the tenants by themselves are measured, too.
        cloud_options: Further options of `isthmus cloud serve`.
    """

    model: str
    n: int = 8
    tokens: int = 64
    edge_layers: str = "2:2"
    steps: int = 24
    threads: int = 2
    batching: bool = True
    counts: tuple[int, ...] = ()
    cloud_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens < 16 or self.n < 2:
            raise ConfigError(
                f"{self.n} tenants of {self.tokens} tokens say nothing about tenants: give at least 2 of 16"
            )

    @property
    def steps_in_turn(self) -> int:
        """Steps of each tenant in a turn."""
        return max(1, self.steps // TURNS)

    @property
    def steps_at_most(self) -> int:
        """More steps than any process is told to do: those of AdaLoRA's schedule."""
        of_singles = TURNS + 1 + (len(self.counts) + 2) * (TURNS // 2 + 1)
        of_tenants = 3 * TURNS + len(self.counts) * (TURNS // 2)
        return WARM_UP + self.steps_in_turn * max(of_singles, of_tenants) + 1

    def length(self, tenant: int) -> int:
        """Tokens of a step of a tenant."""
        return round(self.tokens * LENGTHS[tenant % len(LENGTHS)])


@dataclass(frozen=True, slots=True)
class Seen:
    """What a process tells: when its counted steps began and ended, and its processor time in them, in seconds."""

    moments: tuple[float, ...]
    cpu_s: float

    def done(self, since: float, until: float) -> float:
        """Steps between two moments, with the parts of those that lie across one."""
        return self._steps_at(until) - self._steps_at(since)

    def _steps_at(self, moment: float) -> float:
        for number, (begun, ended) in enumerate(zip(self.moments, self.moments[1:], strict=False)):
            if moment < ended:
                return number + max(0.0, moment - begun) / (ended - begun)
        return len(self.moments) - 1.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of processes that worked together for some steps.

    Attributes:
        seen: Of each.
        tokens: Of a step of each.
        memory: The most PSS that each had, in bytes.
        cloud_memory: The most PSS that the cloud's worker had; 0 without one.
    """

    seen: Sequence[Seen]
    tokens: Sequence[int]
    memory: Sequence[int] = ()
    cloud_memory: int = 0

    @property
    def steps(self) -> list[float]:
        """Steps that each has done while all were at work."""
        since = max(each.moments[0] for each in self.seen)
        until = min(each.moments[-1] for each in self.seen)
        return [each.done(since, until) for each in self.seen]

    @property
    def throughput(self) -> float:
        """Tokens per second of all together, while all were at work."""
        since = max(each.moments[0] for each in self.seen)
        until = min(each.moments[-1] for each in self.seen)
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


def p99(turns: Sequence[Turn], tenants: Sequence[int]) -> float:
    """The 99th percentile of these tenants' steps, in seconds."""
    seconds = sorted(
        after - before
        for turn in turns
        for tenant in tenants
        for before, after in zip(turn.seen[tenant].moments, turn.seen[tenant].moments[1:], strict=False)
    )
    return seconds[min(len(seconds) - 1, math.ceil(0.99 * len(seconds)) - 1)]


class Crowd:
    """Processes that have done their first steps and wait for their turn.

    Args:
        settings: What each does.
        folder: Of their files; made.
        cloud: Whose tenants they are; None for single processes.
        tenants: Their numbers.
        parts: Whether single processes have an edge's parts only, and not the whole model.
        precision: What they compute in.
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

        Raises:
            IsthmusError: A process failed.
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
        tokens = [self._settings.length(tenant) for tenant in who]
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


@contextlib.contextmanager
def cloud_of(settings: TenantSettings, folder: Path, dtype: str) -> Iterator[LocalCloud]:
    """A cloud in `folder`, which is made, that computes in a dtype."""
    folder.mkdir(parents=True)
    options = ["--edge-layers", settings.edge_layers, "--threads", str(settings.threads), "--dtype", dtype]
    options += ["--batching", "on" if settings.batching else "off", *settings.cloud_options]
    with LocalCloud(folder, settings.model, *options) as cloud:
        yield cloud


def _key(cloud: LocalCloud, tenant: int) -> Path:
    """The key of a tenant, enrolled when it is first asked for."""
    key = cloud.home.parent / f"tenant{tenant}" / "id_ed25519"
    if not key.exists():
        key.parent.mkdir(mode=0o700)
        cloud.enroll(f"tenant{tenant}", key, Quota(max_sessions=2 * FLOOD_SESSIONS))
    return key


def _process(
    settings: TenantSettings, folder: Path, cloud: LocalCloud | None, tenant: int, *, parts: bool, precision: str
) -> TaskProcess:
    texts = folder / f"{tenant}.jsonl"
    write_long_texts(texts, WARM_UP + settings.steps, settings.length(tenant))
    config = {
        "data": str(texts),
        "validation_split": 0.0,
        "out": str(folder / str(tenant)),
        "steps": settings.steps_at_most,
        "batch": 1,
        "max_length": settings.length(tenant),
        "learning_rate": 1e-3,
        "save_every": settings.steps_at_most,
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
    task = {"flood": cloud.connection, "key": str(_key(cloud, 0)), "tokens": settings.length(0)}
    with TaskProcess("the flood", MODULE, task, threads=1) as process:
        process.answer()
        yield process
