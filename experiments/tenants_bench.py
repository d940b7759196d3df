"""Many tenants on one backbone, beside as many single processes that time-share the same cores.

Every tenant is an edge in a process of its own, with a PEFT method and a length of sequences of its own. All begin
their counted steps together, and what counts is the time in which all of them are at work. The best possible gain is
`1 / (e + (1 - e) / b)`: of all work the share `e` is the edges' and is done once for each tenant; the rest is the
span's, which a pass over all tenants' calls does in `1 / b` of the time. Both are measured in the same run, in seconds
of a processor and with one torch thread, which is what the single processes have: with more, small products by
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
FLOOD_SESSIONS = 10
GAIN_ROUNDS = 5
_MODULE = "isthmus.experiments.tenants_bench"


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """What is measured.

    Attributes:
        model: As for `--model`.
        n: Tenants.
        tokens: Tokens of a tenant's step, on average over the tenants.
        edge_layers: The split plan.
        steps: Steps that count, of each tenant.
        threads: torch threads of the cloud; edges and single processes have one.
        batching: Whether the cloud computes calls of several tenants in one pass.
    """

    model: str
    n: int = 8
    tokens: int = 64
    edge_layers: str = "2:2"
    steps: int = 20
    threads: int = 2
    batching: bool = True

    def __post_init__(self) -> None:
        if self.tokens < 16 or self.n < 2:
            raise ConfigError(
                f"{self.n} tenants of {self.tokens} tokens say nothing about tenants: give at least 2 of 16"
            )

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
class Crowd:
    """What came of processes that worked together.

    Attributes:
        seen: Of each.
        tokens: Of a step of each.
        memory: PSS of each at the end, in bytes, all of them there.
        cloud_memory: The most PSS that the cloud's worker had in the counted steps; 0 without one.
    """

    seen: Sequence[Seen]
    tokens: Sequence[int]
    memory: Sequence[int]
    cloud_memory: int

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
    def cpu_per_round(self) -> float:
        """Processor seconds of one step of each."""
        return sum(each.cpu_s / (len(each.moments) - 1) for each in self.seen)

    def p99(self, tenants: Sequence[int]) -> float:
        """The 99th percentile of these tenants' steps, in seconds."""
        seconds = sorted(
            after - before
            for tenant in tenants
            for before, after in zip(self.seen[tenant].moments, self.seen[tenant].moments[1:], strict=False)
        )
        return seconds[min(len(seconds) - 1, math.ceil(0.99 * len(seconds)) - 1)]


