"""The shipped scheduler beside the former one: interactive and training calls that come by themselves.

Calls arrive as a Poisson process or in bursts (gamma-distributed gaps), whoever is still being served. All of it is
computed by the cloud's own engine over the real span; the network is left out. The two schedulers take turns over the
same arrivals, as a machine's speed drifts.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final, Literal

import torch

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import SpanInput, load_span
from isthmus.cloud.bounds import EngineOptions
from isthmus.cloud.engine.activation_cache import Key
from isthmus.cloud.engine.batching import SchedulerLimits
from isthmus.cloud.engine.engine import start_engine
from isthmus.cloud.engine.executor import BackwardCall, Executor
from isthmus.cloud.engine.requests import Kind, Request, Share, TooLate
from isthmus.cloud.engine.scheduler import Scheduler
from isthmus.common.errors import ConfigError
from isthmus.experiments.harness.launch import stderr_progress
from isthmus.experiments.serving.former_policy import FormerScheduler
from isthmus.experiments.serving.simulated_cloud import BACKWARD, FORWARD, KEPT_FORWARD

Arrivals = Literal["poisson", "bursty"]
ARRIVALS: Final[tuple[Arrivals, ...]] = ("poisson", "bursty")
Policy = Literal["scheduler", "former"]
POLICIES: Final[tuple[Policy, ...]] = ("scheduler", "former")
BURST_SHAPE = 0.25  # of the gamma distribution: gaps with twice the variation of a Poisson process
DRAIN_SECONDS = 30.0
FORMER_STATE_SHARE = 0.47
"""Of the span's weights: what forward states take at which the former scheduler holds forwards back."""


@dataclass(frozen=True, slots=True)
class QosSettings:
    """What is measured.

    Attributes:
        model: As for `--model`.
        edge_layers: The split plan.
        loads: Computing time that is asked for, over the time there is.
        seconds: For which calls arrive.
        interactive_share: Of the arrivals.
        interactive_tokens: Token positions of an interactive call, a forward.
        training_tokens: Token positions of a training call, a forward and then its backward.
        deadline: Seconds within which an interactive call has to be computed.
        tenants: Among whom the calls are drawn, of either kind.
        threads: torch threads.
        seed: Of the arrivals, which are the same for both policies.
        rounds: How often both policies have their turn.
    """

    model: str
    edge_layers: str = "2:2"
    loads: tuple[float, ...] = (0.4, 0.8, 1.0, 1.2)
    seconds: float = 15.0
    interactive_share: float = 0.5
    interactive_tokens: int = 32
    training_tokens: int = 64
    deadline: float = 1.0
    tenants: int = 8
    threads: int = 2
    seed: int = 0
    rounds: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.interactive_share < 1 or min(self.loads, default=0) <= 0:
            raise ConfigError(
                f"an interactive share of {self.interactive_share} and loads of {self.loads} leave nothing to compare: "
                "give a share between 0 and 1, and loads above 0"
            )


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


def arrivals(settings: QosSettings, kind: Arrivals, rate: float) -> Iterator[Arrival]:
    """Calls at `rate` a second on average, until the time is over."""
    draw = random.Random(settings.seed)  # noqa: S311 - no secret
    at = 0.0
    while True:
        at += draw.expovariate(rate) if kind == "poisson" else draw.gammavariate(BURST_SHAPE, 1 / (rate * BURST_SHAPE))
        if at >= settings.seconds:
            return
        yield Arrival(at, draw.randrange(settings.tenants), draw.random() < settings.interactive_share)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of the others do not exceed; None of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def run_qos(settings: QosSettings) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `runs`: `arrivals`, `load`, `policy`, `round`; `throughput` in token positions per second, a training call's
        counted for its forward and its backward; `p50_s` and `p99_s` of the interactive calls that were answered;
        `missed`, the share of them that were refused or late.

    Raises:
        ConfigError: The settings leave nothing to compare.
    """
    torch.set_num_threads(settings.threads)
    checkpoint = resolve(settings.model)
    span = load_span(checkpoint, SplitPlan.parse(settings.edge_layers, checkpoint.config.num_hidden_layers))
    executor = Executor(SiteHost(span), torch.float32, 1 << 40)
    lab = _Lab(settings, executor, span.hidden_size)
    runs = []
    turns = list(itertools.product(ARRIVALS, settings.loads, range(settings.rounds), POLICIES))
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
    return {"runs": runs, "service_s": service, **asdict(settings)}


class _Lab:
    """Runs calls over one executor."""

    def __init__(self, settings: QosSettings, executor: Executor, width: int) -> None:
        self._settings = settings
        self._executor = executor
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

    def run(self, policy: Policy, calls: Sequence[Arrival]) -> Outcome:
        """Let calls come at their time, and see what becomes of them."""
        settings, outcome, lock = self._settings, Outcome(), threading.Lock()
        engine = start_engine(
            self._executor,
            settings.threads,
            EngineOptions(),
            make_scheduler=None if policy == "scheduler" else self._former_scheduler,
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

    def _former_scheduler(self, limits: SchedulerLimits) -> Scheduler:
        room = FORMER_STATE_SHARE * self._executor.span_bytes / self._executor.memory.kept_per_position
        return FormerScheduler(time.monotonic, limits, room)

    def _forward_together(self, asked: Sequence[tuple[Key, SpanInput]], *, keep: bool) -> Sequence[Any]:
        return self._executor.forward_together(dict(asked), keep=keep)
