"""Block quantization keeps its bound, its shapes, and tells non-finite input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from isthmus.kernels.blockwise import (
    INT4_BYTES,
    INT4_MAX_SCALE,
    dequantize_int4,
    dequantize_int8,
    dequantize_weight,
    quantize_int4,
    quantize_int8,
    quantize_weight,
)

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def assert_bounded(x: torch.Tensor) -> None:
    q, scale = quantize_int8(x)
    back = dequantize_int8(q, scale)
    assert q.dtype == torch.int8
    assert q.shape == x.shape == back.shape
    assert scale.dtype == torch.float32
    assert scale.shape == (*x.shape[:-1], -(-x.shape[-1] // 64))
    assert scale.gt(0).all()
    bound = scale.double().repeat_interleave(64, -1)[..., : x.shape[-1]] * (0.5 + 1e-4)
    assert ((x.double() - back.double()).abs() <= bound).all()


@QUICK
@given(st.lists(floats, min_size=1, max_size=150))
@example([3.4028234663852886e38, -3.4028234663852886e38, 1.0])
@example([1.401298464324817e-45, 0.0])
@example([0.0] * 65)
def test_the_error_is_at_most_half_a_scale(values: list[float]) -> None:
    assert_bounded(torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(1,), (64,), (5, 65), (2, 3, 128), (2, 3, 4, 63)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert_bounded(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 100)


def test_an_outlier_spoils_only_its_own_block() -> None:
    x = torch.full((1, 128), 0.01)
    x[0, 0] = 24_412.0
    back = dequantize_int8(*quantize_int8(x))
    assert (back[0, 1:64] == 0).all()
    torch.testing.assert_close(back[0, 64:], x[0, 64:], rtol=1e-5, atol=0)


def test_zeros_stay_zeros() -> None:
    assert dequantize_int8(*quantize_int8(torch.zeros(3, 100))).eq(0).all()


def test_the_input_is_not_changed() -> None:
    x = torch.randn(4, 64)
    before = x.clone()
    quantize_int8(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_shows_in_its_scale(bad: float) -> None:
    x = torch.ones(2, 128)
    x[1, 70] = bad
    assert quantize_int8(x)[1].isfinite().tolist() == [[True, True], [True, False]]


def test_half_precision_and_strided_input() -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).T
    assert_bounded(x)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1,), (64,), (5, 65), (2, 3, 127), (7, 128)])
def test_a_weights_error_is_at_most_half_a_scale(shape: tuple[int, ...], bits: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    q, scale = quantize_weight(x, bits)
    back = dequantize_weight(q, scale, shape[-1], bits)
    assert scale.dtype == torch.bfloat16
    assert scale.shape == (*shape[:-1], -(-shape[-1] // 64))
    assert q.shape == (*shape[:-1], shape[-1] if bits == 8 else -(-shape[-1] // 2))
    assert q.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert back.shape == x.shape
    bound = scale.float().repeat_interleave(64, -1)[..., : shape[-1]] * (0.5 + 1e-4)
    assert ((x - back).abs() <= bound).all()
    assert not torch.equal(x, back)


@QUICK
@given(st.lists(floats.map(lambda value: value * 1e-3), min_size=1, max_size=150), st.sampled_from([8, 4]))
@example([1.401298464324817e-45, 0.0, 1e-38], 8)
def test_quantizing_a_quantized_weight_changes_nothing(values: list[float], bits: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    once = quantize_weight(x, bits)
    back = dequantize_weight(*once, len(values), bits)
    again = quantize_weight(back, bits)
    assert torch.equal(dequantize_weight(*again, len(values), bits), back)


def test_four_bits_lie_two_in_a_byte_the_earlier_in_the_lower_half() -> None:
    q, scale = quantize_weight(torch.tensor([7.0, -7.0, 1.0]), 4)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [15 | 1 << 4, 9 | 8 << 4]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weights_nan_shows_in_its_scale(bits: int) -> None:
    x = torch.ones(2, 128)
    x[1, 70] = float("nan")
    assert quantize_weight(x, bits)[1].isfinite().tolist() == [[True, True], [True, False]]


def assert_blocks_bounded(x: torch.Tensor) -> None:
    q, scale = quantize_int4(x)
    n, blocks = x.shape[-1], -(-x.shape[-1] // 64)
    back = dequantize_int4(q, scale, n)
    assert (q.dtype, scale.dtype, back.dtype) == (torch.uint8, torch.bfloat16, torch.float32)
    assert q.shape == (*x.shape[:-1], blocks * INT4_BYTES)
    assert scale.shape == (*x.shape[:-1], blocks)
    assert back.shape == x.shape
    assert scale.gt(0).all()
    error = torch.nn.functional.pad(x.double() - back.double(), (0, -n % 64)).unflatten(-1, (-1, 64)).norm(dim=-1)
    assert (error <= 4.001 * scale.double()).all()


@QUICK
@given(st.lists(floats.map(lambda value: value * 2.0**-9), min_size=1, max_size=150))
@example([0.0] * 65)
@example([1e36] * 64)
@example([1e-38, -1e-42])
def test_int4_is_at_most_half_a_scale_off_in_the_rotated_block(values: list[float]) -> None:
    assert_blocks_bounded(torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(1,), (64,), (5, 65), (2, 3, 128), (2, 3, 4, 63)])
def test_int4_takes_any_shape(shape: tuple[int, ...]) -> None:
    assert_blocks_bounded(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 100)


def test_int4_of_normal_values_is_a_tenth_off() -> None:
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(1))
    error = dequantize_int4(*quantize_int4(x), 576) - x
    assert 0.09 < error.norm() / x.norm() < 0.12


def test_rotation_keeps_what_stands_beside_a_large_value() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    x[:, 3] = 30.0
    plain = (dequantize_weight(*quantize_weight(x, 4), 64, 4) - x).norm()
    rotated = (dequantize_int4(*quantize_int4(x), 64) - x).norm()
    assert rotated < plain / 2


def test_int4_keeps_gradients_that_fp16_takes_for_zero() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    small = dequantize_int4(*quantize_int4(x * 2.0**-60), 64)
    assert torch.equal(small * 2.0**60, dequantize_int4(*quantize_int4(x), 64))


def test_int4_zeros_stay_zeros() -> None:
    assert dequantize_int4(*quantize_int4(torch.zeros(3, 100)), 100).eq(0).all()


def test_int4_gives_the_same_bits_under_autocast() -> None:
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    q, scale = quantize_int4(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, same = quantize_int4(x)
        assert torch.equal(dequantize_int4(again, same, 128), dequantize_int4(q, scale, 128))
    assert torch.equal(q, again)
    assert torch.equal(scale, same)


def test_int4_does_not_change_its_input() -> None:
    x = torch.randn(4, 64)
    before = x.clone()
    quantize_int4(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_shows_in_its_int4_scale(bad: float) -> None:
    x = torch.ones(2, 128)
    x[1, 70] = bad
    assert quantize_int4(x)[1].isfinite().tolist() == [[True, True], [True, False]]


def test_any_bytes_of_int4_decode_to_finite_values() -> None:
    q = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    assert dequantize_int4(q, torch.full((4, 2), INT4_MAX_SCALE, dtype=torch.bfloat16), 128).isfinite().all()
    assert dequantize_int4(torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[INT4_MAX_SCALE]]), 64).isfinite().all()
