"""Many tenants on one backbone, beside as many single processes that time-share the same cores.

Every tenant is an edge in a process of its own, with a PEFT method and a length of sequences of its own, and so is
every single process. A machine's speed drifts within minutes, so they work in turns, a few steps each: single
processes, tenants, single processes and so on, and a ratio is of what is next to each other. In a turn all begin
together, and what counts is the time in which all of them are at work. The best possible gain is
`1 / (e + (1 - e) / b)`: of all work the share `e` is the edges' and is done once for each tenant; the rest is the
span's, which a pass over all tenants' calls does in `1 / b` of the time. Both are measured between the turns, in
seconds of a processor and with one torch thread, which is what the single processes have: with more, small products by
themselves take longer, and `b` would be larger than what there is to gain over the single processes.

python -m isthmus.experiments.tenants_bench '{…}' is one of the processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from isthmus.backbone.errors import ConfigError, IsthmusError
from isthmus.backbone.figures import plotting, save_figure
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.site_host import SiteHost
from isthmus.backbone.sources import resolve
from isthmus.backbone.span import SpanInput, load_span
from isthmus.cloud.executor import BackwardCall, Executor
from isthmus.edge.config import load_config
from isthmus.edge.link import connect
from isthmus.edge.run import train_over
from isthmus.edge.strip import open_link
from isthmus.experiments.harness import LocalCloud, stderr_progress
from isthmus.experiments.prose import write_long_texts
from isthmus.experiments.single import train_in_one_process
from isthmus.experiments.turns import StepWatch, TurnProcess
from isthmus.protocol.enrolment import Quota

METHODS: Final = ("lora", "dora", "ia3", "vera", "adalora", "bottleneck", "lora", "dora")
LENGTHS: Final = (1.0, 0.75, 1.25, 1.0, 0.5, 1.5, 0.75, 1.25)
"""Of the tenants' sequences, over `TenantSettings.tokens`: 1 on average."""
WARM_UP = 2
ENDLESS = 10_000
"""Steps that a process would take, were it not told that it is enough."""
TURNS = 4
FLOOD_SESSIONS = 10
GAIN_ROUNDS = 2
"""Of each turn."""
_MODULE = "isthmus.experiments.tenants_bench"


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
    """

    model: str
    n: int = 8
    tokens: int = 64
    edge_layers: str = "2:2"
    steps: int = 24
    threads: int = 2
    batching: bool = True

    def __post_init__(self) -> None:
        if self.tokens < 16 or self.n < 2:
            raise ConfigError(
                f"{self.n} tenants of {self.tokens} tokens say nothing about tenants: give at least 2 of 16"
            )

    @property
    def steps_in_turn(self) -> int:
        """Steps of each tenant in a turn."""
        return max(1, self.steps // TURNS)

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
        cloud_memory: The most PSS that the cloud's worker had; 0 without one.
    """

    seen: Sequence[Seen]
    tokens: Sequence[int]
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
    """

    def __init__(
        self, settings: TenantSettings, folder: Path, cloud: LocalCloud | None, tenants: Sequence[int]
    ) -> None:
        folder.mkdir(parents=True)
        self._settings, self._cloud = settings, cloud
        with ExitStack() as stack:
            self._processes = {
                tenant: stack.enter_context(_process(settings, folder, cloud, tenant)) for tenant in tenants
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
                    process.tell("end")
                for process in self._processes.values():
                    process.answer()

    def work(self, steps: int, tenants: Sequence[int] | None = None) -> Turn:
        """Let all take so many steps, or some of them, and look at what the cloud needs for it.

        Raises:
            IsthmusError: A process failed.
        """
        who = list(self._processes) if tenants is None else tenants
        worker = None if self._cloud is None else self._cloud.status()["pid"]
        if worker is not None:
            forget_peak(worker)
        for tenant in who:
            self._processes[tenant].tell(str(steps))
        seen = [Seen(**json.loads(self._processes[tenant].answer())) for tenant in who]
        return Turn(
            seen, [self._settings.length(tenant) for tenant in who], 0 if worker is None else peak_bytes(worker)
        )

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


def run_tenants(settings: TenantSettings, folder: Path, counts: Sequence[int] = ()) -> dict[str, Any]:
    """Measure; see the module.

    Args:
        settings: What is measured.
        folder: Of all files.
        counts: So many of the tenants by themselves are measured, too.

    Returns:
        `throughput_ratio`: Tokens per second of all edges over those of as many single processes, the median of the
            turns, whose ratios are `turns`.
        `throughput_bound`: What is possible, of `edge_share` and `span_batching_gain`.
        `throughput_ratio_bf16_cloud`: The same ratio where the cloud computes in bf16.
        `cloud_growth_share`: What the cloud's worker has grown by from one tenant to all, at most and at work, over the
            span's bytes.
        `backbone_copies`: 1, and one more for each whole span that it has grown by.
        `memory_ratio`: PSS of the cloud and all edges over that of the single processes, while all of them are there.
        `jain`: Jain's index of the steps that each tenant has done.
        `flood_p99_ratio`: The 99th percentile of the others' steps while one tenant floods with ten sessions that
            want computing all the time, over the same without.
        `max_loss_diff`: The largest relative difference of a loss from the single process's.
        `growth`: For each of `counts` in `n`, tokens per second of so many `tenants` and of as many `single` processes,
            and their `ratio`. Only where there are `counts`.

    Raises:
        IsthmusError: A process failed.
    """
    tenants = range(settings.n)
    settings = replace(settings, model=str(resolve(settings.model).folder))
    steps = settings.steps_in_turn
    gain, growth = SpanGain(settings), []
    with (
        stderr_progress("phases", 6 + len(counts)) as advance,
        Crowd(settings, folder / "alone", None, tenants) as singles,
    ):
        advance()
        with _cloud(settings, folder / "fp32", "fp32") as cloud:
            with Crowd(settings, folder / "first", cloud, [max(tenants, key=settings.length)]) as lone:
                first = lone.work(settings.steps)
            advance()
            with Crowd(settings, folder / "together", cloud, tenants) as crowd:
                advance()
                done = in_turns(singles, crowd, TURNS, steps, between=gain.measure)
                calls_per_pass = cloud.status()["calls_per_pass"]
                memory, single_memory = crowd.memory, singles.memory
                advance()
                for n in counts:
                    growth.append(_growth(n, in_turns(singles, crowd, TURNS // 2, steps, range(n))))
                    advance()
                calm, flooded = [], []
                with _flood(settings, cloud) as flood:
                    for _ in range(TURNS):
                        flood.ask("pour")
                        flooded.append(crowd.work(steps, tenants[1:]))
                        flood.ask("rest")
                        calm.append(crowd.work(steps))
                advance()
        with (
            _cloud(settings, folder / "bf16", "bf16") as cloud,
            Crowd(settings, folder / "fast", cloud, tenants) as crowd,
        ):
            fast = in_turns(singles, crowd, TURNS // 2, steps)
        advance()
    edges_cpu = statistics.mean(each.tenants.cpu_per_step for each in done)
    share = edges_cpu / (edges_cpu + gain.apart)
    cloud_memory = max(each.tenants.cloud_memory for each in done)
    grown = (cloud_memory - first.cloud_memory) / gain.span_bytes
    bound = 1 / (share + (1 - share) / gain.gain)
    ratio = statistics.median(each.ratio for each in done)
    return {
        "throughput_ratio": ratio,
        "throughput_bound": bound,
        "throughput_over_bound": ratio / bound,
        "throughput_ratio_bf16_cloud": statistics.median(each.ratio for each in fast),
        "edge_share": share,
        "span_batching_gain": gain.gain,
        "calls_per_pass": calls_per_pass,
        "cloud_growth_share": grown,
        "backbone_copies": 1 + max(0, math.floor(grown)),
        "memory_ratio": (cloud_memory + sum(memory)) / sum(single_memory),
        "cloud_bytes": cloud_memory,
        "edge_bytes": statistics.mean(memory),
        "single_bytes": statistics.mean(single_memory),
        "jain": jain([sum(of_one) for of_one in zip(*(each.tenants.steps for each in done), strict=True)]),
        "flood_p99_ratio": p99(flooded, range(settings.n - 1)) / p99(calm, tenants[1:]),
        "max_loss_diff": max(
            loss_difference(folder / "together" / str(tenant), folder / "alone" / str(tenant), WARM_UP + TURNS * steps)
            for tenant in tenants
        ),
        "turns": [each.ratio for each in done],
        "tokens_per_s": statistics.median(each.tenants.throughput for each in done),
        "single_tokens_per_s": statistics.median(each.single for each in done),
        **({"growth": growth} if growth else {}),
        **{name: value for name, value in asdict(settings).items() if name != "model"},
    }


def _growth(n: int, turns: Sequence[Beside]) -> dict[str, float]:
    return {
        "n": n,
        "tenants": statistics.mean(each.tenants.throughput for each in turns),
        "single": statistics.mean(each.single for each in turns),
        "ratio": statistics.mean(each.ratio for each in turns),
    }


def draw_growth(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the `growth` that `run_tenants` returns.

    Raises:
        ConfigError: The package matplotlib is missing.
        DiskError: The disk is full or cannot be written.
    """
    figure, axes = plotting().subplots(figsize=(7, 4.5), dpi=144)
    counts = [row["n"] for row in rows]
    axes.plot(counts, [row["tenants"] for row in rows], marker="o", label="edges on one cloud")
    axes.plot(counts, [row["single"] for row in rows], marker="s", label="single processes")
    axes.set(xlabel="tenants", ylabel="tokens per second, all together", xticks=counts)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness (Jain, Chiu and Hawe 1984): 1 where all are equal, 1/n where one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def loss_difference(ours: Path, theirs: Path, steps: int) -> float:
    """The largest relative difference of two runs' losses in their first steps.

    Raises:
        IsthmusError: One of them has come less far.
    """
    pairs = zip(_losses(ours, steps), _losses(theirs, steps), strict=True)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def _losses(run: Path, steps: int) -> list[float]:
    losses = [json.loads(line)["loss"] for line in (run / "losses.jsonl").read_text().splitlines()[:steps]]
    if len(losses) < steps:
        raise IsthmusError(f"the run in {run} has {len(losses)} losses, and {steps} are to be compared")
    return losses


