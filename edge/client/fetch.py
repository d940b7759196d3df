"""Fetching files from the sets that the cloud offers, over the sealed session.

    parts      the edge's parts of the model, into the cache
    emulator   a package, into a folder of the user's, which appears when it is whole and verified
    adapter    the tenant's own plugged-in adapter, into the cache

An interrupted download goes on where it stopped. What a folder of the cache has and the cloud does not list is removed:
transformers decides by the files of a folder what it loads. A folder of the cache belongs to one pin: the digest in its
name is the cloud's word, and one cloud cannot put a file into a folder of another one's. All folders of one pin's parts
together are held to what one answer may have, and so are those of its adapters: the least used ones are removed.

How much may come is told in `isthmus.edge.client.offers`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS
from isthmus.backbone.checkpoints.sources import Checkpoint, default_cache
from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE, WHOLE_FILE
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import Weights, weigh_parts
from isthmus.common.errors import ConfigError, PackageError, RemoteProtocolError, SignerError
from isthmus.common.files import disk_errors, locked, remove_folder, sha256_of, sync
from isthmus.common.ownership import check_contents, private_folder
from isthmus.edge.client.offers import (
    DEFAULT_MAX_BYTES,
    MAX_FOLDERS,
    WEIGHTS,
    WEIGHTS_HEADER,
    check_offer,
    check_room,
    check_size,
)
from isthmus.edge.client.session_keeper import SessionKeeper
from isthmus.emulator.compress.recipe import EMULATOR_FILE
from isthmus.emulator.package.build import check_free
from isthmus.emulator.package.intake import check_adapter, most_adapter_bytes
from isthmus.emulator.package.package import Package, open_package
from isthmus.protocol import messages as m
from isthmus.protocol.secure.keys import Fingerprint

Weigh = Callable[[], Mapping[str, int]]
"""Most bytes of each file of weights, found out from the configuration that has come."""


def fetch_parts(cloud: SessionKeeper, pin: Fingerprint, max_bytes: int = DEFAULT_MAX_BYTES) -> Path:
    """Bring the cache up to date with what the cloud serves.

    Args:
        cloud: who is asked; the digest and the plan that it serves name the folder, below that of the pin.
        pin: fingerprint of the cloud's root key.
        max_bytes: most bytes of all files, with those that are kept of this cloud from before.

    Returns:
        A folder for `isthmus.backbone.split.edge_parts.load_edge_parts`.

    Raises:
        CheckpointError: the configuration that came describes no model.
        DiskError: there is no room for the files.
        LimitError: a file, or all together, are larger than they may be.
        OwnershipError: another user of the machine may write to the cache.
        RemoteProtocolError: the cloud offers a file that belongs to no model's parts, or a file does not have the hash
            that the cloud gave for it.
    """
    info = cloud.info
    which = m.FetchList(m.FileSet.PARTS)
    listing = _listing(which, cloud, max_bytes)
    with _cached("edge", pin, _name(info), listing, max_bytes) as folder:

        def weigh() -> Mapping[str, int]:
            return {EDGE_FILE: _weights(folder, info).edge}

        _complete(folder, which, listing, f"fetching the edge's parts of {info.model}", cloud, weigh)
    return folder


def fetch_package(
    cloud: SessionKeeper, out: Path, signer: Fingerprint, max_bytes: int = DEFAULT_MAX_BYTES, name: str | None = None
) -> Package:
    """Fetch a package that the cloud offers.

    Until it is whole and verified it lies in `<out>.part`, where an interrupted download goes on. What `out` has
    already is verified, and not fetched again.

    Args:
        cloud: who is asked.
        out: the folder to make; an older package there is replaced.
        signer: fingerprint of the root key that the package must be signed under: the cloud's own.
        max_bytes: most bytes of all files.
        name: that of the package; None for the only one.

    Raises:
        CheckpointError: the configuration that came describes no model.
        ConfigError: the name is none, or something else than a package is at `out`.
        DiskError: there is no room for the files.
        LimitError: a file, or all together, are larger than they may be.
        OwnershipError: `<out>.part` is another user's, or others may write to it.
        PackageError: what the cloud offers is no whole package, or one of another model or plan.
        RefusedError: the cloud offers no such package, or several where none is named.
        RemoteProtocolError: a file's name or hash is wrong.
        SignerError: somebody else has signed it.
    """
    check_free(out)
    if name is not None and not m.PACKAGE_NAME.fullmatch(name):
        raise ConfigError(f"--package {name[:64]!r}: {m.PACKAGE_NAME_NEEDS}")
    info = cloud.info
    part = out.with_name(f"{out.name}.part")
    which = m.FetchList(m.FileSet.EMULATOR, name)
    listing = _listing(which, cloud, max_bytes)

    def weigh() -> Mapping[str, int]:
        most = _weights(part, info).whole  # an emulator is smaller than what it stands for, whatever the plan
        return {EDGE_FILE: most, EMULATOR_FILE: most}

    with locked(part):
        if all(_whole(out / entry.name, entry) for entry in listing.entries):
            with suppress(PackageError, SignerError):  # with a strange file, say, it is fetched anew
                return _offered(out, info, signer)
        _complete(part, which, listing, f"fetching the package of {info.model}", cloud, weigh)
        try:
            package = _offered(part, info, signer)
        except (PackageError, SignerError):
            shutil.rmtree(part, ignore_errors=True)
            raise
        if out.exists():
            remove_folder(out)
        with disk_errors(out):
            part.rename(out)
            sync(out.parent)
    return Package(out, package.manifest, package.id, package.signer)


def _offered(folder: Path, info: m.SessionInfo, signer: Fingerprint) -> Package:
    """The package in a folder, verified, and of what the cloud serves. Raises PackageError, SignerError."""
    package = open_package(folder, signer=signer)
    check_served(package, info)
    return package


def check_served(package: Package, info: m.SessionInfo) -> None:
    """Check that a cloud has the layers that a package's emulator stands for. Raises PackageError."""
    if package.digest != info.digest:
        raise PackageError(
            f"the package is of {package.model} (digest {package.digest[:16]}), and the cloud serves {info.model} "
            f"(digest {info.digest[:16]}): fetch a package that it offers, or ask its owner to serve this one's model"
        )
    if not SplitPlan.parse(info.plan, info.n_layers).cloud.covers(package.plan.cloud):
        raise PackageError(
            f"the package is of {package.model} split {package.plan}, and a cloud of the split {info.plan} does not "
            "have its middle: fetch a package that it offers, or ask its owner to serve this one's split"
        )


