"""Returning a tuned adapter to the cloud, over the sealed session, to have it plugged into the full model.

An interrupted upload goes on where it stopped: the cloud says how much of a file it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from isthmus.backbone.adapters.adapter_files import TUNING_INFO
from isthmus.common.errors import AdapterError, OverQuotaError, RemoteProtocolError
from isthmus.common.files import sha256_of
from isthmus.common.terminal import printable
from isthmus.edge.client.fetch import transfer_bar
from isthmus.edge.client.session_keeper import SessionKeeper
from isthmus.emulator.package.offered_files import belongs
from isthmus.protocol import messages as m

SMALLEST_CHUNK = 64 << 10
MAX_SETBACKS = 3
_LEFT_OUT = "README.md"  # PEFT's, and of no use to the cloud
_RETURN = "return the folder that tuning wrote (OUT/adapter)"


def return_adapter(cloud: SessionKeeper, folder: Path) -> str:
    """Send an adapter and have it plugged in.

    Args:
        cloud: who is asked.
        folder: the adapter.

    Returns:
        What the cloud says.

    Raises:
        AdapterError: the folder is no adapter that training has written.
        RefusedError: the cloud does not take the adapter, and says why.
        RemoteProtocolError: the cloud loses again and again what it was sent.
    """
    entries = _entries(folder)
    upload = _Upload(cloud, min(m.MAX_FILE_CHUNK, cloud.info.limits.max_message_bytes))
    with transfer_bar("returning the adapter", sum(entry.size for entry in entries)) as advance:
        for entry in entries:
            upload.send(folder / entry.name, entry, advance)
    status = cloud.ask(m.Status, m.PlugIn(entries))
    return printable(status.message)


def _entries(folder: Path) -> tuple[m.FileEntry, ...]:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise AdapterError(f"{folder} is no adapter ({error.strerror}): {_RETURN}") from error
    for name in names:
        if not belongs(name, m.FileSet.ADAPTER):
            raise AdapterError(f"{folder} holds {name!r}, which is no file of an adapter: move it away")
    if TUNING_INFO not in names:
        raise AdapterError(f"{folder} has no {TUNING_INFO}, which says what it was tuned on: {_RETURN}")
    return tuple(_entry(folder / name) for name in names if name != _LEFT_OUT)


def _entry(path: Path) -> m.FileEntry:
    try:
        return m.FileEntry(path.name, path.stat().st_size, sha256_of(path))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}): check the file's rights") from error


class _Upload:
    """Sends files chunk by chunk.

    Args:
        cloud: who is asked.
        chunk: bytes of a chunk; smaller ones are tried where the tenant's quota of bytes in flight is smaller.
    """

    def __init__(self, cloud: SessionKeeper, chunk: int) -> None:
        self._cloud = cloud
        self._chunk = chunk

    def send(self, path: Path, entry: m.FileEntry, advance: Callable[[int], None]) -> None:
        """Send what the cloud does not hold of a file."""
        held = self._put(entry, 0, b"")
        advance(held)
        setbacks = 0
        while held < entry.size:
            now = self._put(entry, held, _read(path, held, self._chunk))
            if now <= held:  # a cloud whose disk was cut off, or another upload of the same tenant
                setbacks += 1
                if setbacks > MAX_SETBACKS:
                    raise RemoteProtocolError(
                        f"the cloud holds {now} bytes of {entry.name} again and again after more were sent: return one "
                        "adapter at a time, or ask the cloud's owner"
                    )
            advance(now - held)
            held = now

    def _put(self, entry: m.FileEntry, offset: int, data: bytes) -> int:
        while True:
            try:
                reply = self._cloud.ask(m.PutReply, m.Put(entry.name, offset, entry.size, entry.sha256, data))
            except OverQuotaError:
                if len(data) <= SMALLEST_CHUNK:
                    raise
                self._chunk = len(data) // 2
                data = data[: self._chunk]
                continue
            if (reply.name, reply.sha256) != (entry.name, entry.sha256) or reply.held > entry.size:
                raise RemoteProtocolError(f"the cloud answered a chunk of {entry.name} with something else")
            return reply.held


def _read(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}): check the file's rights") from error
    if not data:
        raise AdapterError(f"{path} became shorter while it was sent: return it again")
    return data