class SpanGain:
    """What a pass over all tenants' calls gains, with one thread and in seconds of a processor."""

    def __init__(self, settings: TenantSettings) -> None:
        torch.set_num_threads(1)
        checkpoint = resolve(settings.model)
        plan = SplitPlan.parse(settings.edge_layers, checkpoint.config.num_hidden_layers)
        span = load_span(checkpoint, plan)
        self.span_bytes = sum(each.numel() * each.element_size() for each in (*span.parameters(), *span.buffers()))
        self._executor = Executor(SiteHost(span), torch.float32, 1 << 40)
        self._calls = {
            (b"", tenant): SpanInput(torch.randn(1, settings.length(tenant), span.hidden_size))
            for tenant in range(settings.n)
        }
        self._gradients = [BackwardCall(key, torch.randn_like(given.hidden)) for key, given in self._calls.items()]
        self._seconds: dict[Callable[[], None], list[float]] = {self._apart: [], self._together: []}
        for way in self._seconds:  # for warming up
            way()

    def measure(self) -> None:
        """Compute everything in passes of one call and in one pass, in turns."""
        for _ in range(GAIN_ROUNDS):
            for way, seconds in self._seconds.items():
                start = time.process_time()
                way()
                seconds.append(time.process_time() - start)

    @property
    def apart(self) -> float:
        """Seconds of forward and backward of all, each in a pass of its own."""
        return statistics.median(self._seconds[self._apart])

    @property
    def gain(self) -> float:
        """That over the seconds of one pass over all."""
        return self.apart / statistics.median(self._seconds[self._together])

    def _apart(self) -> None:
        for (key, given), gradient in zip(self._calls.items(), self._gradients, strict=True):
            self._executor.forward(*key, given, keep=True)
            self._executor.backward(*key, gradient.gradient)

    def _together(self) -> None:
        self._executor.forward_together(self._calls, keep=True)
        self._executor.backward_together(self._gradients)


