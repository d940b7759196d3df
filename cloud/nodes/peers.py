"""Files from the cloud's other workers, over the sealed sessions that edges have too.

A worker shows the key that its own certificate is for, and the other one has it in its list of the cloud's workers. Of
the other one it checks the root's fingerprint, as an edge does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.common.errors import DiskError, RemoteProtocolError
from isthmus.common.files import disk_errors, sha256_of
from isthmus.emulator.package.offered_files import belongs
from isthmus.protocol import messages as m
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.rpc.secure_stream import SecureStream
from isthmus.rpc.transport import GrpcTransport

R = TypeVar("R", bound=m.Message)

ASK_SECONDS = 60.0
"""For an answer, which has 8 MiB at most."""
MAX_FILES = 2048
"""Of a list: a model of 500 GiB has some 200 files."""
RESERVE = 1 << 30
"""Bytes of the disk's free space that a fetch leaves."""


@dataclass(frozen=True, slots=True)
class Peers:
    """What a worker needs to fetch from others.

    Attributes:
        pin: fingerprint of the cloud's root key.
        key: this worker's.
    """

    pin: Fingerprint
    key: Ed25519PrivateKey

    async def fetch(
        self,
        address: str,
        file_set: m.FileSet,
        folder: Path,
        told: Callable[[int, int], None] = lambda done, total: None,
        make_room: Callable[[int], bool] = lambda lacking: False,
    ) -> list[str]:
        """Fetch the files of a file set into a folder; what is there of an earlier fetch stays. Returns their names.

        Args:
            address: of the worker that has them.
            file_set: which.
            folder: where to; it exists.
            told: called with the bytes that are here, and those of all.
            make_room: called with the number of bytes lacking while there is no room: removes something, and returns
                whether it has.

        Raises:
            ConnectionLostError: the worker is gone.
            DiskError: there is no room for them.
            RefusedError: it does not know this worker (yet).
            RemoteProtocolError: what came is not what it has listed.
        """
        async with self._session(address) as stream:
            listing = await _ask(stream, m.FileList, m.FetchList(file_set), 0)
            entries = listing.entries
            await asyncio.to_thread(_check, entries, file_set, folder, make_room)
            done, total = 0, sum(entry.size for entry in entries)
            for entry in entries:
                await _fetch(stream, file_set, entry, folder, partial(_told, told, done, total))
                done += entry.size
        return [entry.name for entry in entries]

    async def fetch_named(
        self, address: str, file_set: m.FileSet, names: Iterable[str], folder: Path, most: int
    ) -> list[str]:
        """Fetch those of the named files that there are, `most` bytes in all. Returns their names; raises as `fetch`.

        Args:
            address: of the worker that has them.
            file_set: one that may be too long to be listed.
            names: in the file set.
            folder: where to; it exists.
            most: bytes of all files together.
        """
        found: list[m.FileEntry] = []
        async with self._session(address) as stream:
            for name in names:
                entry = await _begin(stream, file_set, name, folder)
                if entry is None:
                    continue
                found.append(entry)
                size = sum(each.size for each in found)
                if size > most:
                    raise RemoteProtocolError(f"another worker offers {size} bytes: at most {most} are taken")
                _check(found, file_set, folder)
                await _fetch(stream, file_set, entry, folder, lambda done: None)
        return [entry.name for entry in found]

    @asynccontextmanager
    async def _session(self, address: str) -> AsyncIterator[SecureStream]:
        transport = GrpcTransport(address)
        attach = m.Attach(os.urandom(m.LINK_BYTES), settled=True)
        try:
            stream = await SecureStream.open(await transport.open(), self.pin, self.key, attach)
            try:
                yield stream
            finally:
                await stream.close()
        finally:
            await transport.close()


def _told(told: Callable[[int, int], None], before: int, total: int, of_file: int) -> None:
    told(before + of_file, total)


