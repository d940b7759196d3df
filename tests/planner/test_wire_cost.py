"""Bytes against real frames."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.planner.wire_cost import Traffic, Wire, answer_header, frame_bytes, lease_header, question_header, sizes
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack
from isthmus.protocol.limits import MIB
from isthmus.protocol.secure.framing import KEY_BYTES, Direction
from isthmus.protocol.secure.record import Sealer
from isthmus.protocol.tensor_codecs import (
    ACTIVATION_CODECS,
    Payload,
    Role,
    codec_id,
    encode,
    encode_mask,
    encode_positions,
)

CALL = m.CallId(7, 9)


def framed(message: m.Message) -> int:
    """Bytes of the frames that a session would send."""
    return sealed(*pack(message))


def sealed(header: bytes, body: list[bytes] | list[memoryview] | list[bytearray]) -> int:
    sealer = Sealer(bytearray(KEY_BYTES), bytes(16), Direction.EDGE_TO_CLOUD)
    return sum(len(frame) for frame in sealer.seal(header, body))


def tensor(width: int, codec: str, role: Role = Role.ACTIVATION) -> Payload:
    return encode(torch.randn(3, 5, width), codec, role)


@given(header=st.integers(1, 500), body=st.sampled_from([0, 1, 15, 4096, MIB - 1, MIB, MIB + 1, 2 * MIB + 7]))
def test_frames_are_counted_as_they_are_sealed(header: int, body: int) -> None:
    assert frame_bytes(header, body) == sealed(bytes(header), [bytes(body)])


@pytest.mark.parametrize("codec", ACTIVATION_CODECS)
def test_a_call_takes_what_its_real_messages_take(codec: str) -> None:
    wire = Wire(3, 5, 96, WireCodecs.parse(codec))
    mask, up = encode_mask(torch.ones(3, 5)), tensor(96, codec)
    forward = wire.forward()
    assert forward.up == framed(m.Forward(CALL, True, up, mask, None, codec_id(codec)))
    assert forward.down == framed(m.ForwardReply(CALL, tensor(96, codec), 1, 2, 3))
    gradient = tensor(96, codec, Role.GRADIENT)
    backward = wire.backward()
    assert backward.up == framed(m.Backward(CALL, gradient, None, codec_id(codec)))
    assert backward.down == framed(m.BackwardReply(CALL, gradient, 1, 2, 3, False))
    assert wire.backward(wanted=False).down == framed(m.BackwardReply(CALL, None, 1, 2, 3, False))
    assert (forward + backward).round_trips == 2
    assert (forward + backward).elements == {codec: 4 * 15 * 96}


@pytest.mark.parametrize("codec", ACTIVATION_CODECS)
def test_a_decode_step_takes_what_its_real_messages_take(codec: str) -> None:
    up, positions = encode(torch.randn(1, 5, 96), codec, Role.ACTIVATION), encode_positions(torch.arange(5)[None])
    found = Wire(1, 5, 96, WireCodecs.parse(codec)).decode()
    assert found.up == framed(m.Decode(CALL, 3, 70, (), (), up, None, positions, codec_id(codec)))
    assert found.down == framed(m.ForwardReply(CALL, up, 1, 2, 3))
    assert (found.round_trips, found.elements) == (1, {codec: 2 * 5 * 96})


def test_each_direction_has_its_own_codec() -> None:
    wire = Wire(2, 64, 128, WireCodecs("fp32", "bf16", "int8", "fp16"))
    assert wire.forward().elements == {"fp32": 16384, "bf16": 16384}
    assert wire.backward().elements == {"int8": 16384, "fp16": 16384}
    body = 2 * 64 * 128
    assert 4 * body < wire.forward().up < 4 * body + 200
    assert 2 * body < wire.forward().down < 2 * body + 200
    assert body * 1.0625 < wire.backward().up < body * 1.0625 + 200
    assert 2 * body < wire.backward().down < 2 * body + 200


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_pause_takes_what_its_real_messages_take(codec: str) -> None:
    wire = Wire(3, 5, 96, WireCodecs.parse(codec))
    x, deltas = tensor(96, codec), (tensor(96, codec), tensor(32, codec))
    pause = wire.pause("forward", 2, [96], [96, 32])
    assert pause.down == framed(m.SiteQuestion(CALL, m.SitePhase.FORWARD, (4, 6), (x,), 1, 2, 3))
    assert pause.up == framed(m.SiteAnswer(CALL, deltas))
    assert pause.round_trips == 1
    gradients = tuple(tensor(width, codec, Role.GRADIENT) for width in (96, 32))
    pause = wire.pause("backward", 2, [96, 32], [])
    assert pause.down == framed(m.SiteQuestion(CALL, m.SitePhase.BACKWARD_ONLY, (4, 6), gradients, 1, 2, 3))
    assert pause.up == framed(m.SiteAnswer(CALL, ()))


def test_headers_of_many_tensors_are_those_of_real_messages() -> None:
    gradients = tuple(tensor(8, "fp32", Role.GRADIENT) for _ in range(5))
    question = m.SiteQuestion(CALL, m.SitePhase.BACKWARD, (0, 1, 2, 3, 4), gradients, 1, 2, 3)
    assert question_header(5, 5) == sizes(question)[0]
    assert answer_header(5) == sizes(m.SiteAnswer(CALL, gradients))[0]


def test_taps_come_down_with_the_forward() -> None:
    wire = Wire(2, 64, 128, WireCodecs())
    plain, tapped = wire.forward(), wire.forward(taps=[128, 32])
    assert tapped.up == plain.up
    hidden, *taps = (encode(torch.zeros(2, 64, width), "fp32", Role.ACTIVATION) for width in (128, 128, 32))
    assert tapped.down == framed(m.ForwardReply(CALL, hidden, 1, 2, 3, tuple(taps)))
    assert tapped.round_trips == 1
    assert tapped.elements["fp32"] - plain.elements["fp32"] == 2 * 64 * 160


def test_a_leased_adapter_goes_up_and_its_gradients_come_down() -> None:
    leased = Wire(1, 1, 8, WireCodecs()).leasing([(8, 576), (576, 8)] * 100)
    down, up = (encode(torch.zeros(shape), "fp32", Role.ACTIVATION) for shape in ((8, 576), (576, 8)))
    assert leased.up == framed(m.Lease(7, 3, (m.LeasedWeights(down, up, 2.5),) * 100))
    assert leased.up == leased.down == pytest.approx(100 * 2 * 8 * 576 * 4, rel=0.01)
    assert leased.round_trips == 0


def test_more_leased_sites_than_a_message_carries_take_more_messages() -> None:
    assert lease_header(2 * m.MAX_SITES + 1) == 2 * lease_header(m.MAX_SITES) + lease_header(1)


def test_traffic_adds_and_scales() -> None:
    wire = Wire(2, 64, 128, WireCodecs())
    twice = wire.forward() + wire.forward()
    scaled = wire.forward() * 2
    assert (twice.up, twice.down, twice.round_trips, twice.elements) == (
        scaled.up,
        scaled.down,
        scaled.round_trips,
        scaled.elements,
    )
    assert (wire.forward() + Traffic()).total == wire.forward().total
