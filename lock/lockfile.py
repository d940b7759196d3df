"""Reading and writing the lock, `lock/requirements.txt`: a requirements file of pip's in which each line has hashes.

It holds for Python 3.11 to 3.13 on Linux, x86-64 and Arm: where they differ, a package has several lines, told apart by
their markers. Standard library alone, as it is read before anything is installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LOCK = FOLDER / "requirements.txt"
TORCH_CPU = FOLDER / "torch-cpu.sha256"

_LINE = re.compile(
    r"(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)==(?P<version>\S+)(?: ; (?P<marker>.+?))?"
    r"(?P<hashes>(?: +--hash=sha256:[0-9a-f]{64})+)"
)
_DIGEST = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<file>\S+\.whl)")


@dataclass(frozen=True)
class Entry:
    """One line of the lock.

    Attributes:
        name: the package, in lower case with hyphens.
        version: the version, without a local part: 2.13.0 holds for 2.13.0+cpu too.
        marker: where the line holds, as PEP 508 writes it; empty for everywhere.
        digests: the SHA-256 of each file that may be installed.
    """

    name: str
    version: str
    marker: str
    digests: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """The line without its hashes."""
        return f"{self.name}=={self.version}" + (f" ; {self.marker}" if self.marker else "")

    @property
    def hashed(self) -> str:
        """The line with its hashes, as pip reads it."""
        return " ".join([self.requirement, *(f"--hash=sha256:{digest}" for digest in self.digests)])


def read(text: str) -> list[Entry]:
    """The lines of a lock.

    Raises:
        ValueError: a line is not a version with hashes: an index, an address, an option, or a missing hash.
    """
    found = []
    for line in text.replace("\\\n", "").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            raise ValueError(f"the lock may hold versions with hashes alone, and has the line {line[:80]!r}")
        digests = tuple(re.findall(r"[0-9a-f]{64}", match["hashes"]))
        found.append(Entry(match["name"], match["version"], match["marker"] or "", digests))
    return found


def write(entries: Iterable[Entry], header: str) -> str:
    """The text of a lock; `read` gives the entries back."""
    lines = [f"# {line}" for line in header.splitlines()]
    for entry in entries:
        lines.append(" \\\n    ".join([entry.requirement, *(f"--hash=sha256:{digest}" for digest in entry.digests)]))
    return "\n".join(lines) + "\n"


def cpu_builds(text: str) -> dict[str, str]:
    """The digests of torch's CPU builds by their files' names.

    Raises:
        ValueError: a line is neither a comment nor what `sha256sum` prints of a wheel.
    """
    found = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = _DIGEST.fullmatch(line)
        if match is None:
            raise ValueError(f"{TORCH_CPU.name} may hold what sha256sum prints alone, and has the line {line!r}")
        found[match["file"]] = match["digest"]
    return found


def with_cpu_builds(entries: Iterable[Entry], builds: dict[str, str]) -> list[Entry]:
    """The entries, with the hashes of torch's CPU builds among torch's.

    Raises:
        ValueError: a build is not of the version that the lock names.
    """
    changed = []
    for entry in entries:
        if entry.name == "torch":
            for file in builds:
                if not file.startswith(f"torch-{entry.version}+cpu-"):
                    raise ValueError(
                        f"the lock has torch {entry.version}, and {TORCH_CPU.name} names {file}: bring them together"
                    )
            changed.append(replace(entry, digests=tuple(sorted({*entry.digests, *builds.values()}))))
        else:
            changed.append(entry)
    return changed
