"""The recorder: writes what a cloud receives and sends to a file, up to a bound.

It writes where it is called, which is the cloud's event loop, so other sessions wait meanwhile: a recording is for
measuring, not for a cloud that has to be fast.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from pathlib import Path
from typing import Final

from isthmus.privacy.recording.file_names import PATTERN
from isthmus.privacy.recording.recording_file import MAGIC, Kind, entry_of, opening_of
from isthmus.protocol import messages as m
from isthmus.protocol.limits import Buffer

LOGGER = logging.getLogger("isthmus")

RECORDED: Final = (m.Sites, m.Lease, m.Forward, m.Backward, m.Decode, m.SiteAnswer)
"""What an edge sends that is written, and the answers to it: all that has tensors of a run, and no files."""


class Recorder:
    """Writes one process's file of a recording. For one thread.

    With its first session a process makes a file of its own (`recording.bin`, then `recording-1.bin` and so on), mode
    0600, so that neither another worker nor one that was killed and started again writes into what is there.

    When the folder's files would take more than the bound, or the file cannot be written, recording ends and the log
    says so once; the cloud goes on. What was written is whole.

    Args:
        folder: an existing folder.
        max_bytes: the bound of all files of the folder together. Processes that write at the same time may go over it
            by a message each.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._size = 0
        self._file: int | None = None
        self._ended = False

    def opened(self, info: m.SessionInfo, attach: m.Attach) -> None:
        """A session was opened: what its edge was told of the model, and its link and account."""
        if not self._ended:
            self._write(opening_of(info, attach))

    def received(self, session: bytes, message: m.Message) -> None:
        """A message came, before anything is done with it."""
        if not self._ended and isinstance(message, RECORDED):
            self._write(entry_of(Kind.FROM_EDGE, session, message))

    def sent(self, session: bytes, question: m.Message, reply: m.Message) -> None:
        """A reply is about to be sent to a message."""
        if not self._ended and isinstance(question, RECORDED):
            self._write(entry_of(Kind.TO_EDGE, session, reply))

    def close(self) -> None:
        """Write nothing any more."""
        self._ended = True
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, pieces: list[Buffer]) -> None:
        """Write an entry, whole or not at all."""
        pieces = pieces if self._size else [MAGIC, *pieces]
        size = sum(len(piece) for piece in pieces)
        try:
            if _bytes_in(self._folder) + size > self._max_bytes:
                self._end(f"it would take more than {self._max_bytes} bytes")
                return
            if self._file is None:
                self._file = _new_file(self._folder)
            for piece in pieces:
                left = memoryview(piece).cast("B")
                while len(left):
                    left = left[os.write(self._file, left) :]
            self._size += size
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
            self._end(str(error.strerror))

    def _end(self, reason: str) -> None:
        fields = {"folder": str(self._folder), "bytes": self._size, "reason": reason}
        LOGGER.warning("recording_ended", extra={"fields": fields})
        self.close()


def _new_file(folder: Path) -> int:
    for number in itertools.count():
        name = f"recording-{number}.bin" if number else "recording.bin"
        try:
            return os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
    raise AssertionError("counting ends")


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(PATTERN))
