"""Frames of sealed sessions: how a message becomes frames and is kept within limits, and what is wiped afterwards."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.protocol.sealed import SECRET, SESSION, both_ends, message_frames
from support.protocol.wire import SMALL

from isthmus.common.errors import FrameError, LimitError, LocalProtocolError
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure import record as record_layer
from isthmus.protocol.secure.framing import PREFIX, TAG, Direction, wipe
from isthmus.protocol.secure.record import Opener, Sealer

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def test_frames_are_made_when_they_are_asked_for() -> None:
    sealer, opener = both_ends()
    body = bytearray(b"a" * 200)
    frames = sealer.seal(b"h", [body])
    opener.open(next(frames))
    body[:] = b"b" * 200
    opened = [opener.open(frame) for frame in frames][-1]
    assert opened is not None
    assert bytes(opened.body) == b"a" * 64 + b"b" * 136


@QUICK
@given(st.lists(st.binary(max_size=200), max_size=8), st.binary(min_size=1, max_size=50), st.integers(1, 130))
def test_buffers_of_any_sizes_are_laid_one_after_another(parts: list[bytes], header: bytes, chunk: int) -> None:
    sealer, opener = both_ends(Limits(chunk_bytes=chunk))
    for _ in range(2):
        opened = [opener.open(frame) for frame in sealer.seal(header, parts)]
        assert opened[:-1] == [None] * (len(opened) - 1)
        last = opened[-1]
        assert last is not None
        assert (bytes(last.header), bytes(last.body)) == (header, b"".join(parts))


def test_what_was_gathered_to_be_sealed_is_wiped() -> None:
    sealer, opener = both_ends()
    for parts in ([b"a" * 30, b"b" * 30], [b"a" * 70, b"b" * 70], [b"a" * 10, b"b" * 200]):
        opened = [opener.open(frame) for frame in sealer.seal(b"h", parts)][-1]
        assert opened is not None
        assert bytes(opened.body) == b"".join(parts)
        assert len(sealer._scratch) in (60, 64)
        assert not any(sealer._scratch)


def test_the_receiver_keeps_its_own_limit() -> None:
    sealer = both_ends()[0]
    opener = Opener(bytearray(SECRET), SESSION, Direction.EDGE_TO_CLOUD, replace(SMALL, max_message_bytes=199))
    with pytest.raises(LimitError, match="200 bytes"):
        opener.open(next(sealer.seal(b"h", [bytes(200)])))
    with pytest.raises(LocalProtocolError, match="smaller batch"):
        both_ends(replace(SMALL, max_message_bytes=199))[0].seal(b"h", [bytes(200)])
    with pytest.raises(LocalProtocolError, match="header"):
        both_ends(replace(SMALL, max_header_bytes=3))[0].seal(b"four", [])


def test_of_a_body_that_is_more_than_is_kept_every_chunk_is_authenticated_and_dropped() -> None:
    sealer = both_ends()[0]
    opener = Opener(bytearray(SECRET), SESSION, Direction.EDGE_TO_CLOUD, SMALL, keep=199)
    frames = list(sealer.seal(b"large", [bytes(200)]))
    for frame in frames[:-1]:
        assert opener.open(frame) is None
        assert opener._message is not None
        assert opener._message.body == b""
    opened = opener.open(frames[-1])
    assert opened is not None
    assert (bytes(opened.header), bytes(opened.body), opened.size) == (b"large", b"", 200)
    whole = [opener.open(frame) for frame in sealer.seal(b"kept", [bytes((7,)) * 199])][-1]
    assert whole is not None
    assert (bytes(whole.header), bytes(whole.body), whole.size) == (b"kept", bytes((7,)) * 199, 199)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_forged_chunk_is_refused_also_where_it_would_be_dropped(index: int) -> None:
    frames = list(both_ends()[0].seal(b"large", [bytes(200)]))
    opener = Opener(bytearray(SECRET), SESSION, Direction.EDGE_TO_CLOUD, SMALL, keep=10)
    for frame in frames[:index]:
        opener.open(frame)
    with pytest.raises(FrameError, match="not authentic"):
        opener.open(frames[index][:-1] + bytes((frames[index][-1] ^ 1,)))


def test_what_is_dropped_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    wiped: list[bytes] = []

    def note(*buffers: bytearray | memoryview) -> None:
        wiped.extend(bytes(buffer) for buffer in buffers)
        wipe(*buffers)

    text = b"a letter of forty-two bytes, or nearly so."
    opener = Opener(bytearray(SECRET), SESSION, Direction.EDGE_TO_CLOUD, SMALL, keep=10)
    (frame,) = both_ends()[0].seal(b"h", [text])
    monkeypatch.setattr(record_layer, "wipe", note)
    opener.open(frame)
    assert wiped == [text]


def test_a_forged_chunk_leaves_no_plaintext_behind() -> None:
    frames = message_frames()
    _, opener = both_ends()
    opener.open(frames[0])
    assert opener._message is not None
    header, body = opener._message.header, opener._message.body
    assert bytes(body[:64]) == bytes(range(64))
    with pytest.raises(FrameError, match="not authentic"):
        opener.open(frames[1][:-1] + bytes((frames[1][-1] ^ 1,)))
    assert bytes(body) == bytes(200)
    assert not any(header)


def test_closing_overwrites_the_secrets_and_ends_a_message_under_way() -> None:
    secret, other = bytearray(SECRET), bytearray(SECRET)
    sealer = Sealer(secret, SESSION, Direction.EDGE_TO_CLOUD, SMALL)
    opener = Opener(other, SESSION, Direction.EDGE_TO_CLOUD, SMALL)
    frames = sealer.seal(b"h", [bytes(200)])
    opener.open(next(frames))
    sealer.close()
    opener.close()
    assert secret == other == bytes(32)
    with pytest.raises(LocalProtocolError, match="closed while"):
        next(frames)
    with pytest.raises(LocalProtocolError, match="closed"):
        sealer.seal(b"h", [])
    with pytest.raises(LocalProtocolError, match="closed"):
        sealer.rekey()


def test_a_message_must_be_taken_whole_before_the_next() -> None:
    sealer, _ = both_ends()
    frames = sealer.seal(b"h", [bytes(200)])
    with pytest.raises(LocalProtocolError, match="not all taken"):
        sealer.seal(b"h", [])
    with pytest.raises(LocalProtocolError, match="not all taken"):
        sealer.rekey()
    for _ in range(4):
        next(frames)
    assert next(frames, None) is None
    list(sealer.seal(b"h", []))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="31"):
        Sealer(bytearray(31), SESSION, Direction.EDGE_TO_CLOUD)


def test_wipe() -> None:
    buffer = bytearray(b"\1" * 200_001)
    wipe(buffer, memoryview(bytearray(3)))
    assert not any(buffer)
    floats = torch.ones(1000)
    wipe(memoryview(floats.numpy()))
    assert floats.eq(0).all()
    with pytest.raises(TypeError):
        wipe(memoryview(b"x"))


def test_the_prefix_has_the_documented_layout() -> None:
    assert PREFIX.size == 34
    (frame,) = message_frames(8)
    assert struct.unpack("!4sBBIQIHHQ", frame[:34]) == (b"ISTH", 16, 13, 0, 0, 11, 0, 1, 8)
    assert len(frame) == PREFIX.size + 11 + TAG + 8 + TAG
