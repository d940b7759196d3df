"""Codecs: how a tensor becomes bytes and bytes become a tensor.

Rules
    1. A payload says what its tensor is for (`Role`), how it is coded, and its shape. Sizes in bytes follow from
       these three, so a receiver compares them, and what the tensor takes in fp32, with its limits, and with the
       bytes that are there, before it allocates anything.
    2. Activations and gradients are finite: `encode` sends no NaN and no infinity, and `decode` takes none.
    3. `encode` does not copy where the tensor's memory already is the encoding (fp32 by `fp32`, bf16 by `bf16`, …):
       the buffers are views of the tensor and keep it alive. `decode` does not copy where the bytes already are a
       tensor of the wanted dtype; the tensor then shares the receiving buffer.
    4. A new codec is one entry of `CODECS`. An id is never reused.

Theory of operation
    name    id  buffers (little-endian)                                     exact
    fp32     1  n x 4 bytes                                                 yes
    bf16     2  n x 2 bytes                                                 for bf16 input
    fp16     3  n x 2 bytes; values beyond 65504 are refused                for fp16 input
    int8     4  scales fp32 (one per 64 of the last dimension), then int8   no: |error| <= scale / 2
    mask     5  one bit per element, first element in the highest bit       yes, for zeros and ones
    int32    6  n x 4 bytes                                                 yes, within 32 bits
    int4     7  scales bf16 (one per 64 of the last dimension), then 32     no
                bytes per 64, rotated (see `isthmus.kernels.blockwise`)
    int4-outliers
             8  outlier channels' indices int32, ascending; their values    no
                bf16; then int4 of the tensor with zeros in their places

    A channel is one place of the last dimension. Outliers are the 1 in 100, rounded up, with the largest mean absolute
    value over the tensor: in activations the same few stand out at nearly every token. Gradients have hardly any.
"""

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isthmus.common.errors import (
    ConfigError,
    LimitError,
    MessageError,
    NonFiniteError,
    ReceivedNonFiniteError,
    RemoteProtocolError,
    UnsupportedCallError,
)
from isthmus.kernels.transfer import to_device, to_host
from isthmus.protocol import block_codecs as blocks
from isthmus.protocol.block_codecs import Parts, Shape
from isthmus.protocol.limits import DEFAULT_LIMITS, Buffer, Limits

if sys.byteorder != "little":
    raise ImportError("isthmus writes tensors in little-endian order and runs on little-endian machines only")

MAX_DIM = (1 << 32) - 1
FP16_END = 65520.0
"""From here on fp16 rounds to infinity."""


class Role(enum.IntEnum):
    """What a tensor is for. It travels with the tensor, so that both sides and the codec can tell one from another."""

    ACTIVATION = 1
    GRADIENT = 2
    INDEX = 4
    """Which tokens and which places: attention masks and position ids."""


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to turn a tensor into bytes.

    Attributes:
        name: the name that users and configuration files write.
        id: the number on the wire.
        activation: whether activations and gradients may use it (the others are for masks and positions).
        parts: the dtype and the shape of each buffer, for a tensor's shape.
        encode: a contiguous tensor, and what messages call it, to one tensor for each buffer.
        decode: the tensors of the buffers, and the tensor's shape, to the tensor.
    """

    name: str
    id: int
    activation: bool
    parts: Callable[[Shape], Parts]
    encode: Callable[[Tensor, str], tuple[Tensor, ...]]
    decode: Callable[[tuple[Tensor, ...], Shape], Tensor]

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        """Bytes of each buffer. Python's integers, which do not overflow."""
        return tuple(math.prod(dims) * dtype.itemsize for dtype, dims in self.parts(shape))


