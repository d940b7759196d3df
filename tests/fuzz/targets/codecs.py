"""Codecs: the bytes of a tensor of any codec, role and shape."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch
from fuzz.target import Cursor, Target
from support.protocol.example_messages import tensor

from isthmus.common.errors import ReceivedNonFiniteError, RemoteProtocolError
from isthmus.protocol import block_codecs, tensor_codecs
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import (
    ACTIVATION_CODECS,
    Payload,
    Role,
    decode,
    encode,
    encode_mask,
    encode_positions,
)

LIMITS = Limits(max_message_bytes=1 << 14)
_EXACT = ("fp32", "bf16", "fp16", "mask", "int32")


def _run(data: bytes) -> None:
    script = Cursor(data)
    number, shape = script.number(), tuple(script.number("H") for _ in range(script.number() % 6))
    try:
        sizes = tensor_codecs.checked_sizes(tensor_codecs.codec_by_id(number), shape, LIMITS)
    except RemoteProtocolError:
        sizes = ()
    if sum(sizes) > LIMITS.max_message_bytes or (sizes and math.prod(shape) * 4 > LIMITS.max_message_bytes):
        raise AssertionError(f"a tensor of shape {shape} is larger than the limit")
    # Bytes that are missing are zeros, so that most inputs get as far as the codec.
    buffers = tuple(bytearray(script.take(size).ljust(size, b"\0")) for size in sizes)
    payload = Payload(number, Role.ACTIVATION, shape, (*buffers, *((script.rest(),) if script else ())))
    try:
        decoded = decode(payload, limits=LIMITS)
    except (RemoteProtocolError, ReceivedNonFiniteError):
        return
    name = tensor_codecs.codec_by_id(number).name
    if tuple(decoded.shape) != shape:
        raise AssertionError(f"{name} gives shape {tuple(decoded.shape)} for {shape}")
    if name in ACTIVATION_CODECS and not bool(decoded.isfinite().all()):
        raise AssertionError(f"{name} gives values that are not finite")
    if name in _EXACT:
        again = encode(decoded, name, Role.ACTIVATION)
        if [bytes(each) for each in again.buffers] != [bytes(each) for each in payload.buffers]:
            raise AssertionError(f"{name} gives other bytes when it is encoded again")


def _input(payload: Payload) -> bytes:
    head = bytes((payload.codec, len(payload.shape))) + struct.pack(f"<{len(payload.shape)}H", *payload.shape)
    return head + b"".join(payload.buffers)


def _seeds() -> Iterator[bytes]:
    for codec in ACTIVATION_CODECS:
        for shape in ((1, 2, 3), (2, 1, 130), (201,)):
            yield _input(tensor(codec, shape=shape))
    yield _input(encode_mask(torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 1]])))
    yield _input(encode_positions(torch.tensor([[0, 1, 1 << 30]])))
    yield _input(tensor()) + b"one too many"
    yield bytes((9, 1, 1, 0))
    yield bytes((1, 5)) + bytes((1, 0)) * 5


TARGET = Target(
    _run,
    _seeds,
    [
        decode,
        tensor_codecs.checked_sizes,
        tensor_codecs.codec_by_id,
        tensor_codecs._tensor,
        block_codecs.int8_decode,
        block_codecs.int4_decode,
        block_codecs.outliers_decode,
        tensor_codecs._mask_decode,
    ],
    floor=0.9,
    max_len=2048,
)
