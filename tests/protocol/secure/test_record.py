"""Sealed sessions: any message passes whole, and no frame passes that is not exactly the next one."""

from __future__ import annotations

import gc
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings, strategies as st
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

from isthmus.common.errors import (
    FrameError,
    LimitError,
    LocalProtocolError,
    MessageError,
    RemoteProtocolError,
    VersionError,
)
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.limits import DEFAULT_LIMITS, Buffer, Limits
from isthmus.protocol.secure import framing, record as record_layer
from isthmus.protocol.secure.framing import PREFIX, TAG, VERSION, Direction, Kind, wipe
from isthmus.protocol.secure.record import Opener, Sealer
from isthmus.protocol.session import CloudSession, EdgeSession, Incomplete, Oversized, Received
from isthmus.protocol.tensor_codecs import decode

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
SESSION = bytes(range(16))
SECRET = bytes(range(32))


def both_ends(limits: Limits = SMALL, clock: Callable[[], float] = lambda: 0.0) -> tuple[Sealer, Opener]:
    up = Direction.EDGE_TO_CLOUD
    return Sealer(bytearray(SECRET), SESSION, up, limits, clock), Opener(bytearray(SECRET), SESSION, up, limits)


def deliver(frames: list[bytes], receiver: EdgeSession | CloudSession) -> list[m.Message]:
    events = [receiver.receive(frame) for frame in frames]
    assert all(isinstance(event, Received | Incomplete) for event in events)
    return [event.message for event in events if isinstance(event, Received)]


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


def test_nothing_of_a_message_is_readable() -> None:
    edge, _ = new_pair()
    message = forward((1, 4, 64))
    assert bytes(message.hidden.buffers[0])[:16] not in b"".join(edge.send(message))


def assert_refused(frames: list[bytes], error: type[Exception] = RemoteProtocolError) -> None:
    """Nothing is delivered, the fault is typed, and the session is dead afterwards."""
    _, opener = both_ends()
    for frame in frames[:-1]:
        try:
            assert opener.open(frame) is None
        except error:
            break
    else:
        with pytest.raises(error):
            opener.open(frames[-1])
    with pytest.raises(LocalProtocolError):
        opener.open(frames[0])


