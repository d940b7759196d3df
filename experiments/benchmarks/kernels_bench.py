"""The kernels against what a library offers for the same: medians of times, and whether the bits are the same.

The grouped low-rank product stands against a plain loop of `linear`s, `torch.nn.functional.grouped_mm` and `torch.bmm`,
each with forward and backward. Block quantization stands against bitsandbytes' of as many bits, which is another
format: its 8 bits are a table's entries, its 4 bits (NF4) are not rotated, so only the time compares. On a GPU what
Triton computes stands against torch as well.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isthmus.common.errors import ConfigError
from isthmus.common.torch_threads import torch_threads
from isthmus.experiments.harness.bench_settings import KernelSettings
from isthmus.kernels.blockwise import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from isthmus.kernels.dispatch import runs_triton, torch_only
from isthmus.kernels.grouped import grouped_low_rank

OURS = "isthmus"
ROWS = (16, 128)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Operands of the grouped product, and the gradient of its output."""

    x: Tensor
    sizes: list[int]
    downs: list[Tensor]
    ups: list[Tensor]
    scales: list[float]
    of: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.downs, *self.ups]


def run_kernels(settings: KernelSettings) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `grouped`, a row for each dtype, shape and number of rows: `seconds` of ours, `ratio` of ours over each
        candidate, and `same_bits`, whether the candidate's output and gradients are the plain loop's. `blockwise`, a
        row for each call and shape: `seconds` of ours and `ratio` over each candidate. Also whether ours ran in
        `triton`, and the settings. Ratios are of medians; below 1 ours is faster.

    Raises ConfigError where there is no such device, or bitsandbytes is not installed.
    """
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"there is no device {device!r} to measure on: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device: leave --device out, or use --device cpu")
    rows_per_group = list(settings.rows or ROWS)
    settings = replace(settings, rows=rows_per_group, device=device)
    bitsandbytes = _bitsandbytes()
    generator = torch.Generator().manual_seed(1)
    with torch_threads(settings.threads):
        grouped = [
            _grouped_row(settings, dtype, width, rows, generator)
            for dtype in DTYPES
            for width in settings.widths
            for rows in rows_per_group
        ]
        blockwise = [
            row
            for width in dict.fromkeys(inside for inside, _ in settings.widths)
            for rows in rows_per_group
            for row in _blockwise_rows(settings, rows * len(settings.ranks), width, bitsandbytes, generator)
        ]
    return {
        "grouped": grouped,
        "blockwise": blockwise,
        "triton": runs_triton(torch.empty(0, device=settings.device)),
        "torch": torch.__version__,
        "settings": asdict(settings),
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    settings = result["settings"]
    triton = "on" if result["triton"] else "off"
    print(f"on {settings['device']}, Triton {triton}, {settings['threads']} threads; below 1 ours is faster")
    for row in result["grouped"]:
        others = ", ".join(
            f"{ratio:.2f} of {name}{'' if row['same_bits'].get(name, True) else ' (other bits)'}"
            for name, ratio in row["ratio"].items()
        )
        print(
            f"grouped {row['dtype']:8} {row['in']:4} -> {row['out']:4} {row['rows']:3} rows a group "
            f"{row['seconds'] * 1e3:7.2f} ms   {others}"
        )
    for row in result["blockwise"]:
        others = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in row["ratio"].items())
        print(f"{row['call']:16} {row['rows']:5} x {row['width']:4} {row['seconds'] * 1e3:7.2f} ms   {others}")


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ConfigError("this benchmark compares with bitsandbytes: pip install 'isthmus[quantize]'") from error
    return bitsandbytes.functional


def _grouped_row(
    settings: KernelSettings, dtype: torch.dtype, width: tuple[int, int], rows: int, generator: torch.Generator
) -> dict[str, Any]:
    batch = _batch(settings, dtype, width, rows, generator)
    candidates = {OURS: _ours, "loop": _loop, "grouped_mm": _grouped_mm, "bmm": _bmm}

    def step(product: Callable[[_Batch], Tensor]) -> list[Tensor]:
        y = product(batch)
        return [y, *torch.autograd.grad(y, batch.leaves, batch.of)]

    bits = {name: step(product) for name, product in candidates.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "in": width[0],
        "out": width[1],
        "rows": rows,
        **_compared({name: partial(step, product) for name, product in candidates.items()}, settings),
        "same_bits": {
            name: all(torch.equal(one, other) for one, other in zip(got, bits["loop"], strict=True))
            for name, got in bits.items()
            if name != "loop"
        },
    }


def _batch(
    settings: KernelSettings, dtype: torch.dtype, width: tuple[int, int], rows: int, generator: torch.Generator
) -> _Batch:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(settings.device, dtype)

    inside, out = width
    groups = len(settings.ranks)
    return _Batch(
        normal(groups * rows, inside).requires_grad_(),
        [rows] * groups,
        [(normal(rank, inside) * inside**-0.5).requires_grad_() for rank in settings.ranks],
        [(normal(out, rank) * rank**-0.5).requires_grad_() for rank in settings.ranks],
        [16.0 / rank for rank in settings.ranks],
        normal(groups * rows, out),
    )


def _ours(batch: _Batch) -> Tensor:
    return grouped_low_rank(batch.x, batch.sizes, batch.downs, batch.ups, batch.scales)


def _loop(batch: _Batch) -> Tensor:
    groups = zip(torch.split(batch.x, batch.sizes), batch.downs, batch.ups, batch.scales, strict=True)
    return torch.cat([functional.linear(functional.linear(x, down), up) * scale for x, down, up, scale in groups])


def _padded(batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`A` `[groups, in, r]` and `B` `[groups, r, out]` with the largest rank, in steps of 8 as grouped_mm wants it, and
    the scales `[groups]`.
    """
    # grouped_mm wants strides of whole 16 bytes.
    rank = -(-max(len(down) for down in batch.downs) // 8) * 8
    down = torch.stack([functional.pad(one, (0, 0, 0, rank - len(one))) for one in batch.downs])
    up = torch.stack([functional.pad(one, (0, rank - one.shape[1])) for one in batch.ups])
    return down.transpose(1, 2), up.transpose(1, 2), torch.tensor(batch.scales).to(batch.x)


def _grouped_mm(batch: _Batch) -> Tensor:
    down, up, scales = _padded(batch)
    sizes = torch.tensor(batch.sizes, device=batch.x.device)
    ends = sizes.cumsum(0).to(torch.int32)
    y = functional.grouped_mm(functional.grouped_mm(batch.x, down, offs=ends), up, offs=ends)
    return y * scales.repeat_interleave(sizes)[:, None]


def _bmm(batch: _Batch) -> Tensor:
    # All groups have as many rows here; with other sizes they would be padded as well.
    down, up, scales = _padded(batch)
    x = batch.x.view(len(batch.sizes), -1, batch.x.shape[1])
    return (torch.bmm(torch.bmm(x, down), up) * scales[:, None, None]).flatten(0, 1)


def _blockwise_rows(
    settings: KernelSettings, rows: int, width: int, bitsandbytes: Any, generator: torch.Generator
) -> Iterator[dict[str, Any]]:
    x = torch.randn(rows, width, generator=generator).to(settings.device)
    eight, four = quantize_int8(x), quantize_int4(x)
    their_eight = bitsandbytes.quantize_blockwise(x, blocksize=64)
    their_four = bitsandbytes.quantize_4bit(x, blocksize=64, quant_type="nf4")
    calls: dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]] = {
        "quantize_int8": (
            lambda: quantize_int8(x),
            "quantize_blockwise",
            lambda: bitsandbytes.quantize_blockwise(x, blocksize=64),
        ),
        "dequantize_int8": (
            lambda: dequantize_int8(*eight),
            "dequantize_blockwise",
            lambda: bitsandbytes.dequantize_blockwise(*their_eight),
        ),
        "quantize_int4": (
            lambda: quantize_int4(x),
            "quantize_4bit",
            lambda: bitsandbytes.quantize_4bit(x, blocksize=64, quant_type="nf4"),
        ),
        "dequantize_int4": (
            lambda: dequantize_int4(*four, width),
            "dequantize_4bit",
            lambda: bitsandbytes.dequantize_4bit(*their_four),
        ),
    }
    for call, (ours, name, theirs) in calls.items():
        candidates = {OURS: ours, name: theirs}
        if runs_triton(x):
            candidates["torch"] = torch_only()(ours)
        yield {"call": call, "rows": rows, "width": width, **_compared(candidates, settings)}


def _compared(candidates: Mapping[str, Callable[[], Any]], settings: KernelSettings) -> dict[str, Any]:
    """`seconds` of ours, and the `ratio` over each of the others: medians of rounds in which all run."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    order = random.Random(1)  # noqa: S311  # no secret; each finds the caches as another left them
    for _ in range(settings.rounds):
        for name in order.sample(list(candidates), len(candidates)):
            taken[name].append(_seconds(candidates[name], settings.device))
    return {
        "seconds": _significant(statistics.median(taken[OURS])),
        "ratio": {name: _ratio(taken[OURS], others) for name, others in taken.items() if name != OURS},
    }


def _seconds(call: Callable[[], Any], device: str | None) -> float:
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    return _significant(statistics.median(ours) / statistics.median(others))


def _significant(value: float) -> float:
    return float(f"{value:.3g}")