@contextlib.contextmanager
def _cloud(settings: TenantSettings, folder: Path, dtype: str) -> Iterator[LocalCloud]:
    folder.mkdir(parents=True)
    options = ["--edge-layers", settings.edge_layers, "--threads", str(settings.threads), "--dtype", dtype]
    if not settings.batching:
        options.append("--no-batching")
    with LocalCloud(folder, settings.model, *options) as cloud:
        yield cloud


def _key(cloud: LocalCloud, tenant: int) -> Path:
    """The key of a tenant, enrolled when it is first asked for."""
    key = cloud.home.parent / f"tenant{tenant}" / "id_ed25519"
    if not key.exists():
        key.parent.mkdir(mode=0o700)
        cloud.enroll(f"tenant{tenant}", key, Quota(max_sessions=2 * FLOOD_SESSIONS))
    return key


def _process(settings: TenantSettings, folder: Path, cloud: LocalCloud | None, tenant: int) -> TurnProcess:
    texts = folder / f"{tenant}.jsonl"
    write_long_texts(texts, WARM_UP + settings.steps, settings.length(tenant))
    config = {
        "data": str(texts),
        "validation_split": 0.0,
        "out": str(folder / str(tenant)),
        "steps": ENDLESS,
        "batch": 1,
        "max_length": settings.length(tenant),
        "learning_rate": 1e-3,
        "save_every": ENDLESS,
        "method": METHODS[tenant % len(METHODS)],
        "seed": tenant,
        "threads": 1,
        "cloud": "-" if cloud is None else cloud.connection,
        "key": None if cloud is None else str(_key(cloud, tenant)),
    }
    task = {"model": settings.model, "edge_layers": settings.edge_layers, "config": config}
    return TurnProcess(f"tenant {tenant}", _MODULE, task, 1)


