"""Messages of calls without sites for the tiny model, and what a session answers to them."""

from __future__ import annotations

import torch
from support.models.tiny import HIDDEN

from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Role, codec_id, encode, encode_mask, encode_positions

FP32 = codec_id("fp32")


def hidden(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def span_inputs(
    shape: tuple[int, ...] = (2, 6, HIDDEN),
    mask: tuple[int, ...] | None = None,
    positions: tuple[int, ...] | None = None,
) -> m.SpanInputs:
    return m.SpanInputs(
        encode(hidden(*shape), "fp32", Role.ACTIVATION),
        None if mask is None else encode_mask(torch.ones(mask, dtype=torch.long)),
        None if positions is None else encode_positions(torch.zeros(positions, dtype=torch.long)),
    )


def forward(inputs: m.SpanInputs, *, keep: bool = True, call: int = 1, codec: int = FP32) -> m.Forward:
    return m.Forward(m.CallId(1, call), keep, inputs.hidden, inputs.attention_mask, inputs.position_ids, codec)


def backward(shape: tuple[int, ...], *, call: int = 1, replay: m.SpanInputs | None = None) -> m.Backward:
    return m.Backward(m.CallId(1, call, 3), encode(hidden(*shape), "fp32", Role.GRADIENT), replay, FP32)


def refusal(answer: m.Message | Exception | None, code: m.StatusCode = m.StatusCode.BAD_REQUEST) -> str:
    assert isinstance(answer, m.Status)
    assert answer.code == code
    return answer.message
