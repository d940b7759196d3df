"""Rows on disk: what is put comes back or is absent, whatever happens to the files, and the bound holds."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from isthmus.common.errors import ConfigError, DiskError, UnsupportedCallError
from isthmus.edge.span_cache.cache_store import SpanStore

OWNER = b"o" * 32
HEADER = 56  # bytes of a record beside its row
OPENING = 40  # bytes of a file before its first record
PLENTY = 1 << 20


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def row(number: int, tokens: int = 3, width: int = 4) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(number))


def opened(folder: Path, *, max_bytes: int = PLENTY, owner: bytes = OWNER, segment_bytes: int = PLENTY) -> SpanStore:
    return SpanStore(folder, owner, max_bytes=max_bytes, segment_bytes=segment_bytes)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.rows"))


def holds(store: SpanStore, number: int) -> bool:
    found = store.get(key(number))
    return found is not None and torch.equal(found, row(number))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SpanStore]:
    with opened(tmp_path / "cache") as store:
        yield store


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_row_comes_back_as_it_was_put(store: SpanStore, dtype: torch.dtype) -> None:
    value = row(1).to(dtype)
    assert store.get(key(1)) is None
    assert store.put(key(1), value)
    found = store.get(key(1))
    assert found is not None
    assert torch.equal(found, value)
    assert found.dtype == dtype
    assert not store.put(key(1), row(2))  # first come stays
    assert torch.equal(store.get(key(1)), value)  # type: ignore[arg-type]  # it is there


def test_values_that_bf16_holds_take_half_the_room(store: SpanStore) -> None:
    value = row(1).to(torch.bfloat16).float()
    value[0, 0], value[1, 1] = float("inf"), -0.0
    store.put(key(1), value)
    found = store.get(key(1))
    assert found is not None
    assert torch.equal(found.float(), value)
    assert store.stats().bytes == on_disk(store.folder) == OPENING + HEADER + value.numel() * 2
    value[2, 3] = 1 + 2**-20  # one value more than bf16 holds, and the row stays as it is
    store.put(key(2), value)
    assert torch.equal(store.get(key(2)), value)  # type: ignore[arg-type]  # it is there


def test_rows_outlast_the_process(tmp_path: Path) -> None:
    with opened(tmp_path, segment_bytes=300) as store:
        for number in range(20):
            assert store.put(key(number), row(number))
    assert len(list(tmp_path.glob("*.rows"))) == 10
    with opened(tmp_path, segment_bytes=300) as again:
        assert len(again) == 20
        assert all(holds(again, number) for number in range(20))
        assert again.put(key(20), row(20))
        assert again.stats().bytes == on_disk(tmp_path)


def test_a_row_larger_than_a_segment_has_one_for_itself(tmp_path: Path) -> None:
    with opened(tmp_path, segment_bytes=100) as store:
        assert all(store.put(key(number), row(number)) for number in range(3))
    assert sorted(path.name for path in tmp_path.glob("*.rows")) == ["000000.rows", "000001.rows", "000002.rows"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 9)), max_size=30),
    st.integers(1, 2000),
    st.integers(1, 600),
    st.integers(1, 2000),
)
def test_the_bound_holds_and_what_is_there_stays(
    puts: list[tuple[int, int]], bound: int, segment: int, later: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, kept, turned_away = Path(name), {}, False
        with opened(folder, max_bytes=bound, segment_bytes=segment) as store:
            for number, tokens in puts:
                if store.put(key(number), row(number, tokens)):
                    kept[number] = tokens
                turned_away |= number not in kept
                assert store.stats().bytes == on_disk(folder) <= bound
            assert store.stats().full == turned_away
            for number, tokens in kept.items():
                assert torch.equal(store.get(key(number)), row(number, tokens))  # type: ignore[arg-type]
        with opened(folder, max_bytes=later, segment_bytes=segment) as store:
            assert store.stats().bytes == on_disk(folder) <= later
            if later >= bound:
                assert len(store) == len(kept)


def test_counters(tmp_path: Path) -> None:
    with opened(tmp_path, max_bytes=OPENING + HEADER + 48) as store:
        store.put(key(1), row(1))
        assert not store.stats().full
        store.put(key(2), row(2))
        for number in (1, 2, 1, 3):
            store.get(key(number))
        stats = store.stats()
    assert (stats.hits, stats.misses, stats.damaged, stats.rows) == (2, 2, 0, 1)
    assert (stats.bytes, stats.full, stats.failed) == (OPENING + HEADER + 48, True, False)


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [1, 47, 48, 49, 100, HEADER + 48])
def test_a_torn_last_record_is_absent_and_overwritten(tmp_path: Path, lost: int) -> None:
    with opened(tmp_path) as store:
        for number in range(3):
            store.put(key(number), row(number))
    file = tmp_path / "000000.rows"
    os.truncate(file, file.stat().st_size - lost)
    with opened(tmp_path) as store:
        assert [holds(store, number) for number in range(3)] == [True, True, False]
        assert store.put(key(2), row(2))
        assert store.put(key(3), row(3))
    with opened(tmp_path) as store:
        assert all(holds(store, number) for number in range(4))


@pytest.mark.parametrize("cut", [0, 1, OPENING - 1])
def test_a_file_without_an_opening_is_deleted(tmp_path: Path, cut: int) -> None:
    with opened(tmp_path) as store:
        store.put(key(0), row(0))
    os.truncate(tmp_path / "000000.rows", cut)
    with opened(tmp_path) as store:
        assert len(store) == 0
        assert store.put(key(0), row(0))
        assert holds(store, 0)


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_a_row_that_does_not_fit_its_checksum_is_a_miss(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(key(0), row(0))
        store.put(key(1), row(1))
        flip(tmp_path / "000000.rows", OPENING + HEADER + 7)
        assert [holds(store, number) for number in range(2)] == [False, True]
        assert store.stats().damaged == 1
        assert store.put(key(0), row(0))  # asked for anew, and kept behind the others
        assert holds(store, 0)
    with opened(tmp_path) as store:
        assert [holds(store, number) for number in range(2)] == [True, True]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, OPENING + 3 * (HEADER + 48) - 1))
def test_no_flipped_bit_gives_a_wrong_row(offset: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with opened(folder) as store:
            for number in range(3):
                store.put(key(number), row(number))
        flip(folder / "000000.rows", offset)
        with opened(folder) as store:
            for number in range(3):
                assert store.get(key(number)) is None or holds(store, number)
                store.put(key(number), row(number))
            assert all(holds(store, number) for number in range(3))


def test_a_file_that_is_gone_is_a_miss(store: SpanStore) -> None:
    store.put(key(0), row(0))
    (store.folder / "000000.rows").unlink()
    assert store.get(key(0)) is None
    assert store.stats().damaged == 1


def test_a_full_disk_ends_the_growing_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.pwrite, [HEADER + 10]

    def pwrite(handle: int, data: bytes | memoryview, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(handle, bytes(data[: room[0]]), offset)
        room[0] -= written
        return written

    with opened(tmp_path) as store:
        store.put(key(0), row(0))
        size = on_disk(tmp_path)
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.warns(UserWarning, match="takes in nothing more"):
            assert not store.put(key(1), row(1))
        assert not store.put(key(2), row(2))  # without a second warning
        assert on_disk(tmp_path) == size
        assert holds(store, 0)
        assert store.get(key(1)) is None
        assert store.stats().failed
        assert not store.stats().full
    monkeypatch.undo()
    with opened(tmp_path) as store:
        assert [holds(store, number) for number in range(2)] == [True, False]
        assert store.put(key(1), row(1))


# The folder -----------------------------------------------------------------------------------------------------------


def test_rows_of_another_owner_go(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(key(0), row(0))
    with opened(tmp_path, owner=b"p" * 32) as other:
        assert other.get(key(0)) is None
        assert on_disk(tmp_path) == 0


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ConfigError, match="another process uses the span cache"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_a_folder_that_could_not_be_read_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "000000.rows").mkdir()
    with pytest.raises(DiskError):
        opened(tmp_path)
    (tmp_path / "000000.rows").rmdir()
    opened(tmp_path).close()


def test_only_the_user_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with opened(tmp_path / "deep" / "cache") as store:
            store.put(key(0), row(0))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep" / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "deep" / "cache" / "000000.rows").stat().st_mode) == 0o600


def test_clear_deletes_the_rows_and_nothing_else(store: SpanStore) -> None:
    other = store.folder / "mine.rows"
    other.write_text("not a segment")
    store.put(key(0), row(0))
    store.clear()
    assert [path.name for path in store.folder.glob("*.rows")] == ["mine.rows"]
    assert store.get(key(0)) is None
    assert store.put(key(0), row(0))
    assert holds(store, 0)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="choose another folder"):
        opened(tmp_path / "file" / "cache")


@pytest.mark.parametrize(("max_bytes", "owner"), [(0, OWNER), (-1, OWNER), (10, b"short")])
def test_arguments_that_make_no_sense(tmp_path: Path, max_bytes: int, owner: bytes) -> None:
    with pytest.raises(ConfigError, match="at least 1 byte"):
        opened(tmp_path, max_bytes=max_bytes, owner=owner)


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)])
def test_what_is_no_row(store: SpanStore, value: Tensor) -> None:
    with pytest.raises(UnsupportedCallError, match="rows of rank 2"):
        store.put(key(0), value)
