"""The shipped scheduler beside the textbook's: interactive and training calls that come by themselves.

Calls arrive as a Poisson process or in bursts (gamma-distributed gaps), whoever is still being served. All of it is
computed by the cloud's own engine over the real span; the network is left out. The two schedulers take turns over the
same arrivals, as a machine's speed drifts.
"""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import SpanInput, load_span
from isthmus.cloud.bounds import EngineOptions
from isthmus.cloud.engine.activation_cache import Key
from isthmus.cloud.engine.engine import start_engine
from isthmus.cloud.engine.executor import BackwardCall, Executor
from isthmus.cloud.engine.requests import Kind, Request, Share, TooLate
from isthmus.cloud.engine.scheduler import Scheduler
from isthmus.cloud.session.handler import BACKWARD, FORWARD, KEPT_FORWARD
from isthmus.common.machine import usable_cores
from isthmus.common.torch_threads import set_torch_threads
from isthmus.experiments.harness.bench_flags import numbers_of
from isthmus.experiments.harness.bench_settings import QosSettings
from isthmus.experiments.harness.launch import stderr_progress
from isthmus.experiments.serving.scheduler_policies import Textbook
from isthmus.experiments.serving.tenants_crowd import percentile

ARRIVALS = ("poisson", "bursty")
POLICIES = {"scheduler": Scheduler, "textbook": Textbook}
BURST_SHAPE = 0.25
"""Of the gamma distribution: the gaps' coefficient of variation is 0.25 ** -0.5 = 2, and a Poisson process's is 1."""
DRAIN_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call that comes at `at` seconds."""

    at: float
    tenant: int
    interactive: bool


@dataclass(slots=True)
class Outcome:
    """What became of the calls: seconds of those that were answered in time or late, and token positions by then."""

    latencies: list[float] = field(default_factory=list)
    missed: int = 0
    interactive: int = 0
    positions: int = 0


def gap(draw: random.Random, kind: str, rate: float) -> float:
    """Seconds until the next call; in bursts the gaps have twice the variation of those of a Poisson process."""
    if kind == "poisson":
        return draw.expovariate(rate)
    return draw.gammavariate(BURST_SHAPE, 1 / (rate * BURST_SHAPE))


def arrivals(settings: QosSettings, kind: str, rate: float) -> Iterator[Arrival]:
    """Calls at `rate` a second on average, until the time is over."""
    draw = random.Random(settings.seed)  # noqa: S311 - no secret
    at = 0.0
    while True:
        at += gap(draw, kind, rate)
        if at >= settings.seconds:
            return
        yield Arrival(at, draw.randrange(settings.tenants), draw.random() < settings.interactive_share)


def run_qos(settings: QosSettings) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `runs`: `arrivals`, `load`, `policy`, `round`; `throughput` in token positions per second, a training call's
        counted for its forward and its backward; `p50_s` and `p99_s` of the interactive calls that were answered;
        `missed`, the share of them that were refused or late.
    """
    loads = numbers_of(settings.loads, "loads")
    threads = settings.threads or usable_cores()
    set_torch_threads(threads)
    checkpoint = resolve(settings.model)
    span = load_span(checkpoint, SplitPlan.parse(settings.edge_layers, checkpoint.config.num_hidden_layers))
    executor = Executor(SiteHost(span), torch.float32, 1 << 40)
    lab = _Lab(settings, executor, span.hidden_size, threads)
    runs = []
    turns = list(itertools.product(ARRIVALS, loads, range(settings.rounds), POLICIES))
    with stderr_progress("runs", len(turns)) as advance:
        service = lab.service_seconds()
        for kind, load, number, policy in turns:
            outcome = lab.run(policy, list(arrivals(settings, kind, load / service)))
            runs.append(
                {
                    "arrivals": kind,
                    "load": load,
                    "policy": policy,
                    "round": number,
                    "throughput": outcome.positions / settings.seconds,
                    "p50_s": percentile(outcome.latencies, 0.5),
                    "p99_s": percentile(outcome.latencies, 0.99),
                    "missed": outcome.missed / max(1, outcome.interactive),
                    "interactive_calls": outcome.interactive,
                }
            )
            advance()
    return {"runs": runs, "service_s": service, **asdict(settings), "loads": loads, "threads": threads}


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    for row in result["runs"]:
        p50, p99 = (f"{row[name]:.3f}" if row[name] is not None else "-" for name in ("p50_s", "p99_s"))
        print(
            f"{row['arrivals']:8} load {row['load']:4.2f}  {row['policy']:9}  {row['throughput']:7.0f} positions/s   "
            f"interactive: median {p50} s, 99 % within {p99} s, missed {row['missed']:.1%}"
        )


