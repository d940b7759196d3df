"""Another user of this machine: a process with another uid, and a folder in which it meets this one's files.

Tests with it need root (the marker `root`). Their folder's conftest imports the fixtures.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

NOBODY = 65534


class Attack(Protocol):
    """Runs lines of shell as another user; raises where one fails, unless it may (`check=False`)."""

    def __call__(self, lines: str, *, check: bool = True) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may write to and nobody may rename others' files in, as /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="other-"))  # a short name: paths of sockets have a limit
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def as_nobody(place: Path) -> Attack:
    """An attack from inside `place`."""

    def run(lines: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["/bin/sh", "-ec", f"umask 0\n{lines}"]
        return subprocess.run(
            command, cwd=place, user=NOBODY, group=NOBODY, extra_groups=[], check=check, capture_output=True, text=True
        )

    return run
