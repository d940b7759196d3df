"""A file store: the files of one file set, which edges may fetch chunk by chunk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from isthmus.cloud.telemetry.logs import log
from isthmus.common.files import sha256_of
from isthmus.emulator.package.offered_files import belongs
from isthmus.protocol import messages as m

HASH_SECONDS = 10.0
"""For which a question for a large file set waits: far less than the 60 s after which whoever asks gives up."""


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size: int
    sha256: bytes


class FileStore:
    """The plain files of a folder that belong to a file set, as they were when the store was made.

    Args:
        folder: where the files lie.
        which: the file set; a file that does not belong to it is not shown.
    """

    def __init__(self, folder: Path, which: m.FileSet) -> None:
        self._files: dict[str, _File] = {}
        for path in sorted(folder.iterdir()):
            if path.is_symlink() or not path.is_file() or not belongs(path.name, which):
                continue
            self._files[path.name] = _File(path, path.stat().st_size, sha256_of(path))

    @classmethod
    def joined(cls, stores: Mapping[str, FileStore]) -> Self:
        """A store with the files of several, each under its name behind the prefix of its store."""
        made = cls.__new__(cls)
        made._files = {
            f"{prefix}{name}": file for prefix, store in stores.items() for name, file in store._files.items()
        }
        return made

    def listing(self) -> m.FileList:
        """Name, size and hash of every file."""
        return m.FileList(tuple(m.FileEntry(name, file.size, file.sha256) for name, file in self._files.items()))

    def read(self, name: str, offset: int) -> m.Blob | m.Status:
        """One chunk of a file, from `offset` on, or a refusal that names the file."""
        found = self._files.get(name)
        if found is None or offset > found.size:
            known = ", ".join(self._files)
            text = f"no file {name!r} at offset {offset}; there are: {known}"
            return m.Status.saying(m.StatusCode.BAD_REQUEST, None, text)
        try:
            with found.path.open("rb") as file:
                file.seek(offset)
                data = file.read(min(m.MAX_FILE_CHUNK, found.size - offset))
        except OSError as error:  # its text has a path of this machine
            log("file_unreadable", logging.ERROR, error=type(error).__name__, file=name)
            text = f"the file {name!r} cannot be read; the cloud's owner has a log of it"
            return m.Status.saying(m.StatusCode.INTERNAL, None, text)
        return m.Blob(name, offset, found.size, found.sha256, data)


class HashedLater:
    """A file store that is made once somebody asks for it, by one thread of its own: hashing a large model takes long.

    Args:
        folder: where the files lie.
        which: the file set.
        seconds: for which a question waits; a small model is hashed by then.
    """

    def __init__(self, folder: Path, which: m.FileSet, seconds: float = HASH_SECONDS) -> None:
        self._folder, self._which, self._seconds = folder, which, seconds
        self._lock = threading.Lock()
        self._made: Future[FileStore] | None = None

    def __call__(self) -> FileStore | m.Status:
        """The store, or the answer to give until there is one."""
        with self._lock:
            if self._made is None or (self._made.done() and self._made.exception() is not None):
                self._made = Future()
                threading.Thread(target=self._make, args=(self._made,), name="hashing", daemon=True).start()
            made = self._made
        try:
            return made.result(self._seconds)
        except TimeoutError:
            return m.Status(m.StatusCode.INTERNAL, None, "the files are being hashed: ask again in a while")
        except OSError as error:  # its text has a path of this machine
            log("files_unreadable", logging.ERROR, error=type(error).__name__)
            return m.Status(m.StatusCode.INTERNAL, None, "the files cannot be read; the cloud's owner has a log of it")

    def _make(self, made: Future[FileStore]) -> None:
        try:
            made.set_result(FileStore(self._folder, self._which))
        except BaseException as error:  # noqa: BLE001  # it is raised where the store is asked for
            made.set_exception(error)