class _Lab:
    """Runs calls over one executor."""

    def __init__(self, settings: QosSettings, executor: Executor, width: int, threads: int) -> None:
        self._settings, self._executor, self._threads = settings, executor, threads
        self._short = SpanInput(torch.randn(1, settings.interactive_tokens, width))
        self._long = SpanInput(torch.randn(1, settings.training_tokens, width))
        self._gradient = torch.randn_like(self._long.hidden)

    def service_seconds(self) -> float:
        """The computing time of an average arrival, alone."""
        share, seconds = self._settings.interactive_share, []
        for key in ((b"", number) for number in range(6)):
            start = time.perf_counter()
            self._executor.forward(*key, self._short, keep=False)
            middle = time.perf_counter()
            self._executor.forward(*key, self._long, keep=True)
            self._executor.backward(*key, self._gradient)
            end = time.perf_counter()
            seconds.append(share * (middle - start) + (1 - share) * (end - middle))
        return statistics.median(seconds[1:])

    def run(self, policy: str, calls: Sequence[Arrival]) -> Outcome:
        """Let calls come at their time, and see what becomes of them."""
        settings, outcome, lock = self._settings, Outcome(), threading.Lock()
        engine = start_engine(
            self._executor,
            self._threads,
            EngineOptions(),
            scheduler=POLICIES[policy],
        )
        open_calls = threading.Semaphore(0)
        begun = time.monotonic()

        def submit(
            number: int, call: Arrival, kind: Kind, run: Callable[[], Any], item: Any, run_batch: Callable[[Any], Any]
        ) -> Future[Any]:
            positions = (self._short if call.interactive else self._long).positions
            request = Request(
                f"{call.tenant}",
                str(number).encode(),
                Share(),
                run,
                kind,
                item,
                run_batch,
                interactive=call.interactive,
                positions=positions,
                deadline=time.monotonic() + settings.deadline if call.interactive else None,
                keeps_bytes=positions * self._executor.memory.kept_per_position if kind is KEPT_FORWARD else 0,
            )
            return engine.submit(request)

        def count(positions: int) -> None:
            if time.monotonic() - begun <= settings.seconds:
                outcome.positions += positions

        def answered(call: Arrival, future: Future[Any]) -> None:
            with lock:
                seconds = time.monotonic() - begun - call.at
                late = isinstance(future.exception(), TooLate)
                if not late:
                    outcome.latencies.append(seconds)
                    count(self._short.positions)
                outcome.missed += late or seconds > settings.deadline
            open_calls.release()

        def forwarded(number: int, call: Arrival, _future: Future[Any]) -> None:
            with lock:
                count(self._long.positions)
            key = (str(number).encode(), 1)
            back = BackwardCall(key, self._gradient)
            later = submit(
                number, call, BACKWARD, partial(self._executor.backward, *key, self._gradient), back,
                self._executor.backward_together,
            )  # fmt: skip
            later.add_done_callback(partial(finished, number))

        def finished(number: int, _future: Future[Any]) -> None:
            with lock:
                count(self._long.positions)
            engine.cancel(str(number).encode())  # the session is over
            open_calls.release()

        for number, call in enumerate(calls):
            time.sleep(max(0.0, begun + call.at - time.monotonic()))
            key = (str(number).encode(), 1)
            given = self._short if call.interactive else self._long
            kind = FORWARD if call.interactive else KEPT_FORWARD
            keep = not call.interactive
            run = partial(self._executor.forward, *key, given, keep=keep)
            future = submit(number, call, kind, run, (key, given), partial(self._forward_together, keep=keep))
            outcome.interactive += call.interactive
            done = partial(answered, call) if call.interactive else partial(forwarded, number, call)
            future.add_done_callback(done)
        until = time.monotonic() + DRAIN_SECONDS
        for _ in calls:
            if not open_calls.acquire(timeout=max(0.0, until - time.monotonic())):
                break
        with lock:
            waiting = outcome.interactive - len(outcome.latencies) - outcome.missed
        engine.shutdown(cancel=True)
        self._executor.cache.evict_all()
        outcome.missed += max(0, waiting)
        return outcome

    def _forward_together(self, asked: Sequence[tuple[Key, SpanInput]], *, keep: bool) -> Sequence[Any]:
        return self._executor.forward_together(dict(asked), keep=keep)
