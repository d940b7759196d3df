"""Rows on disk: what is put comes back or is absent, whatever happens to the files, and the bound holds."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

from isthmus.common.errors import ConfigError, DiskError, UnsupportedCallError
from isthmus.edge.span_cache.cache_store import ENTRY_BYTES, SpanStore

OWNER = b"o" * 32
PLENTY = 1 << 20
ROW = 3 * 4 * 4  # bytes of `row`


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def row(number: int, tokens: int = 3, width: int = 4) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(number))


def opened(folder: Path, *, max_bytes: int = PLENTY, owner: bytes = OWNER) -> SpanStore:
    return SpanStore(folder, owner, max_bytes=max_bytes)


def on_disk(folder: Path) -> int:
    """Bytes of rows."""
    return (folder / "rows.bin").stat().st_size


def holds(store: SpanStore, number: int, tokens: int = 3) -> bool:
    found = store.get(key(number))
    return found is not None and torch.equal(found, row(number, tokens))


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
    assert on_disk(store.folder) == value.numel() * 2
    assert store.stats().bytes == value.numel() * 2 + ENTRY_BYTES
    value[2, 3] = 1 + 2**-20  # one value more than bf16 holds, and the row stays as it is
    store.put(key(2), value)
    assert torch.equal(store.get(key(2)), value)  # type: ignore[arg-type]  # it is there


def test_rows_outlast_the_process(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for number in range(20):
            assert store.put(key(number), row(number))
    with opened(tmp_path) as again:
        assert again.stats().rows == 20
        assert all(holds(again, number) for number in range(20))
        assert again.put(key(20), row(20))
        assert on_disk(tmp_path) == 21 * ROW


KILLED = """
import os, sys
from pathlib import Path
import torch
from isthmus.edge.span_cache.cache_store import ENTRY_BYTES, SpanStore
store = SpanStore(Path(sys.argv[1]), b"o" * 32, max_bytes=1 << 20)
for number in range(9):
    value = torch.randn(3, 4, generator=torch.Generator().manual_seed(number))
    assert store.put(number.to_bytes(32, "little"), value)