@dataclass(frozen=True, slots=True)
class Payload:
    """An encoded tensor: how it is coded, what it is for, its shape, and its bytes."""

    codec: int
    role: Role
    shape: tuple[int, ...]
    buffers: tuple[Buffer, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, padding between them not counted."""
        return sum(len(buffer) for buffer in self.buffers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Payload):
            return NotImplemented
        mine, theirs = (self.codec, self.role, self.shape), (other.codec, other.role, other.shape)
        # Compared as bytes: memoryviews of tensors do not compare by content across formats.
        return mine == theirs and [bytes(b) for b in self.buffers] == [bytes(b) for b in other.buffers]

    __hash__ = None  # type: ignore[assignment]  # the standard way to make a class with mutable buffers unhashable


def encode(tensor: Tensor, codec: str, role: Role, what: str = "") -> Payload:
    """Encode a tensor.

    Args:
        tensor: rank 1 to 4, no empty dimension, on any device, where it is encoded; what comes of it is copied to the
            CPU.
        codec: a name of `CODECS`.
        role: what the tensor is for.
        what: what an error calls it; its role by default.

    Returns:
        The payload. Its buffers may be views of the tensor: do not change the tensor before they are sent.

    Raises:
        ConfigError: there is no such codec.
        NonFiniteError: a value is NaN or infinite, beyond 65504 by `fp16`, or beyond 1e36 by `int4*`.
        UnsupportedCallError: the shape, or a mask's or position's value, cannot be carried.
    """
    entry = CODECS.get(codec)
    if entry is None:
        raise ConfigError(f"unknown codec {codec!r}: choose one of {', '.join(CODECS)}")
    shape = tuple(tensor.shape)
    if not 1 <= len(shape) <= DEFAULT_LIMITS.max_rank or not all(1 <= dim <= MAX_DIM for dim in shape):
        raise UnsupportedCallError(
            f"a tensor of shape {list(shape)} cannot be sent: rank 1 to 4 and no empty dimension is needed"
        )
    parts = entry.encode(tensor.detach().contiguous(), what or f"this {role.name.lower()}")
    return Payload(codec=entry.id, role=role, shape=shape, buffers=tuple(map(_view, parts)))


def decode(
    payload: Payload,
    *,
    dtype: torch.dtype | None = None,
    limits: Limits = DEFAULT_LIMITS,
    what: str = "",
    device: torch.device | None = None,
) -> Tensor:
    """Decode a payload to a tensor of its shape.

    Args:
        payload: as received or as encoded.
        dtype: the wanted dtype; by default fp32 for activations, int64 for masks and positions.
        limits: what this side accepts.
        what: what an error calls the tensor; its role by default.
        device: where it is decoded, to which its bytes are copied as they came; by default the CPU. Masks are decoded
            on the CPU in any case.

    Returns:
        The tensor. Where the bytes already have the wanted dtype it shares the payload's memory: keep the payload's
        buffer unchanged for as long as the tensor is used.

    Raises:
        MessageError, LimitError: the codec is unknown, the bytes do not fit the shape, or this is over a limit.
        ReceivedNonFiniteError: an activation or a gradient holds NaN or infinity.
    """
    entry = codec_by_id(payload.codec)
    sizes = checked_sizes(entry, payload.shape, limits)
    got = tuple(len(buffer) for buffer in payload.buffers)
    if got != sizes:
        raise MessageError(f"a {entry.name} tensor of shape {list(payload.shape)} takes {sizes} bytes, not {got}")
    parts = zip(payload.buffers, entry.parts(payload.shape), strict=True)
    there = device if entry.activation else None
    tensor = entry.decode(tuple(to_device(_tensor(buffer, *part), there) for buffer, part in parts), payload.shape)
    tensor = to_device(tensor, device).to(dtype or (torch.float32 if entry.activation else torch.int64))
    if entry.activation and not is_finite(tensor):
        raise ReceivedNonFiniteError(
            f"{what or f'the {payload.role.name.lower()}'} of shape {list(payload.shape)} came with NaN or infinite "
            "values, which no side of this release sends. Use the same release on both sides, or ask who runs the other"
        )
    return tensor


def decode_as(
    payload: Payload, shape: torch.Size, codec: str, limits: Limits, what: str, device: torch.device | None = None
) -> Tensor:
    """Decode an activation or a gradient that is of the shape and in the codec that were asked for.

    Raises:
        RemoteProtocolError: It is another one.
        MessageError, LimitError, ReceivedNonFiniteError: See `decode`.
    """
    if payload.shape != tuple(shape):
        raise RemoteProtocolError(f"the cloud answered with shape {list(payload.shape)} instead of {list(shape)}")
    check_codec(payload, codec)
    return decode(payload, limits=limits, what=what, device=device)


def check_codec(payload: Payload, codec: str) -> None:
    """Refuse another codec than the one asked for, which would be coarser without a word, or larger once decoded.

    Raises:
        RemoteProtocolError: It is another one.
    """
    if payload.codec != codec_id(codec):
        raise RemoteProtocolError(
            f"the cloud answered in the codec {codec_by_id(payload.codec).name} instead of {codec}"
        )


def check_hidden(payload: Payload, role: Role) -> None:
    """Check that a tensor is one of hidden states or of their gradients, `[batch, length, hidden]`.

    Raises:
        MessageError: It is another one.
    """
    fits = len(payload.shape) == 3 and payload.role == role != Role.INDEX and codec_by_id(payload.codec).activation
    if not fits:
        raise MessageError(
            f"a tensor of shape {list(payload.shape)}, role {payload.role.name}, codec id {payload.codec} is refused: "
            f"[batch, length, hidden] of role {role.name} is needed"
        )


def encode_mask(mask: Tensor) -> Payload:
    """Encode an attention mask of zeros and ones (bool or any number type), one bit per token."""
    return encode(mask, "mask", Role.INDEX)


def encode_positions(position_ids: Tensor) -> Payload:
    """Encode position ids."""
    return encode(position_ids, "int32", Role.INDEX)


def codec_by_id(number: int) -> Codec:
    """Find the codec that a peer named.

    Raises:
        MessageError: no codec has this id.
    """
    entry = _BY_ID.get(number)
    if entry is None:
        raise MessageError(f"unknown codec id {number}: the other side may run a newer version")
    return entry


def codec_id(name: str) -> int:
    """Give the wire's number of an activation codec that a user named.

    Raises:
        ConfigError: there is no such codec.
    """
    if name not in ACTIVATION_CODECS:
        raise ConfigError(f"unknown codec {name!r}: choose one of {', '.join(ACTIVATION_CODECS)}")
    return CODECS[name].id


def checked_sizes(entry: Codec, shape: tuple[int, ...], limits: Limits) -> tuple[int, ...]:
    """Compute the bytes of each buffer of a remote tensor, allocating nothing.

    Raises:
        LimitError: rank, a dimension, or the number of bytes, as it comes or in fp32, is over the limit.
        MessageError: a dimension is empty.
    """
    if not 1 <= len(shape) <= limits.max_rank:
        raise LimitError(f"a tensor of rank {len(shape)} is refused: rank 1 to {limits.max_rank} is accepted")
    if any(dim < 1 for dim in shape):
        raise MessageError(f"a tensor of shape {list(shape)} is refused: a dimension is empty")
    if any(dim > MAX_DIM for dim in shape):
        raise LimitError(f"a tensor of shape {list(shape)} is refused: a dimension is over {MAX_DIM}")
    sizes = entry.sizes(shape)
    largest = max(sum(sizes), math.prod(shape) * 4)  # a narrow codec's tensor is several times larger than its bytes
    if largest > limits.max_message_bytes:
        raise LimitError(
            f"a {entry.name} tensor of shape {list(shape)} takes {largest} bytes: "
            f"{limits.max_message_bytes} are accepted"
        )
    return sizes


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor of any shape but an empty one holds neither NaN nor infinity.

    The smallest and the largest value tell it, as NaN passes through both. That takes a CPU a tenth of the time of
    `torch.isfinite`, which writes a tensor of answers first.
    """
    lowest, highest = torch.aminmax(tensor)
    return bool((lowest > -math.inf) & (highest < math.inf))  # NaN compares as false


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied from a CPU; the view keeps the tensor's memory alive."""
    flat: npt.NDArray[np.uint8] = to_host(tensor).reshape(-1).view(torch.uint8).numpy()
    return flat.data


def _tensor(buffer: Buffer, dtype: torch.dtype, shape: Shape) -> Tensor:
    """A tensor over a buffer: shared where the buffer is writable and aligned, else copied."""
    view = memoryview(buffer)
    if view.readonly or np.frombuffer(view, np.uint8).ctypes.data % dtype.itemsize:
        view = memoryview(bytearray(view))
    return torch.frombuffer(view, dtype=dtype).view(shape)


def _plain(name: str, number: int, dtype: torch.dtype) -> Codec:
    """A codec whose bytes are the tensor's own in one float dtype."""

    def plain_encode(tensor: Tensor, what: str) -> tuple[Tensor, ...]:
        converted = tensor.to(dtype)
        if not is_finite(converted):
            raise blocks.cannot_carry(name, what, "NaN or infinite")
        return (converted,)

    return Codec(name, number, True, lambda shape: ((dtype, shape),), plain_encode, _only)


def _only(parts: tuple[Tensor, ...], shape: Shape) -> Tensor:
    return parts[0]


def _fp16_encode(tensor: Tensor, what: str) -> tuple[Tensor, ...]:
    # Checked before the conversion, so that the message can say how large. NaN fails the test, too.
    lowest, highest = torch.aminmax(tensor.to(torch.float32))
    largest = float(torch.maximum(-lowest, highest))
    if not largest < FP16_END:
        raise NonFiniteError(
            f"fp16 cannot carry {what}: the largest absolute value is {largest:g}, the format ends at 65504. Use the "
            "codec bf16 or fp32."
        )
    return (tensor.to(torch.float16),)


def _mask_parts(shape: Shape) -> Parts:
    return ((torch.uint8, (-(-math.prod(shape) // 8),)),)


def _mask_encode(tensor: Tensor, what: str) -> tuple[Tensor, ...]:
    bits = tensor.to(torch.bool)
    if tensor.dtype != torch.bool and not bool((tensor == bits).all()):
        raise UnsupportedCallError("an attention mask holds zeros and ones: pass a 2-D mask of tokens, no additive one")
    return (torch.from_numpy(np.packbits(bits.cpu().numpy().reshape(-1))),)


def _mask_decode(parts: tuple[Tensor, ...], shape: Shape) -> Tensor:
    count, packed = math.prod(shape), parts[0].numpy()
    if count % 8 and int(packed[-1]) & ((1 << (8 - count % 8)) - 1):
        raise MessageError(f"a mask of shape {list(shape)} has bits set behind its last element")
    return torch.from_numpy(np.unpackbits(packed, count=count)).view(shape)


def _int32_encode(tensor: Tensor, what: str) -> tuple[Tensor, ...]:
    narrow = tensor.to(torch.int32)
    if not bool((narrow == tensor).all()):
        raise UnsupportedCallError(f"position ids up to {float(tensor.max()):g} do not fit whole numbers of 32 bits")
    return (narrow,)


CODECS: dict[str, Codec] = {
    entry.name: entry
    for entry in (
        _plain("fp32", 1, torch.float32),
        _plain("bf16", 2, torch.bfloat16),
        replace(_plain("fp16", 3, torch.float16), encode=_fp16_encode),
        Codec("int8", 4, True, blocks.int8_parts, blocks.int8_encode, blocks.int8_decode),
        Codec("mask", 5, False, _mask_parts, _mask_encode, _mask_decode),
        Codec("int32", 6, False, lambda shape: ((torch.int32, shape),), _int32_encode, _only),
        Codec("int4", 7, True, blocks.int4_parts, blocks.int4_encode, blocks.int4_decode),
        Codec("int4-outliers", 8, True, blocks.outliers_parts, blocks.outliers_encode, blocks.outliers_decode),
    )
}
_BY_ID = {entry.id: entry for entry in CODECS.values()}
ACTIVATION_CODECS: tuple[str, ...] = tuple(entry.name for entry in CODECS.values() if entry.activation)
"""Names of the codecs that activations and gradients may use."""