def fetch_adapter(cloud: SessionKeeper, parts: Path, pin: Fingerprint, max_bytes: int = DEFAULT_MAX_BYTES) -> Path:
    """Fetch the adapter that this tenant has plugged in, and check it as the cloud has.

    Args:
        cloud: who is asked.
        parts: the edge's parts, as `fetch_parts` brings them.
        pin: fingerprint of the cloud's root key.
        max_bytes: most bytes of all files, with those that are kept of this cloud from before.

    Returns:
        A folder for `isthmus.backbone.adapters.adapter_files.load_adapter`, named after the adapter's contents.

    Raises:
        AdapterError: what came is no adapter for this model.
        DiskError: there is no room for the files.
        LimitError: a file, or all together, are larger than they may be.
        OwnershipError: another user of the machine may write to the cache.
        RefusedError: no adapter is plugged in.
        RemoteProtocolError: a file's name or hash is wrong.
    """
    plan = SplitPlan.parse(cloud.info.plan, cloud.info.n_layers)
    which = m.FetchList(m.FileSet.ADAPTER)
    listing = _listing(which, cloud, max_bytes)
    contents = hashlib.sha256()
    for entry in sorted(listing.entries, key=lambda entry: entry.name):
        contents.update(f"{entry.name} {entry.sha256.hex()}\n".encode())

    def weigh() -> Mapping[str, int]:
        return dict.fromkeys((ADAPTER_WEIGHTS, WHOLE_FILE), most_adapter_bytes(parts, plan))

    name = f"{_name(cloud.info)}-{contents.hexdigest()[:32]}"
    with _cached("adapters", pin, name, listing, max_bytes) as folder:
        _complete(folder, which, listing, "fetching the plugged-in adapter", cloud, weigh)
        check_adapter(folder, (), parts, plan, any_package=True)
    return folder