def message_frames(body: int = 200) -> list[bytes]:
    return list(both_ends()[0].seal(b"some header", [bytes(range(256))[:body]]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_flipped_bit_is_refused(data: st.DataObject) -> None:
    frames = message_frames()
    number = data.draw(st.integers(0, len(frames) - 1))
    frame = bytearray(frames[number])
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    _, opener = both_ends()
    for good in frames[:number]:
        assert opener.open(good) is None
    with pytest.raises((RemoteProtocolError, VersionError)):
        opener.open(frame)
    with pytest.raises(LocalProtocolError):
        opener.open(frames[number])


def test_every_bit_of_a_small_message_is_covered() -> None:
    (frame,) = message_frames(8)
    for bit in range(len(frame) * 8):
        changed = bytearray(frame)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((RemoteProtocolError, VersionError)):
            both_ends()[1].open(changed)


def test_a_plausible_change_of_the_prefix_is_refused_at_once() -> None:
    """A body of 200 or 201 bytes takes the same frames but the last: the first one is refused already."""
    frame = bytearray(message_frames()[0])
    frame[33] ^= 1
    with pytest.raises(FrameError, match="not authentic"):
        both_ends()[1].open(frame)


def test_every_cut_and_longer_frame_is_refused() -> None:
    for number, frame in enumerate(message_frames()):
        before = message_frames()[:number]
        for size in range(len(frame)):
            assert_refused([*before, frame[:size]], FrameError)
        for extra in (b"\0", b"\0" * TAG, frame):
            assert_refused([*before, frame + extra], FrameError)


def test_reordered_dropped_and_repeated_frames_are_refused() -> None:
    a, b, c, d = message_frames()
    for wrong in ([b], [a, a], [a, c], [a, c, b, d], [a, b, b], [a, b, d], [d, c, b, a], [a, b, c, c]):
        assert_refused(wrong, FrameError)


def test_a_repeated_message_is_refused() -> None:
    frames = message_frames()
    _, opener = both_ends()
    assert [opener.open(frame) is not None for frame in frames] == [False, False, False, True]
    with pytest.raises(FrameError, match="replayed"):
        opener.open(frames[0])


def test_chunks_of_two_messages_cannot_be_mixed() -> None:
    """Same key, same counter, same sizes: the chunk of one header does not open behind another."""
    ours = message_frames()
    theirs = list(both_ends()[0].seal(b"another one", [bytes(200)]))
    assert_refused([ours[0], theirs[1]], FrameError)


def test_frames_of_another_session_direction_or_key_are_refused() -> None:
    for sealer in (
        Sealer(bytearray(SECRET), bytes(16), Direction.EDGE_TO_CLOUD, SMALL),
        Sealer(bytearray(SECRET), SESSION, Direction.CLOUD_TO_EDGE, SMALL),
        Sealer(bytearray(32), SESSION, Direction.EDGE_TO_CLOUD, SMALL),
    ):
        assert_refused(list(sealer.seal(b"some header", [bytes(10)])), FrameError)


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


def claim(header: int = 11, chunk: int = 0, chunks: int = 1, body: int = 8, kind: int = Kind.DATA) -> bytes:
    return PREFIX.pack(b"ISTH", kind, VERSION, 0, 0, header, chunk, chunks, body) + bytes(60)


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (claim(body=1 << 60), LimitError),
        (claim(body=DEFAULT_LIMITS.max_message_bytes + 1, chunks=65535), LimitError),
        (claim(header=1 << 31), LimitError),
        (claim(header=0), FrameError),
        (claim(chunks=2), FrameError),
        (claim(chunks=0), FrameError),
        (claim(chunk=1, chunks=2, body=100), FrameError),
        (claim(body=DEFAULT_LIMITS.max_message_bytes, chunks=256), FrameError),
        (claim(kind=Kind.REKEY), FrameError),
        (claim(kind=99), FrameError),
        (b"", FrameError),
        (bytes(200), FrameError),
    ],
    ids=[
        "body",
        "limit",
        "header",
        "no header",
        "two chunks",
        "no chunk",
        "second",
        "short",
        "rekey",
        "kind",
        "empty",
        "zeros",
    ],
)
def test_claims_are_checked_before_anything_is_allocated(frame: bytes, error: type[Exception]) -> None:
    opener = Opener(bytearray(SECRET), SESSION, Direction.EDGE_TO_CLOUD)
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(error):
            opener.open(frame)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_an_unauthenticated_first_frame_of_the_right_size_allocates_no_body() -> None:
    limits = Limits(chunk_bytes=1 << 10)
    opener = Opener(bytearray(SECRET), SESSION, Direction.EDGE_TO_CLOUD, limits)
    frame = PREFIX.pack(b"ISTH", Kind.DATA, VERSION, 0, 0, 11, 0, 60_000, 60_000 << 10) + bytes(11 + TAG + 1024 + TAG)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            opener.open(frame)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


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


@pytest.mark.parametrize("up", [True, False])
def test_rekeying_by_hand_in_both_directions(up: bool) -> None:
    sender, receiver = new_pair() if up else new_pair()[::-1]
    for _ in range(3):
        assert receiver.receive(sender.rekey()) == Incomplete()
        assert len(deliver(list(sender.send(m.Goodbye("up"))), receiver)) == 1
        assert len(deliver(list(receiver.send(m.Goodbye("down"))), sender)) == 1
    assert sender._sealer is not None
    assert receiver._opener is not None
    assert sender._sealer._keys.epoch == receiver._opener._keys.epoch == 3
    assert receiver._sealer is not None
    assert receiver._sealer._keys.epoch == 0


