"""Frames of a pipe, whole and damaged."""

from __future__ import annotations

import io

import pytest

from isthmus.daemon.workers.frames import MOST, DamagedFrameError, Frame, frame_of, lengths, read_frame


def test_frames_come_out_as_they_went_in() -> None:
    frames = [Frame({"id": 1, "text": "é\n", "deep": [None, 1.5, {}]}, b"\x00\xff"), Frame({}), Frame({"id": 2}, b"x")]
    pipe = io.BytesIO(b"".join(frame.to_bytes() for frame in frames))
    assert [read_frame(pipe) for _ in frames] == frames
    assert read_frame(pipe) is None


@pytest.mark.parametrize("cut", [1, 7, 8, 12, 20])
def test_a_pipe_that_ends_inside_a_frame_is_damaged(cut: int) -> None:
    data = Frame({"id": 1}, b"blob").to_bytes()
    assert len(data) == 21
    with pytest.raises(DamagedFrameError, match="ends inside a frame"):
        read_frame(io.BytesIO(data[:cut]))
    assert read_frame(io.BytesIO(data)) == Frame({"id": 1}, b"blob")


def test_what_is_no_frame_is_refused() -> None:
    for text in (b"{", b"\xff", b"[]", b"1"):
        with pytest.raises(DamagedFrameError, match="no JSON"):
            frame_of(text, b"")
    with pytest.raises(DamagedFrameError, match=f"a frame of {MOST + 1} and 0 bytes"):
        lengths((MOST + 1).to_bytes(4, "big") + bytes(4))
    assert lengths(MOST.to_bytes(4, "big") + bytes(4)) == (MOST, 0)
    with pytest.raises(DamagedFrameError, match="a frame of"):
        read_frame(io.BytesIO(b"Traceback (most recent call last):"))
