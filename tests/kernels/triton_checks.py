"""What the Triton kernels compute, against torch. `test_triton.py` runs this file in a process of its own.

With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on the CPU; without it they run on a GPU. Triton reads
the variable when it is imported, so one process cannot do both.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from isthmus.kernels import blockwise, blockwise_triton, grouped, grouped_triton
from isthmus.kernels.dispatch import _starts, runs_triton, torch_only

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""The norm of what a kernel is off, over the norm of what is exact. It is a few roundings of the dtype, and Triton's
interpreter cuts digits off where a GPU rounds to bf16."""

Case = tuple[list[int], list[int], int, int]
CASES: dict[str, Case] = {
    "odd sizes, ranks 1 to 64": ([5, 1, 33, 70, 2, 31, 9, 40], [1, 2, 3, 8, 17, 33, 63, 64], 70, 130),
    "groups without rows": ([0, 7, 0, 0, 3, 0], [4, 8, 64, 1, 5, 16], 64, 64),
    "no rows at all": ([0, 0], [4, 8], 16, 16),
    "a rank that takes two tiles": ([40, 3], [100, 2], 65, 63),
    "a rank of 0": ([6, 6, 6], [0, 4, 0], 20, 24),
    "only ranks of 0": ([6, 6], [0, 0], 20, 24),
    "one of everything": ([1], [1], 1, 1),
    "whole tiles": ([32, 64], [16, 64], 128, 64),
}


def _case(case: Case, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor], list[float]]:
    sizes, ranks, inside, out = case
    generator = torch.Generator().manual_seed(1)

    def normal(rows: int, columns: int, factor: float) -> Tensor:
        values = torch.randn(rows, columns, generator=generator) * factor
        return values.to(DEVICE, dtype).requires_grad_()

    x = normal(sum(sizes), inside, 1.0)
    downs = [normal(rank, inside, inside**-0.5) for rank in ranks]
    ups = [normal(out, rank, max(rank, 1) ** -0.5) for rank in ranks]
    return x, downs, ups, [2.0 / (1 + group) for group in range(len(ranks))]


def _exact(
    x: Tensor, sizes: list[int], downs: list[Tensor], ups: list[Tensor], scales: list[float], of: Tensor
) -> list[Tensor]:
    """The product and its gradients in fp64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, *downs, *ups)]
    rows = leaves[0].split(sizes)
    groups = zip(rows, leaves[1 : 1 + len(sizes)], leaves[1 + len(sizes) :], scales, strict=True)
    y = torch.cat([functional.linear(functional.linear(part, a), b) * scale for part, a, b, scale in groups])
    return [y, *torch.autograd.grad(y, leaves, of.double())]


def assert_close(got: Tensor, exact: Tensor, bound: float) -> None:
    assert got.shape == exact.shape
    assert (got.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_grouped_product_and_its_gradients(case: Case, dtype: torch.dtype) -> None:
    x, downs, ups, scales = _case(case, dtype)
    y = grouped_triton.grouped_low_rank(x, case[0], downs, ups, scales)
    assert y.dtype == dtype
    of = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    got = [y, *torch.autograd.grad(y, [x, *downs, *ups], of)]
    for one, exact in zip(got, _exact(x, case[0], downs, ups, scales, of), strict=True):
        assert one.dtype == dtype
        assert_close(one, exact, BOUNDS[dtype])


@pytest.mark.parametrize("wanted", ["x", "downs", "ups", "one down"])
def test_gradients_that_nobody_wants_are_not_made(wanted: str) -> None:
    case = CASES["groups without rows"]
    x, downs, ups, scales = _case(case, torch.float32)
    leaves = {"x": [x], "downs": downs, "ups": ups, "one down": [downs[1]]}[wanted]
    for tensor in (x, *downs, *ups):
        tensor.requires_grad_(any(tensor is leaf for leaf in leaves))
    y = grouped_triton.grouped_low_rank(x, case[0], downs, ups, scales)
    y.sum().backward()
    exact = _exact(x, case[0], downs, ups, scales, torch.ones_like(y))[1:]
    for tensor, gradient in zip((x, *downs, *ups), exact, strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.grad is not None:
            assert_close(tensor.grad, gradient, BOUNDS[torch.float32])


def test_strided_tensors() -> None:
    case = CASES["odd sizes, ranks 1 to 64"]
    x, downs, ups, scales = _case(case, torch.float32)
    strided = [tensor.detach().T.contiguous().T.requires_grad_() for tensor in (x, *downs, *ups)]
    groups = len(downs)
    y = grouped_triton.grouped_low_rank(strided[0], case[0], strided[1 : 1 + groups], strided[1 + groups :], scales)
    of = torch.ones((), device=DEVICE).expand(y.shape)
    got = [y, *torch.autograd.grad(y, strided, of)]
    for one, exact in zip(got, _exact(x, case[0], downs, ups, scales, of), strict=True):
        assert_close(one, exact, BOUNDS[torch.float32])


def _torch_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The reference on the CPU, whose bytes the wire has."""
    with torch_only():
        return blockwise.quantize_int8(x.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (64,), (5, 65), (2, 3, 130), (70, 64)], ids=str)
def test_int8_has_the_bytes_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 100).to(DEVICE, dtype)
    q, scale = blockwise_triton.quantize_int8(x)
    wanted, wanted_scale = _torch_int8(x)
    assert torch.equal(q.cpu(), wanted)
    assert torch.equal(scale.cpu(), wanted_scale)
    back = blockwise_triton.dequantize_int8(q, scale)
    assert torch.equal(back.cpu(), blockwise.dequantize_int8(wanted, wanted_scale))


