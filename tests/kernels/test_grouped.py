"""The grouped low-rank product has the bits of each group by itself, and says what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from isthmus.kernels.grouped import grouped_low_rank

SIZES = [16, 0, 33, 128, 7, 64]
RANKS = [4, 8, 64, 16, 1, 0]


def _inputs(
    dtype: torch.dtype, inside: int = 96, out: int = 72
) -> tuple[Tensor, list[Tensor], list[Tensor], list[float]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(SIZES), inside, generator=generator).to(dtype).requires_grad_()
    downs = [torch.randn(rank, inside, generator=generator).to(dtype).requires_grad_() for rank in RANKS]
    ups = [torch.randn(out, rank, generator=generator).to(dtype).requires_grad_() for rank in RANKS]
    return x, downs, ups, [2.0, 1.0, 0.5, 16 / 3, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_and_gradients_have_the_bits_of_each_group_by_itself(dtype: torch.dtype) -> None:
    x, downs, ups, scales = _inputs(dtype)
    y = grouped_low_rank(x, SIZES, downs, ups, scales)
    of = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = torch.autograd.grad(y, [x, *downs, *ups], of)
    starts = [sum(SIZES[:group]) for group in range(len(SIZES))]
    for group, (start, size) in enumerate(zip(starts, SIZES, strict=True)):
        rows = slice(start, start + size)
        # A batch of one sequence, as a single process has it.
        alone = [x[None, rows].detach().requires_grad_(), downs[group], ups[group]]
        own = functional.linear(functional.linear(alone[0], alone[1]), alone[2]) * scales[group]
        assert torch.equal(y[rows], own[0])
        gradients = torch.autograd.grad(own, alone, of[None, rows])
        assert torch.equal(got[0][rows], gradients[0][0])
        assert torch.equal(got[1 + group], gradients[1])
        assert torch.equal(got[1 + len(SIZES) + group], gradients[2])


def test_a_group_without_rows_gets_zeros() -> None:
    x, downs, ups, scales = _inputs(torch.float32)
    grouped_low_rank(x, SIZES, downs, ups, scales).sum().backward()
    assert downs[1].grad is not None
    assert downs[1].grad.eq(0).all()
    assert grouped_low_rank(x[:0], [0], downs[:1], ups[:1], [1.0]).shape == (0, 72)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": []}, "for each group: got \\[0, 6, 6, 6\\]"),
        ({"scales": [1.0]}, "for each group: got \\[6, 6, 6, 1\\]"),
        ({"sizes": [16, 0, 33, 128, 7, 63]}, "do not make up an x of shape \\[248, 96\\]"),
        ({"sizes": [16, -1, 34, 128, 7, 64]}, "do not make up"),
        ({"x": torch.zeros(2, 124, 96)}, "2-D"),
        ({"x": torch.zeros(248, 95)}, "group 0 has A of shape \\[4, 96\\].*\\[r, 95\\] and \\[72, r\\] are needed"),
        ({"x": torch.zeros(248, 96, dtype=torch.bfloat16)}, "A in torch.float32 .* but x is in torch.bfloat16"),
        ({"ups": [torch.zeros(72, rank + 1) for rank in RANKS]}, "group 0 has .* B of shape \\[72, 5\\]"),
        ({"ups": [torch.zeros(72 + rank, rank) for rank in RANKS]}, "group 1 has .*\\[r, 96\\] and \\[76, r\\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    x, downs, ups, scales = _inputs(torch.float32)
    arguments = {"x": x, "sizes": SIZES, "downs": downs, "ups": ups, "scales": scales} | change
    with pytest.raises(ValueError, match=message):
        grouped_low_rank(**arguments)  # type: ignore[arg-type]  # wrong on purpose
