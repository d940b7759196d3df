"""The codecs that quantize blocks of 64 values: a tensor to the tensors that cross in its place, and back.

`isthmus.protocol.tensor_codecs` lists them, says what each of these tensors is, and makes bytes of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.common.errors import MessageError, NonFiniteError
from isthmus.kernels.blockwise import (
    BLOCK,
    INT4_BYTES,
    INT4_MAX_SCALE,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
)

CHANNELS_PER_OUTLIER = 100
"""One channel in so many is an outlier, by `int4-outliers`. Part of the wire format; no other share was measured."""

Shape = tuple[int, ...]
Parts = tuple[tuple[torch.dtype, Shape], ...]
"""The dtype and the shape of each tensor that crosses."""


def cannot_carry(codec: str, what: str, values: str) -> NonFiniteError:
    """The error of a tensor, called `what`, whose values a codec does not carry."""
    return NonFiniteError(
        f"{codec} cannot carry {what} with {values} values: lower the learning rate or the loss scale, look for bad "
        "values in the adapter, or use a wider codec or dtype"
    )


def _scales(shape: Shape) -> Shape:
    """The shape of a tensor's scales: one for each block of the last dimension."""
    return (*shape[:-1], -(-shape[-1] // BLOCK))


def int8_parts(shape: Shape) -> Parts:
    """Scales and values."""
    return (torch.float32, _scales(shape)), (torch.int8, shape)


def int8_encode(tensor: Tensor, what: str) -> tuple[Tensor, ...]:
    """Raises NonFiniteError for NaN and infinity."""
    q, scale = quantize_int8(tensor)
    if not bool(scale.isfinite().all()):
        raise cannot_carry("int8", what, "NaN or infinite")
    return scale, q


def int8_decode(parts: tuple[Tensor, ...], shape: Shape) -> Tensor:
    """Of any bytes: what becomes of bad scales is not finite."""
    scale, q = parts
    return dequantize_int8(q, scale)


def int4_parts(shape: Shape) -> Parts:
    """Scales, and 32 bytes for each block."""
    scales = _scales(shape)
    return (torch.bfloat16, scales), (torch.uint8, (*shape[:-1], scales[-1] * INT4_BYTES))


def int4_encode(tensor: Tensor, what: str, name: str = "int4") -> tuple[Tensor, ...]:
    """Raises NonFiniteError for NaN, infinity, and what is beyond 1e36."""
    q, scale = quantize_int4(tensor)
    if not bool((scale <= INT4_MAX_SCALE).all()):  # NaN fails the test, too
        raise cannot_carry(name, what, "NaN, infinite or far too large")
    return scale, q


def int4_decode(parts: tuple[Tensor, ...], shape: Shape) -> Tensor:
    """Of any bytes: what becomes of bad scales is not finite."""
    scale, q = parts
    return dequantize_int4(q, scale, shape[-1])


def _outliers(channels: int) -> int:
    return -(-channels // CHANNELS_PER_OUTLIER)


def outliers_parts(shape: Shape) -> Parts:
    """The outlier channels' indices and values, then the parts of `int4`."""
    count = _outliers(shape[-1])
    return (torch.int32, (count,)), (torch.bfloat16, (*shape[:-1], count)), *int4_parts(shape)


def outliers_encode(tensor: Tensor, what: str) -> tuple[Tensor, ...]:
    """Raises NonFiniteError as `int4_encode` does."""
    rows = tensor.to(torch.float32).view(-1, tensor.shape[-1])
    count = _outliers(tensor.shape[-1])
    channels = rows.abs().mean(0).topk(count).indices.sort().values
    outliers = rows[:, channels].to(torch.bfloat16)
    if not bool(outliers.isfinite().all()):
        raise cannot_carry("int4-outliers", what, "NaN, infinite or far too large")
    rest = int4_encode(rows.index_fill(1, channels, 0.0), what, "int4-outliers")
    return channels.to(torch.int32), outliers, *rest


def outliers_decode(parts: tuple[Tensor, ...], shape: Shape) -> Tensor:
    """Raises MessageError where the channels do not ascend within the tensor."""
    indices, outliers, *rest = parts
    channels = indices.to(torch.int64)
    if int(channels[0]) < 0 or int(channels[-1]) >= shape[-1] or not bool((channels.diff() > 0).all()):
        raise MessageError(f"the outlier channels of an int4 tensor of shape {list(shape)} do not ascend within it")
    return int4_decode(tuple(rest), shape).index_copy_(-1, channels, outliers.to(torch.float32))
