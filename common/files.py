"""Writing so that a crash or a full disk leaves either the old file or the new one, never half; and files' hashes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from isthmus.common.errors import ConfigError, DiskError, IsthmusError
from isthmus.common.ownership import check_contents, check_owner, private_folder

# Folders on their way in or out carry this prefix; nothing ever reads one, and `sweep` removes what a crash left.
_TEMPORARY = ".isthmus-tmp-"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's and safetensors' complaints about `path` into `DiskError`."""
    try:
        yield
    except IsthmusError:
        raise  # some are OSErrors too, and say more than this would
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DiskError(
            f"{path} cannot be written ({reason}): free some space or choose another folder; "
            "what was saved before is untouched."
        ) from error


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `path`, whole or not at all, and see it to the disk.

    Raises:
        DiskError: The disk is full or cannot be written; an older file of that name is unchanged.
    """
    with new_file(path, mode) as file:
        file.write(data)


@contextmanager
def new_file(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A temporary file beside `path` that takes its name, synced to the disk, when the block ends without an error.

    Raises:
        DiskError: The disk is full or cannot be written; an older file of that name is unchanged.
    """
    with disk_errors(path):
        # A new file of a name that nobody knows beforehand: a link that lies in wait for it is not followed.
        descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
        temporary = Path(name)
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123  # a descriptor, not a path
                os.fchmod(file.fileno(), mode)
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def private_opener(path: str, flags: int) -> int:
    """The `opener` of `open` for a file that its user alone may read and write once it is made."""
    return os.open(path, flags, 0o600)


def sha256_of(path: Path) -> bytes:
    """SHA-256 of a file's contents.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def new_folder(path: Path, mode: int = 0o755) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name, synced to the disk, when the block ends without an error.

    An older folder of that name is replaced. A folder cannot be exchanged in one call, so a crash in between can leave
    no folder of that name; it never leaves half of one.

    Args:
        path: The folder to make.
        mode: Its mode, of which the umask takes away. With the usual umask of a group that shares files its members
            could write to it, and what others can write to is not used.

    Raises:
        DiskError: The disk is full or cannot be written; the temporary folder is removed.
    """
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    old = path.with_name(f"{_TEMPORARY}old-{path.name}")
    with disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(mode, parents=True)
            yield temporary
            for file in [*temporary.rglob("*"), temporary]:
                sync(file)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            temporary.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: Path, ours: Callable[[Path], bool], what: str) -> None:
    """Make sure that `new_folder` may make a folder, or replace one, without a loss.

    Args:
        path: The folder.
        ours: Whether a folder that is there is one that may be replaced.
        what: What such a folder is.

    Raises:
        ConfigError: Something else is there, if only a link to such a folder; or the path ends in no name.
    """
    if path.name in ("", ".."):
        raise ConfigError(f"{path} is no name of a folder to make or to replace: give another --out")
    if path.is_symlink() or (path.exists() and not ours(path)):
        raise ConfigError(f"{path} exists and is no {what}: move it away, or give another --out")


@contextmanager
def locked(path: Path, mode: int = 0o644) -> Iterator[None]:
    """Hold a lock that stands for `path`: what several processes may make is made by one of them at a time.

    The others wait. The lock is a file beside `path`, which stays; the system drops the lock itself with its process.

    Args:
        path: What it stands for.
        mode: Of the lock's file, where it is made.

    Raises:
        DiskError: The folder of `path` cannot be made or written.
        OwnershipError: The file is another user's.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open_lock(path.parent / f".{path.name}.lock", mode)
    with lock:
        check_owner(path, os.fstat(lock.fileno()))
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_lock(path: Path, mode: int = 0o644) -> IO[str]:
    """Open the file of a lock, made where there is none. It is neither emptied nor found through a link.

    Raises:
        OSError: It cannot be made, or a link is in its place.
    """
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode), "r+")  # noqa: PTH123  # a descriptor


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """Make the folder of a run and keep it for this process: two runs would sweep away each other's checkpoints.

    Raises:
        ConfigError: Another process trains into `out`.
        DiskError: `out` cannot be made or written.
        OwnershipError: `out` or something in it is another user's, or others may write to it.
    """
    with disk_errors(out):
        private_folder(out)
        lock = open_lock(out / ".lock")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is training into {out}: wait for it or stop it, or give another --out."
            ) from None
        with disk_errors(out):  # not before: another process's files come and go while it has the lock
            check_contents(out)
        yield


def remove_folder(path: Path) -> None:
    """Remove a folder so that a crash on the way leaves nothing that looks whole."""
    with disk_errors(path):
        doomed = path.with_name(f"{_TEMPORARY}old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what an interrupted write left in `folder`."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