def run_tenants(settings: TenantSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `throughput_ratio`: Tokens per second of all edges over those of as many single processes, before and after.
        `throughput_bound`: What is possible, of `edge_share` and `span_batching_gain`.
        `throughput_ratio_bf16_cloud`: The same ratio where the cloud computes in bf16.
        `cloud_growth_share`: What the cloud's worker has grown by from one tenant to all, at most and at work, over the
            span's bytes.
        `backbone_copies`: 1, and one more for each whole span that it has grown by.
        `memory_ratio`: PSS of the cloud and all edges over that of the single processes.
        `jain`: Jain's index of the steps that each tenant has done.
        `flood_p99_ratio`: The 99th percentile of the others' steps while one tenant floods with ten sessions that
            want computing all the time, over the same without.
        `max_loss_diff`: The largest relative difference of a loss from the single process's.

    Raises:
        IsthmusError: A process failed.
    """
    tenants = range(settings.n)
    model = str(resolve(settings.model).folder)
    settings = replace(settings, model=model)
    with stderr_progress("phases", 7) as advance:
        gain, span_cpu, span_bytes = span_gain(settings)
        advance()
        alone = _crowd(settings, folder / "alone", None, tenants)
        advance()
        with _cloud(settings, folder / "fp32", "fp32") as cloud:
            first = _crowd(settings, folder / "first", cloud, [max(tenants, key=settings.length)])
            advance()
            together = _crowd(settings, folder / "together", cloud, tenants)
            calls_per_pass = cloud.status()["calls_per_pass"]
            advance()
            again = _crowd(settings, folder / "again", None, tenants)  # a machine's speed drifts in minutes
            advance()
            with _flood(settings, cloud, folder):
                flooded = _crowd(settings, folder / "flooded", cloud, tenants[1:])
            advance()
        with _cloud(settings, folder / "bf16", "bf16") as cloud:
            fast = _crowd(settings, folder / "fast", cloud, tenants)
            advance()
    share = together.cpu_per_round / (together.cpu_per_round + span_cpu)
    growth = (together.cloud_memory - first.cloud_memory) / span_bytes
    bound = 1 / (share + (1 - share) / gain)
    single = statistics.mean((alone.throughput, again.throughput))
    ratio = together.throughput / single
    return {
        "throughput_ratio": ratio,
        "throughput_bound": bound,
        "throughput_over_bound": ratio / bound,
        "throughput_ratio_bf16_cloud": fast.throughput / single,
        "edge_share": share,
        "span_batching_gain": gain,
        "calls_per_pass": calls_per_pass,
        "cloud_growth_share": growth,
        "backbone_copies": 1 + max(0, math.floor(growth)),
        "memory_ratio": (together.cloud_memory + sum(together.memory)) / sum(alone.memory),
        "cloud_bytes": together.cloud_memory,
        "edge_bytes": statistics.mean(together.memory),
        "single_bytes": statistics.mean(alone.memory),
        "jain": jain(together.steps),
        "flood_p99_ratio": flooded.p99(range(settings.n - 1)) / together.p99(tenants[1:]),
        "max_loss_diff": max(
            loss_difference(folder / "together" / str(tenant), folder / "alone" / str(tenant)) for tenant in tenants
        ),
        "tokens_per_s": together.throughput,
        "single_tokens_per_s": single,
        **{name: value for name, value in asdict(settings).items() if name != "model"},
    }


def run_growth(settings: TenantSettings, counts: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Tokens per second of so many tenants, and of as many single processes: `n`, `tenants` and `single` each.

    A machine's speed drifts in minutes, so the single processes run before and after.
    """
    settings = replace(settings, model=str(resolve(settings.model).folder))
    rows = []
    with stderr_progress("tenants", 3 * len(counts)) as advance, _cloud(settings, folder / "cloud", "fp32") as cloud:
        for n in counts:
            throughput = []
            for turn, over in enumerate((None, cloud, None)):
                throughput.append(_crowd(settings, folder / f"{n}-{turn}", over, range(n)).throughput)
                advance()
            before, tenants, after = throughput
            rows.append({"n": n, "tenants": tenants, "single": statistics.mean((before, after))})
    return rows


def draw_growth(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what `run_growth` returns.

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


def loss_difference(ours: Path, theirs: Path) -> float:
    """The largest relative difference of two runs' losses, step by step."""
    pairs = zip(_losses(ours), _losses(theirs), strict=True)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "losses.jsonl").read_text().splitlines()]


def span_gain(settings: TenantSettings) -> tuple[float, float, int]:
    """What a pass over all tenants' calls gains.

    Returns:
        The time of forward and backward of all, each in a pass of its own, over that in one pass; the processor seconds
        of the former; the bytes of the span's weights. Times are the least of several: what disturbs only adds to them.
    """
    torch.set_num_threads(1)
    checkpoint = resolve(settings.model)
    plan = SplitPlan.parse(settings.edge_layers, checkpoint.config.num_hidden_layers)
    span = load_span(checkpoint, plan)
    executor = Executor(SiteHost(span), torch.float32, 1 << 40)
    calls = {
        (b"", tenant): SpanInput(torch.randn(1, settings.length(tenant), span.hidden_size))
        for tenant in range(settings.n)
    }
    gradients = [BackwardCall(key, torch.randn_like(given.hidden)) for key, given in calls.items()]

    def apart() -> None:
        for (key, given), gradient in zip(calls.items(), gradients, strict=True):
            executor.forward(*key, given, keep=True)
            executor.backward(*key, gradient.gradient)

    def together() -> None:
        executor.forward_together(calls, keep=True)
        executor.backward_together(gradients)

    seconds: dict[Callable[[], None], list[float]] = {apart: [], together: []}
    for turn in range(GAIN_ROUNDS + 1):
        for way in (apart, together):
            start = time.process_time()
            way()
            if turn:  # the first one is for warming up
                seconds[way].append(time.process_time() - start)
    weights = sum(each.numel() * each.element_size() for each in (*span.parameters(), *span.buffers()))
    cpu = min(seconds[apart])
    return cpu / min(seconds[together]), cpu, weights


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


