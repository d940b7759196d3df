"""No frame is opened that is not exactly the next one of its session, and nothing is allocated for what it claims."""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings, strategies as st
from support.protocol.sealed import SECRET, SESSION, assert_refused, both_ends, message_frames
from support.protocol.wire import SMALL

from isthmus.common.errors import FrameError, LimitError, LocalProtocolError, RemoteProtocolError, VersionError
from isthmus.protocol.limits import DEFAULT_LIMITS, Limits
from isthmus.protocol.secure.framing import PREFIX, TAG, VERSION, Direction, Kind
from isthmus.protocol.secure.record import Opener, Sealer


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


LITTLE = 100_000
"""Bytes: more than opening a frame takes beside what the frame claims, and less than that."""


@contextlib.contextmanager
def allocates_less_than(nbytes: int) -> Iterator[None]:
    """Check that what is done inside allocates less than so many bytes at a time."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()


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
    with allocates_less_than(LITTLE), pytest.raises(error):
        opener.open(frame)


def test_an_unauthenticated_first_frame_of_the_right_size_allocates_no_body() -> None:
    limits = Limits(chunk_bytes=1 << 10)
    opener = Opener(bytearray(SECRET), SESSION, Direction.EDGE_TO_CLOUD, limits)
    frame = PREFIX.pack(b"ISTH", Kind.DATA, VERSION, 0, 0, 11, 0, 60_000, 60_000 << 10) + bytes(11 + TAG + 1024 + TAG)
    with allocates_less_than(LITTLE), pytest.raises(RemoteProtocolError):
        opener.open(frame)


def test_an_allocation_is_seen() -> None:
    with pytest.raises(AssertionError), allocates_less_than(LITTLE):
        bytes(LITTLE)
