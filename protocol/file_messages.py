"""Messages about files: those that an edge fetches, and those of an adapter that it brings."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import Annotated

from isthmus.common.errors import MessageError
from isthmus.protocol.limits import MIB, Buffer, Size, Text

MAX_FILE_CHUNK = 8 * MIB
"""Most bytes of a file in one message: what a broken connection costs of a download at most."""
MAX_PUT_FILES = 8
"""Most files of an adapter: one more than the names that one may have (`emulator.package.intake.ADAPTER_FILES`)."""

# No separators, no leading dot, and therefore no "..": a name is safe to join to a folder.
FileName = Annotated[
    str,
    Text(
        re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*"),
        "a file name has 1 to 128 of letters, digits, '_', '-' and '.', which does not come first",
    ),
]
MAX_PACKAGES = 8
"""Most packages that a cloud offers: an answer that lists them all has room in a status."""
PACKAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,31}")
PACKAGE_NAME_NEEDS = "a package's name has 1 to 32 letters, digits, '_', '-' and '.', the first no '-' or '.'"
PackageName = Annotated[str, Text(PACKAGE_NAME, PACKAGE_NAME_NEEDS)]
Digest = Annotated[bytes, Size(32, 32)]
"""The SHA-256 of a whole file."""


class FileSet(enum.IntEnum):
    """What an edge may fetch the files of."""

    PARTS = 1
    """The edge's parts of the model."""
    EMULATOR = 2
    """A package with an emulator of the middle layers, if the cloud offers one."""
    ADAPTER = 3
    """The adapter that this edge's own tenant has plugged in, if it has."""
    MODEL = 4
    """The whole checkpoint, which other workers of the cloud load their layers from. For these alone."""
    ADAPTERS = 5
    """The adapters that all tenants have plugged in, for other workers of the cloud alone."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its name, its size in bytes, and the SHA-256 of its contents."""

    name: FileName
    size: int
    sha256: Digest


@dataclass(frozen=True, slots=True)
class FetchList:
    """Ask which files a file set has, or a package."""

    file_set: FileSet
    package: PackageName | None = None

    def check(self) -> None:
        """Check that no other file set's question names a package."""
        _check_package(self)


@dataclass(frozen=True, slots=True)
class FileList:
    """The files of a file set."""

    entries: tuple[FileEntry, ...]

    def check(self) -> None:
        """Check that the names differ."""
        _check_names(self.entries)


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask for a file of a file set, from `offset` on."""

    file_set: FileSet
    name: FileName
    offset: int = 0
    package: PackageName | None = None

    def check(self) -> None:
        """Check that no other file set's question names a package."""
        _check_package(self)


@dataclass(frozen=True, slots=True)
class _Chunk:
    name: FileName
    offset: int
    total: int
    sha256: Digest
    data: Buffer = field(repr=False)

    def check(self) -> None:
        """Check that the chunk is within its bound and within the file."""
        if len(self.data) > MAX_FILE_CHUNK:
            raise MessageError(f"a chunk of {len(self.data)} bytes is refused: {MAX_FILE_CHUNK} are accepted")
        if self.offset + len(self.data) > self.total:
            raise MessageError(f"a chunk of {self.name!r} ends behind the file's {self.total} bytes")


@dataclass(frozen=True, slots=True)
class Blob(_Chunk):
    """A chunk of a file: `data` stands at `offset` of `total` bytes; `sha256` is that of the whole file."""


@dataclass(frozen=True, slots=True)
class Put(_Chunk):
    """A chunk of a file of an adapter, as in `Blob`. Without data it asks how much of the file the cloud holds."""


@dataclass(frozen=True, slots=True)
class PutReply:
    """How many bytes of a file the cloud holds now, from its beginning on: the next chunk stands there."""

    name: FileName
    sha256: Digest
    held: int


@dataclass(frozen=True, slots=True)
class PlugIn:
    """Plug in the adapter that these files are, which the cloud holds whole. It takes the place of an older one."""

    entries: Annotated[tuple[FileEntry, ...], Size(1, MAX_PUT_FILES)]

    def check(self) -> None:
        """Check that the names differ."""
        _check_names(self.entries)


def _check_package(question: FetchList | Fetch) -> None:
    if question.package and question.file_set != FileSet.EMULATOR:
        raise MessageError(f"a package {question.package!r} of the file set {question.file_set.name} is refused")


def _check_names(entries: tuple[FileEntry, ...]) -> None:
    if len({entry.name for entry in entries}) != len(entries):
        raise MessageError("a list of files names one file twice")
