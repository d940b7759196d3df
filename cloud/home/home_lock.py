"""One `serve` for each home, and the private folder of the Ray that it starts.

Two of them would remove each other's state and a pipeline's stage keys, so the second one is refused, whatever it
serves. The operating system holds the lock, on a file in the home, so it ends with the process. The file names that
process and the folder of its Ray: the next holder removes the folder that a killed one has left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from isthmus.common.errors import ConfigError, HomeInUseError
from isthmus.common.files import disk_errors, open_lock
from isthmus.common.ownership import intruder

LOCK_FILE = "serve.lock"
SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket (`sun_path` without its final zero; unix(7))."""
_PREFIX = "isthmus-"
_INSIDE = "ray"
_LONGEST_SOCKET = f"{_INSIDE}/session_2026-01-01_00-00-00_000000_{2**22}/sockets/plasma_store"


@contextlib.contextmanager
def occupied(home: Path) -> Iterator[HomeLock]:
    """Hold a home for this process.

    Raises:
        HomeInUseError: another process holds it.
        DiskError: the file of the lock cannot be made.
    """
    path = home / LOCK_FILE
    with disk_errors(path):
        file = open_lock(path)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(file).get("pid")
            raise HomeInUseError(
                f"process {holder or 'of another program'} serves with the home {home} already: stop it first, or give "
                "this one a --home of its own; with copies of worker_key, worker_cert and authorized_edges it is the "
                "same cloud to edges"
            ) from None
        lock = HomeLock(file)
        try:
            yield lock
        finally:
            lock.remove_ray_folder()


class HomeLock:
    """A home that this process holds. Made by `occupied`."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._ray_folder: Path | None = None
        _remove(_read(file).get("ray_folder"))
        self._write()

    def make_ray_folder(self) -> Path:
        """Make the folder for Ray's session: sockets, logs and what it spills. It is removed when the lock is released.

        Ray gives everything in it modes for everybody, so the folder lies in one of mode 0700, that this makes.

        Raises:
            ConfigError: there is no place for one.
        """
        self._ray_folder = socket_folder(len(_LONGEST_SOCKET))
        self._write()
        return self._ray_folder / _INSIDE

    def remove_ray_folder(self) -> None:
        """Remove it, and what Ray has left in it."""
        if self._ray_folder is not None:
            shutil.rmtree(self._ray_folder, ignore_errors=True)

    def _write(self) -> None:
        holder = {"pid": os.getpid(), "ray_folder": None if self._ray_folder is None else str(self._ray_folder)}
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(holder))
        self._file.flush()


def socket_folder(inside: int) -> Path:
    """Make a folder of mode 0700 with a random name, whose path is short enough for sockets.

    It is made in `RAY_TMPDIR` or the system's `TMPDIR`, or else in /tmp or the user's folder in /run.

    Args:
        inside: bytes of the longest path of a socket inside the folder.

    Raises:
        ConfigError: each of these places has too long a path, or other users may rename what is in it.
    """
    system = tempfile.gettempdir()
    places = (os.environ.get("RAY_TMPDIR") or system, system, "/tmp", f"/run/user/{os.getuid()}")  # noqa: S108  # see above
    faults = []
    for place in dict.fromkeys(places):
        try:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        except OSError as error:
            faults.append(f"{place}: {error.strerror}")
            continue
        length, fault = len(os.fsencode(folder)) + 1 + inside, intruder(folder)
        if length <= SOCKET_PATH_BYTES and fault is None:
            return folder
        folder.rmdir()
        faults.append(f"{place}: {fault or f'its sockets would have paths of {length} bytes'}")
    raise ConfigError(
        f"Ray's sockets need paths of at most {SOCKET_PATH_BYTES} bytes in a folder that no other user may rename "
        f"({'; '.join(faults)}): set TMPDIR to such a folder"
    )


def _read(file: IO[str]) -> dict[str, Any]:
    """What the last holder wrote; empty where it has written nothing, or was killed while it wrote."""
    file.seek(0)
    try:
        holder = json.load(file)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _remove(left: object) -> None:
    """Remove the folder that a killed holder left, if this module made it."""
    if not isinstance(left, str):
        return
    folder = Path(left)
    with contextlib.suppress(OSError):
        if folder.name.startswith(_PREFIX) and folder.lstat().st_uid == os.geteuid():
            shutil.rmtree(folder, ignore_errors=True)  # which does not follow a link
