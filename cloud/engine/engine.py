"""The compute threads of one executor: how many lanes, and what may share a pass without a change of any bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from isthmus.backbone.runtime.batch_invariance import BatchInvariance, measure_batch_invariance
from isthmus.cloud.engine.compute_threads import LANES, Dispatcher
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.engine.requests import Batching


@dataclass(frozen=True, slots=True)
class Computing:
    """What computes for an executor.

    Attributes:
        dispatcher: The compute threads.
        invariance: What was measured of the span's products; None without batching.
        threads_of_a_call: torch threads of a call that computes on a thread of its own, as it may pause: those of a
            lane where bits depend on it.
    """

    dispatcher: Dispatcher
    invariance: BatchInvariance | None
    threads_of_a_call: int


def compute_threads(
    executor: Executor, threads: int, *, batching: bool, computed: Callable[[Any], bool] = lambda _: True
) -> Computing:
    """Start what computes for an executor.

    Args:
        executor: What its passes run on.
        threads: torch threads, of all lanes together.
        batching: Whether calls of several sessions may share a pass.
        computed: `Dispatcher`'s.
    """
    if not batching:
        return Computing(
            Dispatcher(threads, computed=computed, growth=executor.working_bytes, memory=executor.compute_bytes),
            None,
            threads,
        )
    lanes = min(LANES if executor.side_by_side else 1, threads)
    invariance = measure_batch_invariance(executor.host.span, threads, threads // lanes)
    dispatcher = Dispatcher(
        threads,
        Batching(smallest=invariance.rows or 1),
        computed=computed,
        room=lambda: executor.room,
        lanes=lanes,
        growth=executor.working_bytes,
        all_threads_from=invariance.all_threads_from,
        memory=executor.compute_bytes,
    )
    same = invariance.all_threads_from <= (invariance.rows or 0)
    return Computing(dispatcher, invariance, threads if same else threads // lanes)
