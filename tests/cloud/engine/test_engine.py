"""What computes for an executor, by what was measured of its products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.batch_invariance import BatchInvariance
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import load_span
from isthmus.cloud.engine import engine
from isthmus.cloud.engine.engine import compute_threads
from isthmus.cloud.engine.executor import Executor


@pytest.fixture
def executor(tmp_path: Path) -> Executor:
    checkpoint = Checkpoint(tiny_checkpoint("llama", tmp_path / "tiny"), "tiny")
    span = load_span(checkpoint, SplitPlan.parse("1:1", checkpoint.config.num_hidden_layers))
    return Executor(SiteHost(span), torch.float32, 1 << 30)


@pytest.mark.parametrize(
    ("measured", "smallest", "all_from", "of_a_call"),
    [
        (BatchInvariance(16, 16), 16, 16, 2),
        (BatchInvariance(16, 256), 16, 256, 1),  # a meeting has a lane's threads
        (BatchInvariance(16, None), 16, float("inf"), 1),
        (BatchInvariance(None, None), 1, 0, 2),  # no bits to keep
    ],
)
def test_bits_decide_what_is_shared_and_with_how_many_threads(
    executor: Executor,
    monkeypatch: pytest.MonkeyPatch,
    measured: BatchInvariance,
    smallest: int,
    all_from: float,
    of_a_call: int,
) -> None:
    monkeypatch.setattr(engine, "measure_batch_invariance", lambda *_: measured)
    found = compute_threads(executor, 2, batching=True)
    batching = found.dispatcher._scheduler._batching
    assert batching is not None
    assert (batching.smallest, found.dispatcher._all_threads_from) == (smallest, all_from)
    assert found.threads_of_a_call == of_a_call
    assert found.invariance == measured
    found.dispatcher.shutdown(cancel=True)


def test_without_batching_nothing_is_measured_and_the_heap_has_the_same_allowance(executor: Executor) -> None:
    alone, shared = (compute_threads(executor, 2, batching=batching) for batching in (False, True))
    assert (alone.invariance, alone.threads_of_a_call) == (None, 2)
    assert alone.dispatcher._growth == shared.dispatcher._growth == executor.working_bytes > 0
    for each in (alone, shared):
        each.dispatcher.shutdown(cancel=True)