@contextmanager
def transfer_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on standard error; gives what moves it on."""
    # The text has the cloud's name for its model, which is no markup.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


def _name(info: m.SessionInfo) -> str:
    return f"{info.digest[:16]}-{info.plan.replace(':', '-')}"


@contextmanager
def _cached(kind: str, pin: Fingerprint, name: str, listing: m.FileList, max_bytes: int) -> Iterator[Path]:
    """A folder of the cache that belongs to one cloud, with room for what is listed and locked for this process.

    The lock is that of the cloud's folders together. So two edges of one user neither append to the same unfinished
    files nor remove a folder that is being fetched.
    """
    root = default_cache()
    with disk_errors(root):
        own = private_folder(root, kind, pin.digest.hex())
    with locked(own):
        with disk_errors(own):
            folder = private_folder(own, name)
            os.utime(folder)
            _remove_oldest(folder, sum(entry.size for entry in listing.entries), max_bytes)
        yield folder


def _remove_oldest(folder: Path, size: int, max_bytes: int) -> None:
    """Remove those of a cloud's other folders that are too many or too large beside `folder`, least used ones first.

    Args:
        folder: the one in use.
        size: bytes that it is to have.
        max_bytes: most bytes of all of them.
    """
    others = [path for path in folder.parent.iterdir() if path != folder and path.is_dir() and not path.is_symlink()]
    others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for number, other in enumerate(others, start=2):
        size += sum(path.lstat().st_size for path in other.rglob("*"))
        if size > max_bytes or number > MAX_FOLDERS:
            shutil.rmtree(other)


def _listing(which: m.FetchList, cloud: SessionKeeper, max_bytes: int) -> m.FileList:
    listing = cloud.ask(m.FileList, which)
    check_offer(listing.entries, which.file_set, max_bytes)
    return listing


def _weights(folder: Path, info: m.SessionInfo) -> Weights:
    """What the weights may take on the disk, going by the configuration that lies in `folder`."""
    plan = SplitPlan.parse(info.plan, info.n_layers)
    weights = weigh_parts(Checkpoint(folder, info.model), plan)
    return Weights(weights.edge + WEIGHTS_HEADER, weights.whole + WEIGHTS_HEADER)


def _complete(
    folder: Path, which: m.FetchList, listing: m.FileList, what: str, cloud: SessionKeeper, weigh: Weigh
) -> None:
    """Bring a folder up to what is listed. What is not, is removed."""
    with disk_errors(folder):
        check_contents(private_folder(folder))
        _remove_others(folder, listing)
        missing = [entry for entry in listing.entries if not _whole(folder / entry.name, entry)]
        check_room(folder, sum(entry.size - _begun(folder, entry) for entry in missing))
    if not missing:
        return
    # The weights come last: how large they may be is in the configuration.
    missing.sort(key=lambda entry: entry.name in WEIGHTS)
    most: Mapping[str, int] = {}
    with disk_errors(folder), transfer_bar(what, sum(entry.size for entry in missing)) as advance:
        for entry in missing:
            if entry.name in WEIGHTS:
                most = most or weigh()
                check_size(entry, most[entry.name])
            _fetch(folder, which, entry, cloud, advance)


def _fetch(
    folder: Path, which: m.FetchList, entry: m.FileEntry, cloud: SessionKeeper, advance: Callable[[int], None]
) -> None:
    unfinished = folder / _unfinished(entry)
    offset = _begun(folder, entry)
    advance(offset)
    with unfinished.open("ab") as file:
        file.truncate(offset)
        while offset < entry.size:
            most = min(m.MAX_FILE_CHUNK, entry.size - offset)
            wanted = m.Fetch(which.file_set, entry.name, offset, which.package)
            chunk = cloud.ask(m.Blob, wanted, answer_bytes=most)
            came = (chunk.name, chunk.offset, chunk.total, chunk.sha256)
            if came != (entry.name, offset, entry.size, entry.sha256) or not len(chunk.data):
                raise RemoteProtocolError(f"the cloud sent another chunk of {entry.name} than the one at {offset}")
            file.write(chunk.data)
            offset += len(chunk.data)
            advance(len(chunk.data))
    if not _whole(unfinished, entry):
        unfinished.unlink()
        raise RemoteProtocolError(f"{entry.name} arrived with another hash than the cloud announced: fetch it again")
    unfinished.replace(folder / entry.name)


def _unfinished(entry: m.FileEntry) -> str:
    # The hash is in the name, so that a file which changed on the other side is not continued with the new one's bytes.
    return f".{entry.name}.{entry.sha256.hex()[:16]}.part"


def _begun(folder: Path, entry: m.FileEntry) -> int:
    """Bytes of an unfinished file that are there already."""
    unfinished = folder / _unfinished(entry)
    return min(unfinished.stat().st_size, entry.size) if unfinished.is_file() else 0


def _remove_others(folder: Path, listing: m.FileList) -> None:
    """Remove what is not listed: what an older listing left, or anybody else."""
    wanted = {name for entry in listing.entries for name in (entry.name, _unfinished(entry))}
    for path in folder.iterdir():
        if path.name in wanted and path.is_file() and not path.is_symlink():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _whole(path: Path, entry: m.FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and sha256_of(path) == entry.sha256