@pytest.mark.parametrize(
    "values",
    [
        [3.4028234663852886e38, -3.4028234663852886e38, 1.0],
        [1.401298464324817e-45, 0.0],
        [1e-38, -1e-42],
        [0.0] * 65,
        [float(value) / 2 for value in range(-127, 128)],  # half way between two integers
    ],
    ids=["the largest", "the smallest", "subnormal", "zeros", "halves"],
)
def test_int8_at_the_ends_of_fp32(values: list[float]) -> None:
    x = torch.tensor(values, device=DEVICE)
    q, scale = blockwise_triton.quantize_int8(x)
    wanted, wanted_scale = _torch_int8(x)
    assert torch.equal(q.cpu(), wanted)
    assert torch.equal(scale.cpu(), wanted_scale)


def test_strided_blocks() -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(2)).to(DEVICE).T
    assert torch.equal(blockwise_triton.quantize_int8(x)[0].cpu(), _torch_int8(x)[0])
    q, _ = blockwise_triton.quantize_int4(x)
    assert torch.equal(q, blockwise_triton.quantize_int4(x.contiguous())[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (64,), (5, 65), (2, 3, 130), (70, 64)], ids=str)
def test_int4_has_the_bytes_of_torch_where_sums_are_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    q, scale = blockwise_triton.quantize_int4(x)
    wanted, wanted_scale = blockwise.quantize_int4(x.cpu())
    assert torch.equal(q.cpu(), wanted)
    assert torch.equal(scale.cpu(), wanted_scale)


def test_int4_differs_from_torch_by_steps_that_are_rare() -> None:
    x = torch.randn(100, 320, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 100)[:, None]
    q, scale = (tensor.cpu() for tensor in blockwise_triton.quantize_int4(x.to(DEVICE)))
    wanted, wanted_scale = blockwise.quantize_int4(x)
    steps = scale.view(torch.int16).int() - wanted_scale.view(torch.int16).int()
    assert steps.abs().max() <= 1
    assert steps.ne(0).float().mean() <= 1e-2
    same = steps.eq(0).repeat_interleave(blockwise.INT4_BYTES, -1)
    halves = [(part(q) - part(wanted))[same] for part in (lambda b: b.int() & 15, lambda b: b.int() >> 4)]
    assert max(half.abs().max() for half in halves) <= 1
    assert max(half.ne(0).float().mean() for half in halves) <= 1e-3
    error = (x.double() - blockwise.dequantize_int4(q, scale, 320).double()).unflatten(-1, (-1, 64)).norm(dim=-1)
    assert (error <= 4.001 * scale.double()).all()


@pytest.mark.parametrize("n", [1, 64, 65, 190])
def test_int4_is_inverted_up_to_the_rounding_of_a_sum(n: int) -> None:
    blocks = -(-n // 64)
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 256, (7, blocks * blockwise.INT4_BYTES), generator=generator).to(torch.uint8)
    scale = torch.rand(7, blocks, generator=generator).add(0.1).to(torch.bfloat16)
    got = blockwise_triton.dequantize_int4(q.to(DEVICE), scale.to(DEVICE), n).cpu()
    wanted = blockwise.dequantize_int4(q, scale, n)
    assert got.shape == wanted.shape
    # 64 values of at most 8 scales, over 8: fp32 is off by less than 64 · 2^-24 of their sum.
    assert ((got - wanted).abs() <= scale.float().repeat_interleave(64, -1)[:, :n] * 64 * 64 * 2.0**-24).all()


def test_any_bytes_of_int4_decode_to_finite_values() -> None:
    q = torch.zeros(1, 32, dtype=torch.uint8, device=DEVICE)
    scale = torch.full((1, 1), blockwise.INT4_MAX_SCALE, dtype=torch.bfloat16, device=DEVICE)
    assert blockwise_triton.dequantize_int4(q, scale, 64).isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_shows_in_its_scale(bad: float) -> None:
    x = torch.ones(2, 128, device=DEVICE)
    x[1, 70] = bad
    assert blockwise_triton.quantize_int8(x)[1].isfinite().tolist() == [[True, True], [True, False]]
    assert blockwise_triton.quantize_int4(x)[1].isfinite().tolist() == [[True, True], [True, False]]


def test_the_kernel_that_is_tried_first_starts() -> None:
    assert _starts(torch.device(DEVICE))


@pytest.mark.skipif(INTERPRETED, reason="needs a tensor on a GPU")
def test_the_public_functions_turn_to_triton_and_can_do_without() -> None:
    x, downs, ups, scales = _case(CASES["whole tiles"], torch.float32)
    assert runs_triton(x)
    assert not runs_triton(x.double())
    assert not runs_triton(x.cpu())
    product = grouped.grouped_low_rank(x, [32, 64], downs, ups, scales)
    assert torch.equal(product, grouped_triton.grouped_low_rank(x, [32, 64], downs, ups, scales))
    q, scale = blockwise.quantize_int4(x)
    with torch_only():
        assert not runs_triton(x)
        assert_close(product, grouped.grouped_low_rank(x, [32, 64], downs, ups, scales).double(), 1e-5)
        back = blockwise.dequantize_int4(*blockwise.quantize_int4(x), 128)
    assert_close(blockwise.dequantize_int4(q, scale, 128), back.double(), 1e-2)
    assert_close(blockwise.dequantize_int8(*blockwise.quantize_int8(x)), x.double(), 1e-2)
