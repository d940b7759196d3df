"""Batch invariance: from how many token positions on a call's bits do not depend on what else is in its batch.

A product of matrices adds up each of its rows by itself, but in which order depends on the library, the processor, the
shapes, the number of rows and that of threads (He et al. 2025, "Defeating nondeterminism in LLM inference"). From some
number of rows on, the order is often the same: MKL's products in fp32 reach this after a few rows, oneDNN's in bf16
with AMX hardly ever. No library promises it, so it is measured, with the span's own linears.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.checkpoints.weight_quantization import features_of
from isthmus.backbone.split.span import FrozenSpan
from isthmus.common.torch_threads import torch_threads

SIZES = (*range(4, 33), 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of rows that are tried: all small ones, as kernels for few rows differ from one number to the next."""
ROWS = 1031
"""Rows of the product that they are compared with: more than a batch has, and a prime, which no tile divides."""


@dataclass(frozen=True, slots=True)
class BatchInvariance:
    """From how many rows on outputs and input gradients keep their bits.

    Attributes:
        rows: From so many rows on, a product has the same bits among other rows; None where no number of rows suffices.
        threads: From so many rows on, it has them with all of torch's threads too; None as above.
    """

    rows: int | None
    threads: int | None

    @property
    def all_threads_from(self) -> float:
        """From so many rows on, all of torch's threads may compute; 0 where bits differ between batches anyway."""
        if self.rows is None:
            return 0
        return math.inf if self.threads is None else self.threads


def measure_batch_invariance(span: FrozenSpan, threads: int, threads_of_a_pass: int) -> BatchInvariance:
    """Measure a span's linears, one of each kind and shape; see `measure_linears`."""
    linears = [each for each in span.modules() if isinstance(each, (nn.Linear, Conv1D))]
    return measure_linears(linears, threads, threads_of_a_pass, span.device, span.dtype)


def measure_linears(
    linears: Iterable[nn.Linear | Conv1D],
    threads: int,
    threads_of_a_pass: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backward: bool = True,
) -> BatchInvariance:
    """Measure linears, one of each kind and shape.

    Args:
        linears: The linears, where they compute.
        threads: torch threads of a call that is alone.
        threads_of_a_pass: torch threads of a pass that several calls share.
        device: Where that is.
        dtype: Floating point dtype of what they are given.
        backward: Whether the gradients of their inputs count, and not only their outputs.
    """
    distinct = {_shape(each): each for each in linears}
    generator = torch.Generator().manual_seed(0)
    probes = [_Probe.of(each, device, dtype, generator, backward=backward) for each in distinct.values()]
    with torch_threads(threads_of_a_pass):
        wanted = [probe.run(slice(ROWS)) for probe in probes]
        rows = _smallest(lambda size: _agree(probes, wanted, size))
    if threads == threads_of_a_pass or rows is None:
        return BatchInvariance(rows, rows)
    with torch_threads(threads):
        return BatchInvariance(rows, _smallest(lambda size: _agree(probes, wanted, size)))


@dataclass(frozen=True, slots=True)
class _Probe:
    linear: nn.Linear | Conv1D
    given: Tensor
    upstream: Tensor | None  # None where the gradient does not count

    @classmethod
    def of(
        cls,
        linear: nn.Linear | Conv1D,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator,
        *,
        backward: bool,
    ) -> _Probe:
        _, inner, outer = _shape(linear)
        given, upstream = (torch.randn(ROWS, width, generator=generator) for width in (inner, outer))
        return cls(linear, given.to(device, dtype), upstream.to(device, dtype) if backward else None)

    def run(self, part: slice) -> tuple[Tensor, ...]:
        """The output for some of the rows, and the input's gradient where it counts."""
        given = self.given[part].clone().requires_grad_(self.upstream is not None)
        output = self.linear(given[None])[0]
        if self.upstream is None:
            return (output.detach(),)
        return output.detach(), *torch.autograd.grad(output, given, self.upstream[part])


def _agree(probes: Sequence[_Probe], wanted: Sequence[tuple[Tensor, ...]], rows: int) -> bool:
    return all(
        torch.equal(ours, theirs[part])
        for probe, both in zip(probes, wanted, strict=True)
        for part in (slice(0, rows), slice(ROWS - rows, ROWS))
        for ours, theirs in zip(probe.run(part), both, strict=True)
    )


def _smallest(agree: Callable[[int], bool]) -> int | None:
    """The least of the sizes from which on all agree."""
    found = None
    for size in reversed(SIZES):
        if not agree(size):
            break
        found = size
    return found


def _shape(linear: nn.Linear | Conv1D) -> tuple[type, int, int]:
    """Kind, and widths of input and output."""
    return type(linear), *features_of(linear)
