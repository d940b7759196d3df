"""The compute threads of one executor: how many lanes, and what may share a pass without a change of any bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from isthmus.backbone.batch_invariance import BatchInvariance, measure_batch_invariance
from isthmus.cloud.dispatch import LANES, Dispatcher
from isthmus.cloud.executor import Executor
from isthmus.cloud.scheduler import Batching


def compute_threads(
    executor: Executor, threads: int, *, batching: bool, computed: Callable[[Any], bool] = lambda _: True
) -> tuple[Dispatcher, BatchInvariance | None]:
    """Start what computes for an executor.

    Args:
        executor: What its passes run on.
        threads: torch threads, of all lanes together.
        batching: Whether calls of several sessions may share a pass.
        computed: `Dispatcher`'s.

    Returns:
        It, and what was measured of the span's products; None without batching.
    """
    if not batching:
        return Dispatcher(threads, computed=computed), None
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
    )
    return dispatcher, invariance
