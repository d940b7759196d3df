"""The hidden states that a cloud's cache was made of, so that it can be made again."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass, field
from io import FileIO

import numpy as np
import torch
from torch import Tensor

from isthmus.common.errors import DiskError

MEMORY_BYTES = 64 << 20
"""Of one history, before it goes on in a file: 29,000 tokens of a model of width 576 in fp32."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class HiddenHistory:
    """What went to the cloud of each token of some sequences: `[B, length, h]`, and positions `[B or 1, length]`.

    In memory up to a limit, then in an unnamed temporary file, which is gone when the process ends.

    Args:
        memory_bytes: The limit.

    Attributes:
        length: Tokens of each sequence.
        rows: Sequences.
    """

    memory_bytes: int = MEMORY_BYTES
    length: int = 0
    rows: int = 0
    _chunks: list[_Chunk] = field(default_factory=list)
    _bytes_in_memory: int = 0  # of the chunks
    _file: FileIO | None = None

    def append(self, hidden: Tensor, positions: Tensor | None) -> None:
        """Add the next tokens, `[B, S, h]`, and their positions `[B or 1, S]`.

        Raises:
            DiskError: The file cannot be written. What does not fit stays in memory, these tokens too.
        """
        if positions is not None:
            positions = positions.detach().cpu()
        chunk = _Chunk(hidden.detach().cpu(), positions)
        self.rows, self.length = len(hidden), self.length + hidden.shape[1]
        self._add(chunk)
        self._spill_over()

    def take(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Hidden states and positions of the tokens from `start` on and before `stop`."""
        hidden, positions, end = list[Tensor](), list[Tensor | None](), self.length
        for chunk in reversed(self._chunks):  # mostly the last one alone is wanted
            begin = end - chunk.length
            if begin < stop:
                part = slice(max(0, start - begin), stop - begin)
                hidden.insert(0, self._read(chunk)[:, part])
                positions.insert(0, None if chunk.positions is None else chunk.positions[:, part])
            if begin <= start:
                break
            end = begin
        known = [each for each in positions if each is not None]
        if len(known) < len(positions):
            return torch.cat(hidden, dim=1), None
        rows = max(map(len, known))
        return torch.cat(hidden, dim=1), torch.cat([each.expand(rows, -1) for each in known], dim=1)

    def crop(self, length: int) -> None:
        """Forget what comes after so many tokens; of none, also how many sequences there are."""
        while self.length > length:
            last = self._chunks.pop()
            self._bytes_in_memory -= last.nbytes
            left = last.length - (self.length - length)
            self.length -= last.length
            if left > 0:
                hidden, positions = self._read(last)[:, :left], last.positions
                self._add(_Chunk(hidden, None if positions is None else positions[:, :left]))
                self.length += left
        if not self.length:
            self.rows = 0

    def selected(self, rows: Tensor) -> HiddenHistory:
        """A history of these sequences, in this order; its file is another one.

        Raises:
            DiskError: The file cannot be written.
        """
        result = HiddenHistory(self.memory_bytes)
        for chunk in self._chunks:
            positions = chunk.positions
            if positions is not None and len(positions) > 1:
                positions = positions[rows]
            result.append(self._read(chunk)[rows], positions)
        result.rows = len(rows)
        return result

    def _add(self, chunk: _Chunk) -> None:
        self._chunks.append(chunk)
        self._bytes_in_memory += chunk.nbytes

    def _spill_over(self) -> None:
        """Move chunks to the file if they exceed `memory_bytes`."""
        if self._bytes_in_memory <= self.memory_bytes:
            return
        try:
            if self._file is None:
                # Unbuffered, so that a failed write leaves nothing for the next seek to write.
                self._file = tempfile.TemporaryFile(prefix="isthmus-", buffering=0)  # noqa: SIM115 - closed below
                weakref.finalize(self, self._file.close)  # when the history is garbage-collected
            for chunk in self._chunks:
                if chunk.hidden is not None:
                    place = self._file.seek(0, 2)
                    left = memoryview(chunk.hidden.contiguous().view(torch.uint8).numpy().tobytes())
                    while left:
                        left = left[self._file.write(left) :]
                    self._bytes_in_memory -= chunk.nbytes
                    chunk.place, chunk.hidden = place, None
        except OSError as error:
            raise DiskError(
                f"the hidden states of a long text do not fit on the disk of {tempfile.gettempdir()}: "
                f"{error.strerror}; make room, or set TMPDIR"
            ) from error

    def _read(self, chunk: _Chunk) -> Tensor:
        if chunk.hidden is not None:
            return chunk.hidden
        if self._file is None:
            raise RuntimeError("a chunk is neither in memory nor in a file")
        self._file.seek(chunk.place)
        data = np.fromfile(self._file, np.uint8, chunk.size)
        return torch.from_numpy(data).view(chunk.dtype).view(chunk.shape)


class _Chunk:
    """Tokens that came together: in memory, or at a place in the file."""

    def __init__(self, hidden: Tensor, positions: Tensor | None) -> None:
        self.hidden: Tensor | None = hidden
        self.positions = positions
        self.shape, self.dtype, self.length = hidden.shape, hidden.dtype, hidden.shape[1]
        self.size = hidden.numel() * hidden.element_size()
        self.place = 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return 0 if self.hidden is None else self.size
