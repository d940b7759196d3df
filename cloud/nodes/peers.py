"""Files from the cloud's other workers, over the sealed sessions that edges have too.

A worker shows the key that its own certificate is for, and the other one has it in its list of the cloud's workers. Of
the other one it checks the root's fingerprint, as an edge does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
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
"""Of a list: a model of 500 GiB has some 200 files, and a cloud some tenants."""
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
        wanted: Callable[[str], bool] = lambda name: True,
        told: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[str]:
        """Fetch files of a file set into a folder; those that are there whole stay. Returns their names.

        Args:
            address: of the worker that has them.
            file_set: which.
            folder: where to; it exists.
            wanted: which of the names.
            told: called with the bytes that are here, and those of all.

        Raises:
            ConnectionLostError: the worker is gone.
            DiskError: there is no room for them.
            RefusedError: it does not know this worker (yet).
            RemoteProtocolError: what came is not what it has listed.
        """
        transport = GrpcTransport(address)
        attach = m.Attach(os.urandom(m.LINK_BYTES), settled=True)
        try:
            stream = await SecureStream.open(await transport.open(), self.pin, self.key, attach)
            try:
                listing = await _ask(stream, m.FileList, m.FetchList(file_set), 0)
                entries = [entry for entry in listing.entries if wanted(entry.name)]
                _check(entries, file_set, folder)
                done, total = 0, sum(entry.size for entry in entries)
                for entry in entries:
                    await _fetch(stream, file_set, entry, folder, partial(_told, told, done, total))
                    done += entry.size
            finally:
                await stream.close()
        finally:
            await transport.close()
        return [entry.name for entry in entries]


def _told(told: Callable[[int, int], None], before: int, total: int, of_file: int) -> None:
    told(before + of_file, total)


def _check(entries: list[m.FileEntry], file_set: m.FileSet, folder: Path) -> None:
    if len(entries) > MAX_FILES:
        raise RemoteProtocolError(f"another worker offers {len(entries)} files: at most {MAX_FILES} are taken")
    for entry in entries:
        if not belongs(entry.name, file_set):
            raise RemoteProtocolError(f"another worker offers the file {entry.name!r}, which does not belong there")
    with disk_errors(folder):
        status = os.statvfs(folder)
    size, free = sum(entry.size for entry in entries), status.f_bavail * status.f_frsize
    if size + RESERVE > free:
        raise DiskError(f"{folder} has {free} bytes free, and {size} bytes are to be fetched: make room")


async def _ask(stream: SecureStream, kind: type[R], message: m.Message, answer_bytes: int) -> R:
    answer = (await stream.ask(message, ASK_SECONDS, answer_bytes)).message
    if not isinstance(answer, kind):
        said = answer.message if isinstance(answer, m.Status) else type(answer).__name__
        raise RemoteProtocolError(f"another worker answered {type(message).__name__} with {said}")
    return answer


async def _fetch(
    stream: SecureStream, file_set: m.FileSet, entry: m.FileEntry, folder: Path, told: Callable[[int], None]
) -> None:
    path = folder / entry.name
    if await asyncio.to_thread(_is_whole, path, entry):
        told(entry.size)
        return
    unfinished = folder / f".{entry.name}.part"
    offset = 0
    with disk_errors(folder), unfinished.open("wb") as file:
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
