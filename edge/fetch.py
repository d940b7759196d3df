"""Fetching the edge's parts from the cloud, over the sealed session, into the cache.

An interrupted download goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from isthmus.backbone.files import disk_errors, locked
from isthmus.backbone.sources import default_cache, is_part
from isthmus.protocol import messages as m
from isthmus.protocol.errors import RemoteProtocolError

R = TypeVar("R", bound=m.Message)


class Call(Protocol):
    """A link's way to ask something: repeats the question until there is an answer of the kind."""

    def __call__(self, kind: type[R], question: Callable[[int], m.Message]) -> R:
        """Ask."""


def fetch_parts(info: m.SessionInfo, call: Call) -> Path:
    """Bring the cache up to date with what the cloud serves.

    Args:
        info: what the cloud said; its digest and plan name the folder.
        call: asks the cloud.

    Returns:
        A folder for `isthmus.backbone.parts.load_edge_parts`.

    Raises:
        DiskError: there is no room for the files.
        RemoteProtocolError: the cloud offers a file that belongs to no model's parts, or a file does not have the hash
            that the cloud gave for it.
    """
    listing = call(m.FileList, lambda attempt: m.FetchList())
    for entry in listing.entries:
        if not is_part(entry.name):
            raise RemoteProtocolError(
                f"the cloud offers the file {entry.name!r}, which is none of an edge's parts: ask its owner what it is"
            )
    folder = default_cache() / "edge" / f"{info.digest[:16]}-{info.plan.replace(':', '-')}"
    with locked(folder):  # two edges of one user would append to the same unfinished files
        _complete(folder, listing, info.model, call)
    return folder


def _complete(folder: Path, listing: m.FileList, model: str, call: Call) -> None:
    missing = [entry for entry in listing.entries if not _whole(folder / entry.name, entry)]
    if not missing:
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
            task = progress.add_task(
                f"fetching the edge's parts of {model}", total=sum(entry.size for entry in missing)
            )
            for entry in missing:
                _fetch(folder, entry, call, lambda n: progress.advance(task, n))


def _fetch(folder: Path, entry: m.FileEntry, call: Call, advance: Callable[[int], None]) -> None:
    # The hash is in the partial file's name, so that a file which changed on the other side is not continued with the
    # new one's bytes.
    unfinished = folder / f".{entry.name}.{entry.sha256.hex()[:16]}.part"
    offset = min(unfinished.stat().st_size, entry.size) if unfinished.exists() else 0
    advance(offset)
    with unfinished.open("ab") as file:
        file.truncate(offset)
        while offset < entry.size:
            piece = call(m.Blob, partial(_ask, entry.name, offset))
            if (piece.name, piece.offset, piece.total) != (entry.name, offset, entry.size) or not len(piece.data):
                raise RemoteProtocolError(f"the cloud sent another piece of {entry.name} than the one at {offset}")
            file.write(piece.data)
            offset += len(piece.data)
            advance(len(piece.data))
    if not _whole(unfinished, entry):
        unfinished.unlink()
        raise RemoteProtocolError(f"{entry.name} arrived with another hash than the cloud announced: fetch it again")
    unfinished.replace(folder / entry.name)


def _ask(name: str, offset: int, attempt: int) -> m.Fetch:
    return m.Fetch(name, offset)


def _whole(path: Path, entry: m.FileEntry) -> bool:
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest() == entry.sha256