def _check(
    entries: Sequence[m.FileEntry],
    file_set: m.FileSet,
    folder: Path,
    make_room: Callable[[int], bool] = lambda lacking: False,
) -> None:
    if len(entries) > MAX_FILES:
        raise RemoteProtocolError(f"another worker offers {len(entries)} files: at most {MAX_FILES} are taken")
    for entry in entries:
        if not belongs(entry.name, file_set):
            raise RemoteProtocolError(f"another worker offers the file {entry.name!r}, which does not belong there")
    places = [(entry, (folder / entry.name, _unfinished(entry.name, folder))) for entry in entries]
    missing = sum(entry.size - max(_held(path, entry) for path in paths) for entry, paths in places)
    while missing and missing + RESERVE > (free := _free(folder)):
        if not make_room(missing + RESERVE - free):
            raise DiskError(f"{folder} has {free} bytes free, and {missing} bytes are to be fetched: make room")


def _free(folder: Path) -> int:
    with disk_errors(folder):
        status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _held(path: Path, entry: m.FileEntry) -> int:
    """How many bytes of a file are here; none where there are more than it has."""
    size = path.stat().st_size if path.is_file() else 0
    return size if size <= entry.size else 0


def _unfinished(name: str, folder: Path) -> Path:
    return folder / f".{name}.part"


async def _ask(stream: SecureStream, kind: type[R], message: m.Message, answer_bytes: int) -> R:
    answer = (await stream.ask(message, ASK_SECONDS, answer_bytes)).message
    if not isinstance(answer, kind):
        said = answer.message if isinstance(answer, m.Status) else type(answer).__name__
        raise RemoteProtocolError(f"another worker answered {type(message).__name__} with {said}")
    return answer


async def _begin(stream: SecureStream, file_set: m.FileSet, name: str, folder: Path) -> m.FileEntry | None:
    """Ask for a file that may not be there, and keep its first chunk."""
    answer = (await stream.ask(m.Fetch(file_set, name, 0), ASK_SECONDS, m.MAX_FILE_CHUNK)).message
    if isinstance(answer, m.Status) and answer.code is m.StatusCode.BAD_REQUEST:
        return None
    if not isinstance(answer, m.Blob) or (answer.name, answer.offset) != (name, 0) or len(answer.data) > answer.total:
        raise RemoteProtocolError(f"another worker answered a question for {name} with something else")
    with disk_errors(folder):
        await asyncio.to_thread(_unfinished(name, folder).write_bytes, bytes(answer.data))
    return m.FileEntry(name, answer.total, answer.sha256)


async def _fetch(
    stream: SecureStream, file_set: m.FileSet, entry: m.FileEntry, folder: Path, told: Callable[[int], None]
) -> None:
    path, unfinished = folder / entry.name, _unfinished(entry.name, folder)
    if await asyncio.to_thread(_is_whole, path, entry):
        unfinished.unlink(missing_ok=True)
        told(entry.size)
        return
    offset = _held(unfinished, entry)
    with disk_errors(folder), unfinished.open("ab" if offset else "wb") as file:
        while offset < entry.size:
            most = min(m.MAX_FILE_CHUNK, entry.size - offset)
            chunk = await _ask(stream, m.Blob, m.Fetch(file_set, entry.name, offset), most)
            came = (chunk.name, chunk.offset, chunk.total, chunk.sha256)
            if came != (entry.name, offset, entry.size, entry.sha256) or not len(chunk.data):
                raise RemoteProtocolError(f"another worker sent another chunk of {entry.name} than the one at {offset}")
            await asyncio.to_thread(file.write, bytes(chunk.data))
            offset += len(chunk.data)
            told(offset)
    if not await asyncio.to_thread(_is_whole, unfinished, entry):
        unfinished.unlink()
        raise RemoteProtocolError(f"{entry.name} arrived with another hash than another worker announced")
    unfinished.replace(path)


def _is_whole(path: Path, entry: m.FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and sha256_of(path) == entry.sha256
