"""Fetching files from the cloud's shelves, over the sealed session.

    parts      the edge's parts of the model, into the cache
    emulator   the package, into a folder of the user's, which appears when it is whole and verified
    adapter    the tenant's own plugged-in adapter, into the cache

An interrupted download goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from isthmus.backbone.files import disk_errors, locked, remove_folder, sync
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sources import default_cache
from isthmus.emulator.build import check_free
from isthmus.emulator.errors import PackageError, SignerError
from isthmus.emulator.package import Package, open_package
from isthmus.emulator.plug import check_adapter
from isthmus.emulator.shelves import belongs
from isthmus.protocol import messages as m
from isthmus.protocol.errors import RemoteProtocolError
from isthmus.protocol.keys import Fingerprint

R = TypeVar("R", bound=m.Message)

_NAMES = {
    m.Shelf.PARTS: "an edge's parts",
    m.Shelf.EMULATOR: "a package's files",
    m.Shelf.ADAPTER: "an adapter's files",
}


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
    listing = _listing(m.Shelf.PARTS, call)
    folder = default_cache() / "edge" / _name(info)
    with locked(folder):  # two edges of one user would append to the same unfinished files
        _complete(folder, m.Shelf.PARTS, listing, f"fetching the edge's parts of {info.model}", call)
    return folder


def fetch_package(info: m.SessionInfo, call: Call, out: Path, signer: Fingerprint) -> Package:
    """Fetch the package that the cloud offers.

    Until it is whole and verified it lies in `<out>.part`, where an interrupted download goes on.

    Args:
        info: what the cloud said.
        call: asks the cloud.
        out: the folder to make; an older package there is replaced.
        signer: fingerprint of the root key that the package must be signed under: the cloud's own.

    Raises:
        ConfigError: something else than a package is at `out`.
        DiskError: there is no room for the files.
        PackageError: what the cloud offers is no whole package, or one of another model or plan.
        RefusedError: the cloud offers no package.
        RemoteProtocolError: a file's name or hash is wrong.
        SignerError: somebody else has signed it.
    """
    check_free(out)
    part = out.with_name(f"{out.name}.part")
    listing = _listing(m.Shelf.EMULATOR, call)
    with locked(part):
        with disk_errors(part):
            _remove_others(part, listing)
        _complete(part, m.Shelf.EMULATOR, listing, f"fetching the package of {info.model}", call)
        try:
            package = open_package(part, signer=signer)
            if (package.digest, str(package.plan)) != (info.digest, info.plan):
                raise PackageError(
                    f"the cloud offers a package of {package.model} (digest {package.digest[:16]}) for the plan "
                    f"{package.plan}, but serves {info.model} (digest {info.digest[:16]}) split {info.plan}: ask its "
                    "owner for one of this model"
                )
        except (PackageError, SignerError):
            shutil.rmtree(part, ignore_errors=True)
            raise
        if out.exists():
            remove_folder(out)
        with disk_errors(out):
            part.rename(out)
            sync(out.parent)
    return Package(out, package.manifest, package.id, package.signer)


def fetch_adapter(info: m.SessionInfo, call: Call, parts: Path, plan: SplitPlan) -> Path:
    """Fetch the adapter that this tenant has plugged in, and check it as the cloud has.

    Args:
        info: what the cloud said.
        call: asks the cloud.
        parts: the edge's parts, as `fetch_parts` brings them.
        plan: who holds which layers.

    Returns:
        A folder for `isthmus.backbone.adapters.load_adapter`, named after the adapter's contents.

    Raises:
        AdapterError: what came is no adapter for this model.
        DiskError: there is no room for the files.
        RefusedError: no adapter is plugged in.
        RemoteProtocolError: a file's name or hash is wrong.
    """
    listing = _listing(m.Shelf.ADAPTER, call)
    contents = hashlib.sha256()
    for entry in sorted(listing.entries, key=lambda entry: entry.name):
        contents.update(f"{entry.name} {entry.sha256.hex()}\n".encode())
    folder = default_cache() / "adapters" / _name(info) / contents.hexdigest()[:32]
    with locked(folder):
        _complete(folder, m.Shelf.ADAPTER, listing, "fetching the plugged-in adapter", call)
        check_adapter(folder, None, parts, plan, any_package=True)
    return folder


@contextmanager
def transfer_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on standard error; gives what moves it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


def _name(info: m.SessionInfo) -> str:
    return f"{info.digest[:16]}-{info.plan.replace(':', '-')}"


def _listing(shelf: m.Shelf, call: Call) -> m.FileList:
    listing = call(m.FileList, lambda attempt: m.FetchList(shelf))
    for entry in listing.entries:
        if not belongs(entry.name, shelf):
            raise RemoteProtocolError(
                f"the cloud offers the file {entry.name!r}, which is none of {_NAMES[shelf]}: ask its owner what it is"
            )
    return listing


def _complete(folder: Path, shelf: m.Shelf, listing: m.FileList, what: str, call: Call) -> None:
    missing = [entry for entry in listing.entries if not _whole(folder / entry.name, entry)]
    if not missing:
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with transfer_bar(what, sum(entry.size for entry in missing)) as advance:
            for entry in missing:
                _fetch(folder, shelf, entry, call, advance)


def _fetch(folder: Path, shelf: m.Shelf, entry: m.FileEntry, call: Call, advance: Callable[[int], None]) -> None:
    unfinished = folder / _unfinished(entry)
    offset = min(unfinished.stat().st_size, entry.size) if unfinished.exists() else 0
    advance(offset)
    with unfinished.open("ab") as file:
        file.truncate(offset)
        while offset < entry.size:
            piece = call(m.Blob, partial(_ask, shelf, entry.name, offset))
            came = (piece.name, piece.offset, piece.total, piece.sha256)
            if came != (entry.name, offset, entry.size, entry.sha256) or not len(piece.data):
                raise RemoteProtocolError(f"the cloud sent another piece of {entry.name} than the one at {offset}")
            file.write(piece.data)
            offset += len(piece.data)
            advance(len(piece.data))
    if not _whole(unfinished, entry):
        unfinished.unlink()
        raise RemoteProtocolError(f"{entry.name} arrived with another hash than the cloud announced: fetch it again")
    unfinished.replace(folder / entry.name)


def _unfinished(entry: m.FileEntry) -> str:
    # The hash is in the name, so that a file which changed on the other side is not continued with the new one's bytes.
    return f".{entry.name}.{entry.sha256.hex()[:16]}.part"


def _remove_others(folder: Path, listing: m.FileList) -> None:
    """Remove what an interrupted download of an older package left: a verified folder has no other files."""
    if not folder.is_dir():
        return
    wanted = {name for entry in listing.entries for name in (entry.name, _unfinished(entry))}
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()


def _ask(shelf: m.Shelf, name: str, offset: int, attempt: int) -> m.Fetch:
    return m.Fetch(shelf, name, offset)


def _whole(path: Path, entry: m.FileEntry) -> bool:
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest() == entry.sha256