@contextlib.contextmanager
def _flood(settings: TenantSettings, cloud: LocalCloud) -> Iterator[TurnProcess]:
    """A tenant with ten sessions in a process of its own; each wants computing all the time, from `pour` to `rest`."""
    task = {"flood": cloud.connection, "key": str(_key(cloud, 0)), "tokens": settings.length(0)}
    with TurnProcess("the flood", _MODULE, task, 1) as process:
        process.answer()
        yield process


def proportional_bytes(pid: int) -> int:
    """PSS of a process: its own memory, and its part of what it shares with others.

    Raises:
        IsthmusError: This system does not tell.
    """
    return _told(pid, "smaps_rollup", "Pss")


def forget_peak(pid: int) -> None:
    """Let the most that a process has had in memory count from now on.

    Raises:
        IsthmusError: This system does not let us.
    """
    path = Path(f"/proc/{pid}/clear_refs")
    try:
        path.write_text("5")
    except OSError as error:
        raise IsthmusError(f"cannot write {path} ({error.strerror}), which the figures of memory need") from None


def peak_bytes(pid: int) -> int:
    """The most PSS that a process has had since `forget_peak`.

    The kernel keeps the peak of the resident size, at no cost; looking at PSS again and again would take the time of
    which the figures are. What is shared with others is taken to be the same at the peak as it is now.

    Raises:
        IsthmusError: This system does not tell.
    """
    return proportional_bytes(pid) + _told(pid, "status", "VmHWM") - _told(pid, "status", "VmRSS")


def _told(pid: int, file: str, name: str) -> int:
    """A size in bytes from a file of /proc."""
    path = Path(f"/proc/{pid}/{file}")
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise IsthmusError(f"cannot read {path} ({error.strerror}), which the figures of memory need") from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# Inside one of the processes ------------------------------------------------------------------------------------------


class Enough(Exception):  # noqa: N818 - nothing went wrong
    """There are no further turns."""


class Moments(StepWatch):
    """Notes when steps begin: a `isthmus.edge.trainer.StepObserver` that waits between turns for what to do next."""

    def __init__(self) -> None:
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
            self._wait(json.dumps({"moments": self._moments, "cpu_s": time.process_time() - self._cpu}))
            self._moments = [time.monotonic()]

    def _wait(self, text: str) -> None:
        print(text, flush=True)
        told = sys.stdin.readline().strip()
        if not told.isdigit():
            raise Enough
        self._steps, self._cpu = int(told), time.process_time()


def _main(task: Mapping[str, Any]) -> None:
    if "flood" in task:
        _pour(task)
        return
    config = load_config(None, task["config"])
    with contextlib.suppress(Enough):
        if config.key is None:
            train_in_one_process(task["model"], task["edge_layers"], config, watchers=[Moments()])
        else:
            with open_link(config) as link:
                train_over(link, config, [Moments()])
    print("done", flush=True)


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
                link.backward_span(kept, _gradient(hidden), hidden, None, None)


def _pour(task: Mapping[str, Any]) -> None:
    flood = _Flood(task)
    flood.turn(pouring=False)
    print("connected", flush=True)
    for line in sys.stdin:
        flood.turn(pouring=line.strip() == "pour")
        print("done", flush=True)
    os._exit(0)  # the sessions never end by themselves


def _gradient(hidden: Tensor) -> Tensor:
    return torch.ones_like(hidden)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
