"""Reading and writing small key files: private modes, no overwriting, whole files or none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from isthmus.common.errors import DiskError, KeyFileError
from isthmus.common.files import sync, write_atomic
from isthmus.common.ownership import fault, intruder

MAX_FILE = 1 << 22
_TEMPORARY = ".isthmus-tmp-"  # as the other files that are on their way
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def make_folder(folder: Path) -> None:
    """Make a folder for keys, mode 0700, and those above it. One that is there stays as it is.

    Raises:
        KeyFileError: it cannot be made.
        DiskError: the disk is full.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _failed(folder, error) from error


def check_folder(folder: Path) -> None:
    """Make sure that no other user can put keys or enrolments into a folder.

    Raises:
        KeyFileError: another user owns it or a folder above it, or others may write there; or it is not there.
    """
    try:
        wrong = intruder(folder)
    except OSError as error:
        raise KeyFileError(f"{folder} cannot be entered ({error.strerror}): check path and permissions") from error
    if wrong is not None:
        raise KeyFileError(
            f"another user could put keys and enrolments into {folder}, as {wrong}: choose a folder of your own, or "
            f"`chown` it to the user that this runs as and `chmod go-w` it"
        )


def create_file(path: Path, data: bytes, mode: int) -> None:
    """Write a new file with a mode, from its first moment on. It is there whole, or, after a power cut, not at all.

    Raises:
        KeyFileError: it exists, or cannot be made.
        DiskError: the disk is full.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
        temporary = Path(name)
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123  # a descriptor, not a path
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _name(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)
    except FileExistsError as error:
        raise KeyFileError(
            f"{path} exists and is not overwritten: move it away first, or choose another path"
        ) from error
    except OSError as error:
        raise _failed(path, error) from error


def _name(temporary: Path, path: Path) -> None:
    """Give a file a second name, or its only one where the file system knows no second ones. Nothing is overwritten."""
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # nobody else takes the name now
        try:
            temporary.replace(path)
        except OSError:
            path.unlink()
            raise


def replace_file(path: Path, data: bytes, mode: int) -> None:
    """Write a file atomically: a reader sees the old one or the new one, whole.

    Raises:
        KeyFileError: it cannot be written.
        DiskError: the disk is full.
    """
    try:
        write_atomic(path, data, mode)
    except DiskError as error:
        if isinstance(error.__cause__, OSError):
            raise _failed(path, error.__cause__) from error
        raise


def read_text(path: Path, remedy: str, *, ours: bool = False) -> str:
    """Read a small public file of UTF-8 text.

    Args:
        path: the file.
        remedy: what to do where there is none.
        ours: whether it decides whom to trust, so that no other user may write it.

    Raises:
        KeyFileError: it is missing, unreadable, too large or not text; or another user may write it, if it is `ours`.
    """
    return _decode(path, _read(path, remedy, ours=ours))


def read_private(path: Path, remedy: str) -> bytes:
    """Read a small private file.

    Raises:
        KeyFileError: it is missing, unreadable, too large, or others than its owner can read it.
    """
    return _read(path, remedy, private=True, ours=False)  # root may read an owner's key, as ssh does


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, so that two writers of one file in it do not lose each other's lines."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path, remedy: str, *, private: bool = False, ours: bool) -> bytes:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if private and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                mode = stat.S_IMODE(status.st_mode)
                raise KeyFileError(f"{path} can be read by others (mode {mode:04o}): run `chmod 600 {path}`")
            wrong = fault(file.fileno(), status) if ours else None
            if wrong is not None:
                raise KeyFileError(f"{path} says whom to trust, and {wrong}: `chown` it to this user, `chmod go-w` it")
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError as error:
        raise KeyFileError(f"{path} does not exist: {remedy}") from error
    except IsADirectoryError as error:
        raise KeyFileError(f"{path} is a folder, not a key file: {remedy}") from error
    except PermissionError as error:
        raise KeyFileError(f"{path} cannot be read by this user: check its owner and mode") from error
    if len(data) > MAX_FILE:
        raise KeyFileError(f"{path} is over {MAX_FILE} bytes and cannot be a key file: {remedy}")
    return data


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path} is not text in UTF-8 (byte {error.start}): restore it or make it anew") from error


def _failed(path: Path, error: OSError) -> KeyFileError | DiskError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"{path} cannot be written: the disk is full. Free some space and try again.")
    return KeyFileError(f"{path} cannot be written ({error.strerror}): check the folder and its permissions")
