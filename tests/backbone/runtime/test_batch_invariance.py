"""What is measured of products of matrices, against the products themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.models.tiny import tiny_checkpoint
from torch import Tensor, nn

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.batch_invariance import SIZES, BatchInvariance, measure_batch_invariance
from isthmus.backbone.split.span import FrozenSpan, load_span


def span_of(name: str, folder: Path) -> FrozenSpan:
    checkpoint = Checkpoint(tiny_checkpoint(name, folder / "tiny"), "tiny")
    return load_span(checkpoint, SplitPlan.parse("1:1", checkpoint.config.num_hidden_layers))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


class Rounding(nn.Linear):
    """A linear whose bits depend on the number of rows below `rows`, and on that of threads below `threads`."""

    def __init__(self, width: int, rows: int, threads: int) -> None:
        super().__init__(width, width, bias=False)
        self.rows, self.threads = rows, threads

    def forward(self, x: Tensor) -> Tensor:
        here = x.shape[1]
        off = here < self.rows or (torch.get_num_threads() > 1 and here < self.threads)
        return x * (1 + 1e-3 * here if off else 1)


@pytest.mark.parametrize(
    ("rows", "threads", "found", "all_threads_from"),
    [
        (1, 1, BatchInvariance(SIZES[0], SIZES[0]), SIZES[0]),
        (16, 200, BatchInvariance(16, 256), 256),
        (13, 13, BatchInvariance(13, 13), 13),
        (35, 1, BatchInvariance(48, 48), 48),
        (200, 1, BatchInvariance(256, 256), 256),
        (16, 2000, BatchInvariance(16, None), math.inf),
        (2000, 1, BatchInvariance(None, None), 0),
    ],
)
def test_the_smallest_numbers_of_rows(
    tmp_path: Path, rows: int, threads: int, found: BatchInvariance, all_threads_from: float
) -> None:
    span = span_of("llama", tmp_path)
    for layer in span.base.modules():
        for name, child in layer.named_children():
            if isinstance(child, nn.Linear):
                setattr(layer, name, Rounding(8, rows, threads))
    measured = measure_batch_invariance(span, 2, 1)
    assert measured == found
    assert measured.all_threads_from == all_threads_from


def test_a_few_rows_that_are_off_between_others_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    span = span_of("llama", tmp_path)
    forward = nn.Linear.forward

    def off_for_nine(self: nn.Linear, x: Tensor) -> Tensor:
        return forward(self, x) * (1 + 1e-3 * (x.shape[1] == 9))

    monkeypatch.setattr(nn.Linear, "forward", off_for_nine)
    assert (measure_batch_invariance(span, 1, 1).rows or 0) >= 10


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_span_s_own_linears(name: str, tmp_path: Path) -> None:
    span = span_of(name, tmp_path)
    measured = measure_batch_invariance(span, 1, 1)
    assert measured.rows is not None, "fp32 products of small matrices"
    assert measured.threads == measured.rows
    assert all(parameter.grad is None for parameter in span.parameters())
