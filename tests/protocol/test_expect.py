"""What an edge has not asked for is refused by a message's first frame, before anything is allocated for it."""

from __future__ import annotations

import pytest
import torch
from support.protocol.wire import new_edge, new_pair

from isthmus.common.errors import FrameError, LimitError, LocalProtocolError
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import body_bytes, pack
from isthmus.protocol.secure.framing import MAX_CONTROLS
from isthmus.protocol.session import CloudSession, EdgeSession, Incomplete, Received
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS, Role, encode


def deliver(frames: list[bytes], receiver: EdgeSession | CloudSession) -> list[m.Message]:
    events = [receiver.receive(frame) for frame in frames]
    return [event.message for event in events if isinstance(event, Received)]


BLOB = m.Blob("config.json", 0, 5000, bytes(32), bytes(5000))


def test_an_answer_as_large_as_was_asked_for_is_taken_and_a_larger_one_is_not() -> None:
    edge, cloud = new_pair()
    edge.expect(5000)
    assert deliver(list(cloud.send(BLOB)), edge) == [BLOB]
    edge.expect(4999)
    (frame,) = cloud.send(BLOB)
    with pytest.raises(LimitError, match="5000 bytes is refused: at most 4999 were asked for"):
        edge.receive(frame)
    assert edge.closed


def test_nothing_is_allocated_for_what_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    edge, cloud = new_pair()
    edge.expect(0)
    frames = cloud.send(m.Blob("x", 0, 200 << 20, bytes(32), memoryview(bytearray(8 << 20))))
    opened: list[int] = []
    assert edge._opener is not None
    monkeypatch.setattr(edge._opener, "_decrypt", lambda *_: opened.append(1))
    with pytest.raises(LimitError):
        edge.receive(next(frames))
    assert not opened
    assert edge._opener._message is None


def test_an_answer_without_a_body_passes_where_none_is_expected() -> None:
    edge, cloud = new_pair()
    edge.expect(0)
    said = m.Status(m.StatusCode.OK, None, "x" * 1000)
    assert deliver(list(cloud.send(said)), edge) == [said]


def test_until_it_says_so_an_edge_takes_what_its_limits_accept() -> None:
    edge, cloud = new_pair()
    assert deliver(list(cloud.send(BLOB)), edge) == [BLOB]
    edge.expect(0)
    edge.expect(None)
    assert deliver(list(cloud.send(BLOB)), edge) == [BLOB]


def test_nothing_is_expected_of_a_session_that_does_not_stand() -> None:
    edge = new_edge()
    with pytest.raises(LocalProtocolError, match="not open"):
        edge.expect(0)


@pytest.mark.parametrize("codec", ACTIVATION_CODECS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 33), (3, 5, 576)])
def test_the_bytes_of_a_tensor_are_known_beforehand(codec: str, shape: tuple[int, ...]) -> None:
    payload = encode(torch.randn(shape), codec, Role.ACTIVATION)
    _, body = pack(m.ForwardReply(m.CallId(0, 1), payload, 0, 0, 0))
    assert sum(map(len, body)) == body_bytes(codec, shape)


@pytest.mark.parametrize("up", [True, False])
def test_a_key_does_not_change_for_ever_without_a_message(up: bool) -> None:
    sender, receiver = new_pair() if up else new_pair()[::-1]
    for _ in range(2):
        for _ in range(MAX_CONTROLS):
            assert receiver.receive(sender.rekey()) == Incomplete()
        deliver(list(sender.send(m.Goodbye("a message"))), receiver)
    for _ in range(MAX_CONTROLS):
        receiver.receive(sender.rekey())
    with pytest.raises(FrameError, match="more than 16 control frames"):
        receiver.receive(sender.rekey())
    assert receiver.closed
