"""The frames of a pipe: a tree of plain values, and bytes that go with it.

4 bytes   length of the JSON, big endian
4 bytes   length of the bytes
JSON      UTF-8
bytes
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import IO, Any

MOST = 1 << 30
"""Bytes of a part at most: a frame that says more is damaged."""

_LENGTHS = struct.Struct(">II")


class DamagedFrameError(Exception):
    """What came over a pipe is no frame: the other side wrote something else to it."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What goes over a pipe at once."""

    values: dict[str, Any]
    blob: bytes = field(default=b"", repr=False)

    def to_bytes(self) -> bytes:
        """The frame as it goes over the pipe."""
        text = json.dumps(self.values).encode()
        return _LENGTHS.pack(len(text), len(self.blob)) + text + self.blob


HEADER_BYTES = _LENGTHS.size


def lengths(header: bytes) -> tuple[int, int]:
    """The lengths of the two parts, by a frame's first bytes.

    Raises:
        DamagedFrameError: They are too large.
    """
    text, blob = _LENGTHS.unpack(header)
    if max(text, blob) > MOST:
        raise DamagedFrameError(f"a frame of {text} and {blob} bytes")
    return text, blob


def frame_of(text: bytes, blob: bytes) -> Frame:
    """The frame of its two parts.

    Raises:
        DamagedFrameError: The first is no JSON object.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DamagedFrameError(f"no JSON: {error}") from error
    if not isinstance(values, dict):
        raise DamagedFrameError("no JSON object")
    return Frame(values, blob)


def read_frame(pipe: IO[bytes]) -> Frame | None:
    """The next frame; None at the pipe's end.

    Raises:
        DamagedFrameError: The pipe ends inside a frame, or holds something else.
    """
    header = pipe.read(HEADER_BYTES)
    if not header:
        return None
    if len(header) < HEADER_BYTES:
        raise DamagedFrameError("the pipe ends inside a frame")
    n_text, n_blob = lengths(header)
    text, blob = pipe.read(n_text), pipe.read(n_blob)
    if (len(text), len(blob)) != (n_text, n_blob):
        raise DamagedFrameError("the pipe ends inside a frame")
    return frame_of(text, blob)