def test_rekeying_by_bytes() -> None:
    sealer, opener = both_ends(replace(SMALL, rekey_bytes=400))
    epochs = []
    for number in range(6):
        frames = list(sealer.seal(b"h", [bytes((number,)) * 199]))
        opened = [opener.open(frame) for frame in frames]
        last = opened[-1]
        assert last is not None
        assert bytes(last.body) == bytes((number,)) * 199
        epochs.append((sealer._keys.epoch, opener._keys.epoch))
    assert epochs == [(0, 0), (0, 0), (1, 1), (1, 1), (2, 2), (2, 2)]


def test_rekeying_by_time() -> None:
    now = [0.0]
    sealer, opener = both_ends(replace(SMALL, rekey_seconds=10), clock=lambda: now[0])

    def send() -> int:
        for frame in sealer.seal(b"h", [bytes(10)]):
            opener.open(frame)
        assert sealer._keys.epoch == opener._keys.epoch
        return opener._keys.epoch

    assert send() == 0
    now[0] = 9.9
    assert send() == 0
    now[0] = 10.0
    assert send() == 1
    now[0] = 19.9
    assert send() == 1
    now[0] = 1000.0
    assert send() == 2


def test_rekeying_by_frames() -> None:
    sealer, opener = both_ends(replace(SMALL, rekey_frames=5))
    for _ in range(4):
        for frame in sealer.seal(b"h", [bytes(200)]):
            opener.open(frame)
    assert sealer._keys.epoch == opener._keys.epoch == 3


def test_a_key_change_is_authentic_in_its_place_and_once() -> None:
    sealer, opener = both_ends()
    change = sealer.rekey()
    changed = change[:-1] + bytes((change[-1] ^ 1,))
    assert_refused([changed], FrameError)
    assert_refused([change + b"\0"], FrameError)
    assert_refused([change, change], FrameError)
    assert_refused([message_frames()[0], change], FrameError)
    opener.open(change)
    with pytest.raises(FrameError):
        opener.open(message_frames()[0])  # sealed under the old key
    inside = both_ends()[0]
    frames = inside.seal(b"h", [bytes(200)])
    first = next(frames)
    inside._busy = False
    assert_refused([first, inside.rekey()], FrameError)


def test_what_is_taken_later_does_not_open_what_went_before() -> None:
    sealer, _ = both_ends()
    before = next(sealer.seal(b"h", [b"secret"]))
    sealer.rekey()
    later = bytearray(sealer._keys._secret)
    assert later != SECRET
    with pytest.raises(FrameError):
        Opener(later, SESSION, Direction.EDGE_TO_CLOUD, SMALL).open(before)


def test_no_nonce_is_used_twice_under_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[bytes, bytes]] = []

    class Recording:
        """The cipher, with a record of every key and nonce that sealed something."""

        def __init__(self, key: bytearray) -> None:
            self.key = bytes(key)
            self.cipher = AESGCM(key)

        def encrypt_into(self, nonce: bytes, data: Buffer, aad: bytes, into: memoryview) -> int:
            used.append((self.key, nonce))
            return self.cipher.encrypt_into(nonce, data, aad, into)

        def encrypt(self, nonce: bytes, data: bytes, aad: bytes) -> bytes:
            used.append((self.key, nonce))
            return self.cipher.encrypt(nonce, data, aad)

        def decrypt_into(self, nonce: bytes, data: Buffer, aad: bytes, into: memoryview) -> int:
            return self.cipher.decrypt_into(nonce, data, aad, into)

    monkeypatch.setattr(framing, "AESGCM", Recording)
    edge, cloud = new_pair(limits=replace(SMALL, rekey_bytes=3000))
    for call in range(40):
        deliver(list(edge.send(forward(call=call))), cloud)
        deliver(list(cloud.send(m.Status(m.StatusCode.OK, None, "x" * call))), edge)
    assert len(used) > 200
    assert len({key for key, _ in used}) > 4
    assert len(set(used)) == len(used)


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
    assert struct.unpack("!4sBBIQIHHQ", frame[:34]) == (b"ISTH", 16, 7, 0, 0, 11, 0, 1, 8)
    assert len(frame) == PREFIX.size + 11 + TAG + 8 + TAG