store._write(memoryview(bytes(10)))  # a row that has no entry yet
os._exit(9)
"""


def test_rows_outlast_a_process_that_was_killed(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == 9
    assert (tmp_path / "index.sqlite-wal").exists()
    assert on_disk(tmp_path) == 9 * ROW + 10
    with opened(tmp_path) as store:
        assert on_disk(tmp_path) == 9 * ROW
        assert all(holds(store, number) for number in range(9))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 9)), max_size=30), st.integers(1, 3000), st.integers(1, 3000)
)
def test_the_bound_holds_and_what_is_there_stays(puts: list[tuple[int, int]], bound: int, later: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, kept, turned_away = Path(name), {}, False
        with opened(folder, max_bytes=bound) as store:
            for number, tokens in puts:
                if store.put(key(number), row(number, tokens)):
                    kept[number] = tokens
                turned_away |= number not in kept
                assert store.stats().bytes == on_disk(folder) + len(kept) * ENTRY_BYTES <= bound
            assert store.stats().full == turned_away
            for number, tokens in kept.items():
                assert torch.equal(store.get(key(number)), row(number, tokens))  # type: ignore[arg-type]
        with opened(folder, max_bytes=later) as store:
            assert store.stats().bytes == on_disk(folder) + store.stats().rows * ENTRY_BYTES <= later
            left = [number for number, tokens in kept.items() if holds(store, number, tokens)]
            assert left == list(kept)[: store.stats().rows]  # the oldest
            if later >= bound:
                assert store.stats().rows == len(kept)


def test_an_entry_takes_what_is_counted_for_it(tmp_path: Path) -> None:
    tiny = torch.zeros(1, 1)
    with opened(tmp_path, max_bytes=1 << 30) as store:
        for _ in range(3000):
            assert store.put(os.urandom(32), tiny)
    assert (tmp_path / "index.sqlite").stat().st_size <= 3000 * ENTRY_BYTES + 3 * 4096


def test_counters(tmp_path: Path) -> None:
    with opened(tmp_path, max_bytes=ROW + ENTRY_BYTES) as store:
        store.put(key(1), row(1))
        assert not store.stats().full
        store.put(key(2), row(2))
        for number in (1, 2, 1, 3):
            store.get(key(number))
        stats = store.stats()
    assert (stats.hits, stats.misses, stats.damaged, stats.rows) == (2, 2, 0, 1)
    assert (stats.bytes, stats.full, stats.failed) == (ROW + ENTRY_BYTES, True, False)


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [1, 47, 48])
def test_a_torn_last_row_is_absent_and_overwritten(tmp_path: Path, lost: int) -> None:
    with opened(tmp_path) as store:
        for number in range(3):
            store.put(key(number), row(number))
    os.truncate(tmp_path / "rows.bin", 3 * ROW - lost)
    with opened(tmp_path) as store:
        assert [holds(store, number) for number in range(3)] == [True, True, False]
        assert store.put(key(2), row(2))
        assert store.put(key(3), row(3))
    with opened(tmp_path) as store:
        assert all(holds(store, number) for number in range(4))


@pytest.mark.parametrize(
    "harm", [lambda data: b"", lambda data: data[:100], lambda data: bytes(len(data)), lambda data: b"x" * 5000]
)
def test_an_index_that_is_none_is_deleted(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    with opened(tmp_path) as store:
        store.put(key(0), row(0))
    index = tmp_path / "index.sqlite"
    index.write_bytes(harm(index.read_bytes()))
    with opened(tmp_path) as store:
        assert store.stats().rows == on_disk(tmp_path) == 0
        assert store.put(key(0), row(0))
        assert holds(store, 0)


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << offset % 8
    file.write_bytes(data)


def test_a_row_that_does_not_fit_its_checksum_is_a_miss(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(key(0), row(0))
        store.put(key(1), row(1))
        flip(tmp_path / "rows.bin", 7)
        assert [holds(store, number) for number in range(2)] == [False, True]
        assert store.stats().damaged == 1
        assert store.put(key(0), row(0))  # asked for anew, and kept behind the others
        assert holds(store, 0)
    with opened(tmp_path) as store:
        assert [holds(store, number) for number in range(2)] == [True, True]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["rows.bin", "index.sqlite"]), st.integers(0, 1 << 20))
@example("index.sqlite", 18)  # the version of the format for whoever writes
@example("index.sqlite", (1 << 20) - 1)  # SQLite quotes a byte that is not UTF-8
def test_no_flipped_bit_gives_a_wrong_row(name: str, offset: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with opened(folder) as store:
            for number in range(3):
                store.put(key(number), row(number))
        path = folder / name
        flip(path, offset % path.stat().st_size)
        with opened(folder) as store:
            for number in range(3):
                assert store.get(key(number)) is None or holds(store, number)
                store.put(key(number), row(number))
            assert all(holds(store, number) for number in range(3))


@pytest.mark.parametrize(
    "change",
    [
        "dtype = 9",
        "dtype = 'x'",
        "tokens = -3, columns = -4",
        "columns = 1 << 60",
        "start = -1",
        "stop = 1 << 60",
        "checksum = NULL",
        "start = 48, stop = 96",
    ],
)
def test_an_entry_that_makes_no_sense_is_a_miss(tmp_path: Path, change: str) -> None:
    with opened(tmp_path) as store:
        for number in range(2):
            store.put(key(number), row(number))
        store._index.execute(f"UPDATE rows SET {change} WHERE key = ?", (key(0),))  # noqa: S608  # the test's own
        assert store.get(key(0)) is None
        assert holds(store, 1)
        assert store.put(key(0), row(0))
    with opened(tmp_path) as store:
        store._index.execute(f"UPDATE rows SET {change} WHERE key = ?", (key(0),))  # noqa: S608  # the test's own
    with opened(tmp_path) as store:
        assert store.get(key(0)) is None


def test_rows_that_are_gone_are_a_miss(store: SpanStore) -> None:
    store.put(key(0), row(0))
    os.truncate(store.folder / "rows.bin", 0)
    assert store.get(key(0)) is None
    assert store.stats().damaged == 1


def test_a_full_disk_ends_the_growing_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.pwrite, [10]

    def pwrite(handle: int, data: bytes | memoryview, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(handle, bytes(data[: room[0]]), offset)
        room[0] -= written
        return written

    with opened(tmp_path) as store:
        store.put(key(0), row(0))
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.warns(UserWarning, match=r"No space left on device.* takes in nothing more"):
            assert not store.put(key(1), row(1))
        assert not store.put(key(2), row(2))  # without a second warning
        assert on_disk(tmp_path) == ROW
        assert holds(store, 0)
        assert store.get(key(1)) is None
        assert store.stats().failed
        assert not store.stats().full
    monkeypatch.undo()
    with opened(tmp_path) as store:
        assert [holds(store, number) for number in range(2)] == [True, False]
        assert store.put(key(1), row(1))


def test_an_index_that_cannot_be_written_ends_the_growing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(key(0), row(0))
        store._index.execute("PRAGMA query_only = ON")
        with pytest.warns(UserWarning, match="takes in nothing more"):
            assert not store.put(key(1), row(1))
        assert on_disk(tmp_path) == ROW
        assert holds(store, 0)


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


@pytest.mark.parametrize("name", ["rows.bin", "index.sqlite"])
def test_a_folder_that_could_not_be_read_is_released(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DiskError):
        opened(tmp_path)
    (tmp_path / name).rmdir()
    opened(tmp_path).close()


@pytest.mark.parametrize("name", ["rows.bin", "index.sqlite"])
def test_a_link_is_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "cache" / name).symlink_to(target)
    with pytest.raises(DiskError):
        opened(tmp_path / "cache")
    assert target.read_text() == "mine"


def test_rows_of_the_older_format_go_with_a_warning(tmp_path: Path) -> None:
    for name in ("000000.rows", "000012.rows", "mine.rows"):
        (tmp_path / name).write_bytes(b"ISTHROWS" + OWNER)
    with pytest.warns(UserWarning, match="older format, which are deleted"):
        opened(tmp_path).close()
    assert [path.name for path in tmp_path.glob("*.rows")] == ["mine.rows"]
    opened(tmp_path).close()  # without a second warning


def test_only_the_user_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with opened(tmp_path / "deep" / "cache") as store:
            store.put(key(0), row(0))
            log = store.folder / "index.sqlite-wal"
            assert stat.S_IMODE(log.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep" / "cache").stat().st_mode) == 0o700
    for name in ("rows.bin", "index.sqlite"):
        assert stat.S_IMODE((tmp_path / "deep" / "cache" / name).stat().st_mode) == 0o600


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


def test_after_its_end_a_store_touches_no_file(tmp_path: Path) -> None:
    store = opened(tmp_path / "cache")
    assert store.put(key(0), row(0))
    store.close()
    others = []
    for number in range(8):  # they take the numbers of the files that were closed
        path = tmp_path / f"other-{number}"
        others.append(path.open("w+b"))
        others[-1].write(b"somebody else's")
        others[-1].flush()
    assert not store.put(key(1), row(1))
    assert store.get(key(0)) is None
    for other in others:
        other.close()
    assert {path.read_bytes() for path in tmp_path.glob("other-*")} == {b"somebody else's"}
