"""Many tenants on one backbone, beside as many single processes that time-share the same cores.

Every tenant is an edge in a process of its own, with a PEFT method and a length of sequences of its own, and so is
every single process. A machine's speed drifts within minutes, so they work in turns, a few steps each: single
processes, tenants, single processes and so on, and a ratio is of what is next to each other. In a turn all begin
together, and what counts is the time in which all of them are at work.

The bound of the gain is `1 / (e + (1 - e) / b)`, in seconds of a processor, of which both sides use all that there are.
`e` is the edges' share: what a step takes of an edge over what it takes of a single process, both measured in the turns
that are compared, as eight models that compete for caches are slower than one alone. The rest of a single process's
step is the span's; `b` is that, over what one pass over all tenants' calls takes with one thread, between the turns,
when nothing competes with it. A ratio above the bound is an error of measuring, and fails the run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import FrozenSpan, SpanInput, load_span
from isthmus.cloud.engine.activation_cache import Key
from isthmus.cloud.engine.executor import BackwardCall, Executor
from isthmus.common.errors import IsthmusError
from isthmus.common.figures import plotting, save_figure
from isthmus.common.machine import usable_cores
from isthmus.common.torch_threads import set_torch_threads
from isthmus.experiments.harness.bench_settings import TenantSettings
from isthmus.experiments.harness.launch import stderr_progress
from isthmus.experiments.harness.single_process import losses_of
from isthmus.experiments.serving.tenants_crowd import (
    TURNS,
    Beside,
    Crowd,
    Turn,
    cloud_of,
    counts_of,
    flood_of,
    in_turns,
    length_of,
    p99,
    steps_in_turn,
)
from isthmus.experiments.serving.tenants_process import WARM_UP

GAIN_ROUNDS: Final = 2
"""Of each turn."""


def run_tenants(settings: TenantSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `throughput_ratio`: Tokens per second of all edges over those of as many single processes, the median of the
            turns, whose ratios are `turns`.
        `throughput_bound`: What is possible, of `edge_share` and `span_batching_gain`.
        `throughput_ratio_bf16_cloud`: The same ratio where the cloud computes in bf16, and the edges in fp32.
        `throughput_ratio_bf16`: The same where cloud and edges compute in bf16; the single processes in fp32, as ever.
        `cloud_growth_share`: What the cloud's worker has grown by from one tenant to all, at most and at work, over the
            span's bytes.
        `backbone_copies`: 1, and one more for each whole span that it has grown by.
        `memory_ratio`: PSS of the cloud and all edges over that of the single processes, while all of them are there.
        `edge_memory_ratio`: The most PSS that an edge has had over that of a process which computes the same parts with
            nothing in the cloud's place; the largest of all tenants.
        `jain`: Jain's index of the steps that each tenant has done.
        `flood_p99_ratio`: The 99th percentile of the others' steps while one tenant floods with ten sessions that
            want computing all the time, over the same without.
        `max_loss_diff`: The largest relative difference of a loss from the single process's.
        `growth`: For each of `counts_of(settings)` in `n`, tokens per second of so many `tenants` and of as many
            `single` processes, and their `ratio`. Only where there are such counts.

    Raises IsthmusError where a process failed, or the ratio is above the bound.
    """
    tenants = range(settings.n)
    threads = settings.threads or usable_cores()
    settings = replace(settings, model=str(resolve(settings.model).folder), threads=threads)
    counts = counts_of(settings)
    steps = steps_in_turn(settings)
    longest = max(tenants, key=lambda tenant: length_of(settings, tenant))
    gain, growth = SpanGain(settings), []
    with (
        stderr_progress("phases", 8 + len(counts)) as advance,
        Crowd(settings, folder / "alone", None, tenants) as singles,
    ):
        advance()
        with cloud_of(settings, folder / "fp32", "fp32") as cloud:
            with Crowd(settings, folder / "first", cloud, [longest]) as lone:
                first = lone.work(settings.steps)
            advance()
            with Crowd(settings, folder / "parts", None, tenants, parts=True) as crowd:
                parts = [crowd.work(steps) for _ in range(TURNS)]
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
                with flood_of(settings, cloud) as flood:
                    for _ in range(TURNS):
                        flood.ask("pour")
                        flooded.append(crowd.work(steps, tenants[1:]))
                        flood.ask("rest")
                        calm.append(crowd.work(steps))
                advance()
        fast: dict[str, float] = {}
        with cloud_of(settings, folder / "bf16", "bf16") as cloud:
            for precision in ("fp32", "bf16"):
                with Crowd(settings, folder / f"fast {precision}", cloud, tenants, precision=precision) as crowd:
                    turns = in_turns(singles, crowd, TURNS // 2, steps)
                    fast[precision] = statistics.median(each.ratio for each in turns)
                advance()
    edges_cpu = statistics.mean(each.tenants.cpu_per_step for each in done)
    singles_cpu = statistics.mean(turn.cpu_per_step for each in done for turn in (each.before, each.after))
    share = edges_cpu / singles_cpu
    span_gain = (singles_cpu - edges_cpu) / gain.together
    cloud_memory = max(each.tenants.cloud_memory for each in done)
    grown = (cloud_memory - first.cloud_memory) / gain.span_bytes
    bound = singles_cpu / (edges_cpu + gain.together)  # 1 / (share + (1 - share) / span_gain)
    ratio = statistics.median(each.ratio for each in done)
    check_bound(ratio, bound)
    if settings.figure is not None:
        draw_growth(growth, settings.figure)
    return {
        "throughput_ratio": ratio,
        "throughput_bound": bound,
        "throughput_over_bound": ratio / bound,
        "throughput_ratio_bf16_cloud": fast["fp32"],
        "throughput_ratio_bf16": fast["bf16"],
        "edge_share": share,
        "span_batching_gain": span_gain,
        "calls_per_pass": calls_per_pass,
        "cloud_growth_share": grown,
        "backbone_copies": 1 + max(0, math.floor(grown)),
        "memory_ratio": (cloud_memory + sum(memory)) / sum(single_memory),
        "edge_memory_ratio": max(
            edge / alone for edge, alone in zip(most([turn.tenants for turn in done]), most(parts), strict=True)
        ),
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
        **{name: getattr(settings, name) for name in ("n", "tokens", "edge_layers", "steps", "threads")},
        "batching": settings.batching == "on",
    }


def check_bound(ratio: float, bound: float) -> None:
    """Check that no more was measured than is possible. Raises IsthmusError where it was."""
    if ratio > bound:
        raise IsthmusError(
            f"the tenants' throughput is {ratio:.3f} of the single processes', and {bound:.3f} is possible: one of the "
            "turns was disturbed; measure again on a machine that does nothing else"
        )


def most(turns: Sequence[Turn]) -> list[int]:
    """The most memory that each process has had in any of these turns, in bytes."""
    return [max(of_one) for of_one in zip(*(turn.memory for turn in turns), strict=True)]


def _growth(n: int, turns: Sequence[Beside]) -> dict[str, float]:
    return {
        "n": n,
        "tenants": statistics.mean(each.tenants.throughput for each in turns),
        "single": statistics.mean(each.single for each in turns),
        "ratio": statistics.mean(each.ratio for each in turns),
    }


def draw_growth(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the `growth` that `run_tenants` returns."""
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

    Raises IsthmusError where one of them has come less far.
    """
    pairs = zip(_losses(ours, steps), _losses(theirs, steps), strict=True)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def _losses(run: Path, steps: int) -> list[float]:
    losses = losses_of(run)[:steps]
    if len(losses) < steps:
        raise IsthmusError(f"the run in {run} has {len(losses)} losses, and {steps} are to be compared")
    return losses


def tenants_calls(settings: TenantSettings) -> tuple[FrozenSpan, dict[Key, SpanInput], list[BackwardCall]]:
    """The cloud's span, and a call of each tenant: its forward, and the backward of that."""
    checkpoint = resolve(settings.model)
    span = load_span(checkpoint, SplitPlan.parse(settings.edge_layers, checkpoint.config.num_hidden_layers))
    calls = {
        (b"", tenant): SpanInput(torch.randn(1, length_of(settings, tenant), span.hidden_size))
        for tenant in range(settings.n)
    }
    return span, calls, [BackwardCall(key, torch.randn_like(given.hidden)) for key, given in calls.items()]


class SpanGain:
    """What one pass over all tenants' calls takes, with one thread and in seconds of a processor."""

    def __init__(self, settings: TenantSettings) -> None:
        set_torch_threads(1)
        span, self._calls, self._gradients = tenants_calls(settings)
        self.span_bytes = sum(each.numel() * each.element_size() for each in (*span.parameters(), *span.buffers()))
        self._executor = Executor(SiteHost(span), torch.float32, 1 << 40)
        self._seconds: list[float] = []
        self._pass()  # for warming up

    def measure(self) -> None:
        """Compute everything in one pass, a few times."""
        for _ in range(GAIN_ROUNDS):
            start = time.process_time()
            self._pass()
            self._seconds.append(time.process_time() - start)

    @property
    def together(self) -> float:
        """Seconds of forward and backward of all in one pass."""
        return statistics.median(self._seconds)

    def _pass(self) -> None:
        self._executor.forward_together(self._calls, keep=True)
        self._executor.backward_together(self._gradients)
