"""The history of hidden states: what it gives back, in memory and in its file, and when the disk is full."""

from __future__ import annotations

import errno
import gc
import io
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.common.errors import DiskError
from isthmus.edge.client import hidden_history
from isthmus.edge.client.hidden_history import HiddenHistory

WIDTH = 4
TOKEN_BYTES = 2 * WIDTH * 4
"""Of one token of two sequences."""


class SmallDisk(io.FileIO):
    """An unbuffered file on a disk that takes so many bytes: of what is over, it writes what fits, then it fails."""

    def __init__(self, folder: Path, room: int) -> None:
        super().__init__(folder / f"disk-{room}", "w+")
        self._room = room

    def write(self, data: Any) -> int:
        room = self._room - self.tell()
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data[:room])


def full(**_options: Any) -> io.FileIO:
    raise OSError(errno.ENOSPC, "No space left on device")


def states(length: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(length))


def filled(memory_bytes: int, hidden: Tensor) -> HiddenHistory:
    """A history of these tokens, which have come one by one, with positions of each sequence."""
    history = HiddenHistory(memory_bytes)
    for at in range(hidden.shape[1]):
        history.append(hidden[:, at : at + 1], torch.tensor([[at], [at + 5]]))
    return history


def bytes_in_memory(history: HiddenHistory) -> int:
    return sum(chunk.nbytes for chunk in history._chunks)


def test_what_is_in_memory_is_counted_whatever_is_done() -> None:
    history, most = HiddenHistory(memory_bytes=6 * TOKEN_BYTES), 0
    for step in range(40):
        history.append(states(1 + step % 5), None)
        if step % 3 == 2:
            history.crop(history.length - 2)
        if step % 7 == 6:
            history = history.selected(torch.tensor([1, 0]))
        assert history._bytes_in_memory == bytes_in_memory(history)
        assert bytes_in_memory(history) <= history.memory_bytes
        most = max(most, bytes_in_memory(history))
    assert most > 0
    assert history._file is not None
    history.crop(0)
    assert (history._bytes_in_memory, history.length, history.rows) == (0, 0, 0)


def test_other_rows_look_at_each_chunk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    n_chunks = 50
    history = filled(1 << 20, states(n_chunks))
    seen = []
    plain = hidden_history._Chunk.nbytes.fget
    assert plain is not None
    monkeypatch.setattr(hidden_history._Chunk, "nbytes", property(lambda self: seen.append(self) or plain(self)))
    selected = history.selected(torch.tensor([1, 0]))
    assert len(seen) <= n_chunks
    assert bytes_in_memory(selected) == n_chunks * TOKEN_BYTES
    assert len(seen) >= n_chunks  # by the line before, so they are counted


@pytest.mark.parametrize("memory_bytes", [1, 5 * TOKEN_BYTES, 1 << 20])
def test_other_rows_are_a_history_with_a_file_of_its_own(memory_bytes: int) -> None:
    hidden = states(12)
    history = filled(memory_bytes, hidden)
    selected = history.selected(torch.tensor([1, 1, 0]))
    found, positions = selected.take(0, 12)
    assert torch.equal(found, hidden[[1, 1, 0]])
    assert positions is not None
    assert torch.equal(positions[:, 3], torch.tensor([8, 8, 3]))
    assert (selected.rows, selected.length) == (3, 12)
    assert torch.equal(history.take(0, 12)[0], hidden)
    file = history._file
    assert (file is None) == (memory_bytes == 1 << 20)
    del history
    gc.collect()
    assert file is None or file.closed
    assert torch.equal(selected.take(0, 12)[0], hidden[[1, 1, 0]])


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_disk_that_fills_up_leaves_the_rows_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    hidden = states(12)
    history = filled(1, hidden)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: SmallDisk(tmp_path, tokens * TOKEN_BYTES))
    with pytest.raises(DiskError, match="No space left"):
        history.selected(torch.tensor([1, 0]))
    assert (history.rows, history.length) == (2, 12)
    assert torch.equal(history.take(0, 12)[0], hidden)
    monkeypatch.undo()
    assert torch.equal(history.selected(torch.tensor([1, 0])).take(0, 12)[0], hidden[[1, 0]])


@pytest.mark.parametrize("rest", [0, 1, TOKEN_BYTES - 1])  # bytes of the third token that the disk takes
def test_tokens_that_the_disk_does_not_take_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: int
) -> None:
    hidden = states(4)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: SmallDisk(tmp_path, 2 * TOKEN_BYTES + rest))
    history = filled(1, hidden[:, :2])
    with pytest.raises(DiskError, match="No space left"):
        history.append(hidden[:, 2:3], torch.tensor([[2], [7]]))
    assert torch.equal(history.take(0, 3)[0], hidden[:, :3])
    assert history._bytes_in_memory == bytes_in_memory(history) == TOKEN_BYTES
    history.crop(2)
    assert torch.equal(history.take(0, 2)[0], hidden[:, :2])


def test_where_there_is_no_disk_at_all_everything_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    history, hidden = HiddenHistory(memory_bytes=0), states(3)
    with pytest.raises(DiskError, match="set TMPDIR"):
        history.append(hidden, None)
    assert torch.equal(history.take(0, 3)[0], hidden)
