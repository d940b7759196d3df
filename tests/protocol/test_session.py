"""Messages over sealed sessions: each passes whole, unless its sender may not send it or its receiver not keep it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.protocol.sealed import deliver
from support.protocol.wire import (
    SMALL,
    TENANT,
    cloud_messages,
    edge_messages,
    finish_established,
    forward,
    new_cloud,
    new_edge,
    new_pair,
)

from isthmus.common.errors import FrameError, LocalProtocolError, MessageError
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.secure.framing import PREFIX, TAG
from isthmus.protocol.session import CloudSession, EdgeSession, Oversized
from isthmus.protocol.tensor_codecs import decode


@pytest.fixture(scope="module")
def long_lived() -> tuple[EdgeSession, CloudSession]:
    return new_pair(limits=SMALL)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.one_of(edge_messages.map(lambda x: (True, x)), cloud_messages.map(lambda x: (False, x))))
def test_any_message_passes_a_session_whole(
    long_lived: tuple[EdgeSession, CloudSession], case: tuple[bool, m.Message]
) -> None:
    up, message = case
    sender, receiver = long_lived if up else long_lived[::-1]
    assert deliver(list(sender.send(message)), receiver) == [message]


def test_a_large_message_takes_chunks_of_a_mebibyte() -> None:
    edge, cloud = new_pair()
    message = forward((1, 512, 1500))
    frames = list(edge.send(message))
    assert [len(frame) for frame in frames[:2]] == [
        PREFIX.size + len(pack(message)[0]) + TAG + (1 << 20) + TAG,
        PREFIX.size + (1 << 20) + TAG,
    ]
    assert len(frames) == 3
    (read,) = deliver(frames, cloud)
    assert isinstance(read, m.Forward)
    assert torch.equal(decode(read.hidden), decode(message.hidden))


def test_nothing_of_a_message_is_readable() -> None:
    edge, _ = new_pair()
    message = forward((1, 4, 64))
    assert bytes(message.hidden.buffers[0])[:16] not in b"".join(edge.send(message))


def test_reflected_and_cross_session_frames_are_refused() -> None:
    edge, cloud = new_pair()
    frames = list(edge.send(forward()))
    with pytest.raises(FrameError):
        edge.receive(frames[0])
    assert edge.closed
    other_edge, other_cloud = new_pair()
    with pytest.raises(FrameError):
        other_cloud.receive(frames[0])
    assert deliver(frames, cloud) == [forward()]
    with pytest.raises(LocalProtocolError, match="not open"):
        edge.send(forward())
    with pytest.raises(LocalProtocolError):
        other_cloud.receive(next(iter(other_edge.send(forward()))))


def test_messages_of_the_wrong_side_are_refused() -> None:
    edge, cloud = new_pair()
    with pytest.raises(LocalProtocolError, match="Forward is not a message that this side sends"):
        cloud.send(forward())
    edge._sends = (*edge._sends, m.Status)
    with pytest.raises(MessageError, match="Status"):
        deliver(list(edge.send(m.Status(m.StatusCode.OK, None, ""))), cloud)
    assert cloud.closed


def test_a_malformed_message_kills_the_session() -> None:
    edge, cloud = new_pair()
    assert edge._sealer is not None
    (frame,) = edge._sealer.seal(b"\xff", [])
    with pytest.raises(MessageError, match="not a protobuf"):
        cloud.receive(frame)
    assert cloud.closed


def test_a_cloud_keeps_nothing_of_a_message_over_its_tenants_quota() -> None:
    tenant = replace(TENANT, quota=Quota(max_inflight_bytes=250))
    edge, cloud = new_edge(), new_cloud(authorize=lambda key: tenant)
    finish_established(edge, cloud)
    large, body = forward((2, 4, 8)), 256 + 16  # the hidden states and the mask
    chunk = m.Put("adapter", 0, 251, bytes(32), bytes(251))
    answer = m.SiteAnswer(m.CallId(3, 2, 1), (large.hidden,))
    expected = [Oversized(m.Forward, large.id, body), Oversized(m.Put, None, 251)]
    expected.append(Oversized(m.SiteAnswer, answer.id, 256))
    for message, event in zip((large, chunk, answer), expected, strict=True):
        assert [cloud.receive(frame) for frame in edge.send(message)] == [event]
    assert deliver(list(edge.send(m.Ping(1))), cloud) == [m.Ping(1)]


def test_a_message_that_is_dropped_is_one_that_the_other_side_may_send() -> None:
    edge, cloud = new_edge(), new_cloud(authorize=lambda key: replace(TENANT, quota=Quota(max_inflight_bytes=9)))
    finish_established(edge, cloud)
    assert edge._sealer is not None
    (frame,) = edge._sealer.seal(*pack(m.Blob("a", 0, 10, bytes(32), bytes(10))))
    with pytest.raises(MessageError, match="Blob is not a message"):
        cloud.receive(frame)
    assert cloud.closed