def _crowd(settings: TenantSettings, folder: Path, cloud: LocalCloud | None, tenants: Sequence[int]) -> Crowd:
    """Let tenants work together; without a cloud, each in a single process."""
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        processes = [stack.enter_context(_process(settings, folder, cloud, tenant)) for tenant in tenants]
        for process in processes:
            process.answer()  # it is warm
        worker = None if cloud is None else cloud.status()["pid"]
        if worker is not None:
            forget_peak(worker)
        for process in processes:
            process.tell("begin")
        seen = [Seen(**json.loads(process.answer())) for process in processes]
        memory = [proportional_bytes(process.pid) for process in processes]
        most = 0 if worker is None else peak_bytes(worker)
        for process in processes:
            process.tell("end")
        for process in processes:
            process.answer()
    return Crowd(seen, [settings.length(tenant) for tenant in tenants], memory, most)


def _process(settings: TenantSettings, folder: Path, cloud: LocalCloud | None, tenant: int) -> TurnProcess:
    texts = folder / f"{tenant}.jsonl"
    write_long_texts(texts, WARM_UP + settings.steps + 1, settings.length(tenant))
    config = {
        "data": str(texts),
        "validation_split": 0.0,
        "out": str(folder / str(tenant)),
        "steps": WARM_UP + settings.steps + 1,
        "batch": 1,
        "max_length": settings.length(tenant),
        "learning_rate": 1e-3,
        "save_every": 10 * settings.steps,
        "method": METHODS[tenant % len(METHODS)],
        "seed": tenant,
        "threads": 1,
        "cloud": "-" if cloud is None else cloud.connection,
        "key": None if cloud is None else str(_key(cloud, tenant)),
    }
    task = {"model": settings.model, "edge_layers": settings.edge_layers, "config": config, "steps": settings.steps}
    return TurnProcess(f"tenant {tenant}", _MODULE, task, 1)


@contextlib.contextmanager
def _flood(settings: TenantSettings, cloud: LocalCloud, folder: Path) -> Iterator[None]:
    """A tenant with ten sessions, of which each wants computing all the time, in a process of its own."""
    task = {"flood": cloud.connection, "key": str(_key(cloud, 0)), "tokens": settings.length(0)}
    with TurnProcess("the flood", _MODULE, task, 1) as process:
        process.answer()
        yield


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


class Moments(StepWatch):
    """Notes when steps begin: a `isthmus.edge.trainer.StepObserver` that waits for a line before those that count."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._moments: list[float] = []
        self._made = 0
        self._cpu = 0.0

    def before_step(self, step: int) -> None:
        """Note it; wait before the first step that counts, and after the last."""
        self._made += 1
        if self._made == WARM_UP + 1:
            self._say("warm")
            self._cpu = time.process_time()
        if self._made > WARM_UP:
            self._moments.append(time.monotonic())
        if len(self._moments) == self._steps + 1:
            self._say(json.dumps({"moments": self._moments, "cpu_s": time.process_time() - self._cpu}))

    def _say(self, text: str) -> None:
        print(text, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("nobody is left to measure for")


def _main(task: Mapping[str, Any]) -> None:
    if "flood" in task:
        _pour(task)
        return
    config, moments = load_config(None, task["config"]), Moments(task["steps"])
    if config.key is None:
        train_in_one_process(task["model"], task["edge_layers"], config, watchers=[moments])
    else:
        with open_link(config) as link:
            train_over(link, config, [moments])
    print("done", flush=True)


def _pour(task: Mapping[str, Any]) -> None:
    def session() -> None:
        with connect(task["flood"], key=task["key"]) as link:
            hidden = torch.randn(1, task["tokens"], link.info.hidden_size)
            begun.release()
            while True:
                _, kept = link.forward_span(hidden, None, None, keep=True)
                link.backward_span(kept, _gradient(hidden), hidden, None, None)

    begun = threading.Semaphore(0)
    for _ in range(FLOOD_SESSIONS):
        threading.Thread(target=session, daemon=True).start()
    for _ in range(FLOOD_SESSIONS):
        begun.acquire()
    print("pouring", flush=True)
    sys.stdin.readline()
    os._exit(0)  # the sessions never end by themselves


def _gradient(hidden: Tensor) -> Tensor:
    return torch.ones_like(hidden)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
