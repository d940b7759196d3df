"""Codecs: round trips, bounds, refusals, no copies where none is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.protocol.wire import unchecked

from isthmus.common.errors import (
    ConfigError,
    LimitError,
    MessageError,
    NonFiniteError,
    ReceivedNonFiniteError,
    RemoteProtocolError,
    UnsupportedCallError,
)
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import (
    ACTIVATION_CODECS,
    CODECS,
    Payload,
    Role,
    codec_by_id,
    codec_id,
    decode,
    encode,
    encode_mask,
    encode_positions,
)

QUICK = settings(max_examples=50, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def random(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 30


@QUICK
@given(shapes, st.integers(0, 1000))
def test_fp32_is_exact(shape: tuple[int, ...], seed: int) -> None:
    x = random(shape, seed)
    assert torch.equal(decode(encode(x, "fp32", Role.GRADIENT)), x)


def test_fp32_carries_every_finite_bit_pattern() -> None:
    x = torch.tensor([0x7F7FFFFF, -(1 << 31), 1, -0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert torch.equal(decode(encode(x, "fp32", Role.ACTIVATION)).view(torch.int32), x.view(torch.int32))


@QUICK
@given(shapes, st.sampled_from([("bf16", 2**-8), ("fp16", 2**-11)]), st.integers(0, 1000))
def test_halves_round_once(shape: tuple[int, ...], codec: tuple[str, float], seed: int) -> None:
    name, relative = codec
    x = random(shape, seed)
    back = decode(encode(x, name, Role.ACTIVATION))
    assert back.dtype == torch.float32
    assert ((x - back).abs() <= relative * x.abs() + 1e-7).all()
    assert torch.equal(decode(encode(back, name, Role.ACTIVATION)), back)


@QUICK
@given(shapes.map(lambda shape: (*shape[:-1], shape[-1] * 29)), st.integers(0, 1000))
def test_int8_keeps_its_bound(shape: tuple[int, ...], seed: int) -> None:
    x = random(shape, seed)
    back = decode(encode(x, "int8", Role.ACTIVATION))
    assert (x - back).abs().amax() <= x.abs().amax() / 127 * 0.501


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16"])
def test_the_dtype_of_choice(codec: str) -> None:
    x = random((2, 3, 4)).to(torch.bfloat16)
    assert decode(encode(x, codec, Role.ACTIVATION), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(decode(encode(x, codec, Role.ACTIVATION), dtype=torch.bfloat16), x)


@pytest.mark.parametrize("codec", ACTIVATION_CODECS)
def test_strided_input_equals_contiguous_input(codec: str) -> None:
    x = random((6, 5, 70)).transpose(0, 1)
    assert encode(x, codec, Role.ACTIVATION) == encode(x.contiguous(), codec, Role.ACTIVATION)


def test_bytes_per_element() -> None:
    x = random((4, 128, 576))
    got = {name: encode(x, name, Role.ACTIVATION).nbytes / x.numel() for name in ACTIVATION_CODECS}
    outliers = (6 * 2 * 4 * 128 + 6 * 4) / x.numel()  # of 576 channels six: values per token, indices once
    assert got == {
        "fp32": 4.0,
        "bf16": 2.0,
        "fp16": 2.0,
        "int8": 1.0625,
        "int4": 0.53125,
        "int4-outliers": 0.53125 + outliers,
    }


def test_encoding_fp32_is_a_view_and_decoding_shares_the_buffer() -> None:
    x = random((2, 3, 4))
    payload = encode(x, "fp32", Role.ACTIVATION)
    x[0, 0, 0] = 99.0
    body = bytearray(payload.buffers[0])
    received = Payload(payload.codec, payload.role, payload.shape, (memoryview(body),))
    y = decode(received)
    assert y[0, 0, 0] == 99.0
    body[:4] = bytes(4)
    assert y[0, 0, 0] == 0.0


def test_a_misaligned_buffer_is_read_right() -> None:
    x = random((2, 3, 4))
    raw = bytearray(b"\1") + bytes(encode(x, "fp32", Role.ACTIVATION).buffers[0])
    assert torch.equal(decode(Payload(1, Role.ACTIVATION, (2, 3, 4), (memoryview(raw)[1:],))), x)


def test_gradients_are_detached() -> None:
    x = random((2, 2)).requires_grad_()
    assert not decode(encode(x, "fp32", Role.GRADIENT)).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codec", ACTIVATION_CODECS)
def test_non_finite_values_are_not_sent(codec: str, bad: float) -> None:
    x = torch.ones(1, 2, 64)
    encode(x, codec, Role.GRADIENT)
    x[0, 1, 5] = bad
    with pytest.raises(NonFiniteError, match=rf"{codec} cannot carry this gradient"):
        encode(x, codec, Role.GRADIENT)
    with pytest.raises(NonFiniteError, match=rf"{codec} cannot carry the gradient of a matrix"):
        encode(x, codec, Role.GRADIENT, "the gradient of a matrix")


def test_what_rounds_to_infinity_is_not_sent() -> None:
    with pytest.raises(NonFiniteError, match="bf16 cannot carry this activation"):
        encode(torch.full((1, 2, 64), 3.4e38), "bf16", Role.ACTIVATION)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("place", [0, 63, 127])
def test_non_finite_values_are_not_taken(codec: str, bad: float, place: int) -> None:
    x = torch.ones(1, 2, 64)
    assert torch.equal(decode(unchecked(x, codec, Role.GRADIENT)), x)
    x.view(-1)[place] = bad
    with pytest.raises(ReceivedNonFiniteError, match=r"the gradient of shape \[1, 2, 64\] came with NaN or infinite"):
        decode(unchecked(x, codec, Role.GRADIENT))
    with pytest.raises(ReceivedNonFiniteError, match="the leased matrix of shape"):
        decode(unchecked(x, codec, Role.GRADIENT), what="the leased matrix")


def test_a_non_finite_tensor_has_an_exit_code_of_its_own() -> None:
    assert ReceivedNonFiniteError.exit_code == 36
    assert issubclass(ReceivedNonFiniteError, NonFiniteError)  # who catches the one stops at the other, too
    assert not issubclass(ReceivedNonFiniteError, RemoteProtocolError)  # which a link answers by asking again


def test_fp16_names_the_value_and_the_remedy() -> None:
    with pytest.raises(NonFiniteError, match=r"24412000.*bf16|2\.4412e\+07.*bf16"):
        encode(torch.full((1, 1, 8), -24_412_000.0), "fp16", Role.ACTIVATION)
    assert decode(encode(torch.full((1, 1, 8), 65_504.0), "fp16", Role.ACTIVATION)).eq(65_504.0).all()


@QUICK
@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 1000))
def test_masks(batch: int, length: int, seed: int) -> None:
    mask = torch.randint(0, 2, (batch, length), generator=torch.Generator().manual_seed(seed))
    for dtype in (torch.int64, torch.bool, torch.float32):
        payload = encode_mask(mask.to(dtype))
        assert payload.nbytes == -(-batch * length // 8)
        assert torch.equal(decode(payload), mask)
    assert decode(payload, dtype=torch.bool).dtype == torch.bool


def test_a_mask_of_other_values_is_refused() -> None:
    with pytest.raises(UnsupportedCallError, match="zeros and ones"):
        encode_mask(torch.tensor([[0.0, -1e9]]))


def test_stray_bits_of_a_mask_are_refused() -> None:
    with pytest.raises(MessageError, match="behind its last"):
        decode(Payload(CODECS["mask"].id, Role.INDEX, (1, 3), (b"\xff",)))


def test_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 2**31 - 1], [-1, 0, 5, 9]])
    assert torch.equal(decode(encode_positions(positions)), positions)
    with pytest.raises(UnsupportedCallError, match="32 bits"):
        encode_positions(torch.tensor([[2**31]]))


def test_non_finite_scales_are_refused() -> None:
    scale = torch.tensor([float("nan")]).numpy().tobytes()
    with pytest.raises(ReceivedNonFiniteError, match="activation of shape"):
        decode(Payload(codec_id("int8"), Role.ACTIVATION, (1, 1, 2), (scale, b"\0\0")))
    largest = torch.tensor([3.4e38]).numpy().tobytes()
    with pytest.raises(ReceivedNonFiniteError, match="activation of shape"):
        decode(Payload(codec_id("int8"), Role.ACTIVATION, (1, 1, 2), (largest, b"\0\2")))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1, 1, 1, 1)])
def test_shapes_that_cannot_be_sent(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedCallError, match="rank 1 to 4"):
        encode(torch.zeros(shape), "fp32", Role.ACTIVATION)


def test_remote_shapes_are_checked_before_anything_is_allocated() -> None:
    huge = (1 << 32) - 1
    for shape in ((huge, huge, huge, huge), (1 << 26, 1, 1)):
        with pytest.raises(LimitError):
            decode(Payload(1, Role.ACTIVATION, shape, (b"",)), limits=Limits(max_message_bytes=1 << 20))
    with pytest.raises(LimitError, match="rank 5"):
        decode(Payload(1, Role.ACTIVATION, (1,) * 5, (b"\0" * 4,)))
    with pytest.raises(MessageError, match="empty"):
        decode(Payload(1, Role.ACTIVATION, (0, 1), (b"",)))
    with pytest.raises(MessageError, match="takes"):
        decode(Payload(1, Role.ACTIVATION, (2,), (b"\0" * 7,)))


@pytest.mark.parametrize("codec", ACTIVATION_CODECS)
def test_a_narrow_codec_is_no_way_around_the_limit(codec: str) -> None:
    payload = encode(torch.ones(1, 2, 64), codec, Role.ACTIVATION)
    assert decode(payload, limits=Limits(max_message_bytes=512)).shape == (1, 2, 64)
    with pytest.raises(LimitError, match="512 bytes"):
        decode(payload, limits=Limits(max_message_bytes=511))


def test_names_and_numbers() -> None:
    assert [codec_by_id(codec_id(name)).name for name in ACTIVATION_CODECS] == list(ACTIVATION_CODECS)
    assert ACTIVATION_CODECS == ("fp32", "bf16", "fp16", "int8", "int4", "int4-outliers")
    assert len({entry.id for entry in CODECS.values()}) == len(CODECS)
    with pytest.raises(ConfigError, match=r"'int2'.*fp32"):
        encode(torch.ones(1), "int2", Role.ACTIVATION)
    with pytest.raises(ConfigError, match="'mask'"):
        codec_id("mask")
    with pytest.raises(MessageError, match="99"):
        codec_by_id(99)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "int8"])
def test_a_tensor_on_a_gpu_has_the_same_bytes(codec: str) -> None:
    tensor = torch.randn(3, 5, 130, generator=torch.Generator().manual_seed(0))
    assert encode(tensor.cuda(), codec, Role.ACTIVATION) == encode(tensor, codec, Role.ACTIVATION)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ACTIVATION_CODECS)
def test_a_tensor_is_decoded_on_a_gpu_as_on_the_cpu(codec: str) -> None:
    sent = encode(torch.randn(3, 5, 130, generator=torch.Generator().manual_seed(0)), codec, Role.ACTIVATION)
    there = decode(sent, device=torch.device("cuda"))
    assert there.is_cuda
    assert torch.equal(there.cpu(), decode(sent))
    positions = decode(encode_positions(torch.arange(3)[None]), device=torch.device("cuda"))
    assert positions.is_cuda


@pytest.mark.gpu
def test_masks_and_positions_on_a_gpu_have_the_same_bytes() -> None:
    mask, positions = torch.tensor([[1, 1, 0]]), torch.arange(3)[None]
    assert encode_mask(mask.cuda()) == encode_mask(mask)
    assert encode_positions(positions.cuda()) == encode_positions(positions)
