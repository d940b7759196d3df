"""The two codecs of four bits: what they keep, what they take, and what they refuse to read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from isthmus.common.errors import LimitError, MessageError, NonFiniteError, ReceivedNonFiniteError
from isthmus.protocol.limits import DEFAULT_LIMITS, Buffer
from isthmus.protocol.tensor_codecs import Payload, Role, checked_sizes, codec_by_id, codec_id, decode, encode

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
INT4 = ["int4", "int4-outliers"]
shapes = st.tuples(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 230)).map(lambda it: (*it[0], it[1]))


def hidden(rows: int = 32, n: int = 192, outliers: bool = True) -> torch.Tensor:
    """Normal values; with two channels that are far larger at every token, as hidden states have them."""
    x = torch.randn(1, rows, n, generator=torch.Generator().manual_seed(3))
    if outliers:
        x[..., 70] = x[..., 70] * 10 + 200
        x[..., 100] *= 50
    return x


def relative_error(x: torch.Tensor, codec: str) -> float:
    return float((decode(encode(x, codec, Role.ACTIVATION)) - x).norm() / x.norm())


def replaced(payload: Payload, place: int, buffer: Buffer) -> Payload:
    buffers = list(payload.buffers)
    buffers[place] = buffer
    return Payload(payload.codec, payload.role, payload.shape, tuple(buffers))


@QUICK
@given(shapes, st.sampled_from(INT4), st.integers(0, 1000))
def test_any_shape_comes_back_close_and_takes_the_bytes_foretold(shape: tuple[int, ...], codec: str, seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    payload = encode(x, codec, Role.GRADIENT)
    assert tuple(len(b) for b in payload.buffers) == checked_sizes(codec_by_id(payload.codec), shape, DEFAULT_LIMITS)
    back = decode(payload)
    assert back.shape == x.shape
    # The worst block: 64 rotated values, each half a scale off, and a scale is a seventh of at most the block's norm.
    assert (back - x).norm() <= x.norm() * (4.1 / 7)


@pytest.mark.parametrize("codec", INT4)
def test_the_same_tensor_gives_the_same_bytes(codec: str) -> None:
    x = hidden()
    assert encode(x, codec, Role.GRADIENT) == encode(x.clone(), codec, Role.GRADIENT)


def test_outliers_come_through_and_spare_the_others() -> None:
    x = hidden()
    back = decode(encode(x, "int4-outliers", Role.ACTIVATION))
    torch.testing.assert_close(back[..., [70, 100]], x[..., [70, 100]], rtol=2**-8, atol=0)
    others = [channel for channel in range(192) if channel not in (70, 100)]
    error = (back - x)[..., others].norm() / x[..., others].norm()
    assert 0.05 < error < 0.12  # what int4 makes of normal values
    assert relative_error(x, "int4-outliers") < relative_error(x, "int4") / 2


def test_without_outliers_both_are_the_same() -> None:
    x = hidden(outliers=False)
    assert abs(relative_error(x, "int4-outliers") - relative_error(x, "int4")) < 0.005


def test_one_large_token_does_not_decide_which_channels_stand_out() -> None:
    x = hidden(rows=512)
    x[0, 0, 5] = 5_000.0
    channels = torch.frombuffer(bytearray(encode(x, "int4-outliers", Role.ACTIVATION).buffers[0]), dtype=torch.int32)
    assert channels.tolist() == [70, 100]


def test_a_single_channel_is_an_outlier() -> None:
    x = torch.tensor([[1.0], [-2.5]])
    assert torch.equal(decode(encode(x, "int4-outliers", Role.ACTIVATION)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("codec", INT4)
def test_other_dtypes(codec: str, dtype: torch.dtype) -> None:
    x = hidden().to(dtype)
    assert encode(x, codec, Role.ACTIVATION) == encode(x.float(), codec, Role.ACTIVATION)
    assert decode(encode(x, codec, Role.ACTIVATION), dtype=dtype).dtype == dtype


@pytest.mark.parametrize("codec", INT4)
def test_what_would_overflow_is_refused(codec: str) -> None:
    assert decode(encode(torch.full((2, 640), 1e36), codec, Role.ACTIVATION)).isfinite().all()
    with pytest.raises(NonFiniteError, match=rf"{codec} cannot carry this gradient.*too large"):
        encode(torch.full((2, 640), 3e38), codec, Role.GRADIENT)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("codec", INT4)
def test_scales_that_overflow_are_refused(codec: str, scale: float) -> None:
    payload = encode(torch.ones(1, 1, 128), codec, Role.ACTIVATION)
    scales = torch.tensor([1.0, scale]).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with pytest.raises(ReceivedNonFiniteError, match="activation of shape"):
        decode(replaced(payload, -2, scales))


@pytest.mark.parametrize("channels", [[3, 3], [4, 3], [-1, 3], [3, 192], [3, 2**31 - 1], [-(2**31), 2**31 - 1]])
def test_outlier_channels_that_are_none_are_refused(channels: list[int]) -> None:
    payload = encode(hidden(), "int4-outliers", Role.ACTIVATION)
    raw = torch.tensor(channels, dtype=torch.int32).view(torch.uint8).numpy().tobytes()
    with pytest.raises(MessageError, match="do not ascend"):
        decode(replaced(payload, 0, raw))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_outliers_are_refused(value: float) -> None:
    payload = encode(torch.ones(1, 1, 2), "int4-outliers", Role.ACTIVATION)
    raw = torch.tensor([value]).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with pytest.raises(ReceivedNonFiniteError, match="activation of shape"):
        decode(replaced(payload, 1, raw))


@QUICK
@given(st.data(), st.sampled_from(INT4))
def test_any_bytes_are_decoded_to_finite_values_or_refused(data: st.DataObject, codec: str) -> None:
    shape = (2, 70)
    sizes = checked_sizes(codec_by_id(codec_id(codec)), shape, DEFAULT_LIMITS)
    buffers = tuple(data.draw(st.binary(min_size=size, max_size=size)) for size in sizes)
    try:
        x = decode(Payload(codec_id(codec), Role.ACTIVATION, shape, buffers))
    except (MessageError, ReceivedNonFiniteError):
        return
    assert x.shape == shape
    assert x.isfinite().all()


@pytest.mark.parametrize("codec", INT4)
def test_sizes_are_compared_before_anything_is_allocated(codec: str) -> None:
    huge = (1 << 32) - 1
    for shape in ((huge, huge), (1, huge), (1 << 20, 576)):
        with pytest.raises(LimitError):
            decode(Payload(codec_id(codec), Role.ACTIVATION, shape, (b"",)))
    with pytest.raises(MessageError, match="takes"):
        decode(replaced(encode(torch.ones(1, 64), codec, Role.ACTIVATION), -1, bytes(31)))
