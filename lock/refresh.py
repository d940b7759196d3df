"""Writes the lock anew (`make lock`): the newest versions that the ranges of pyproject.toml and tested.txt allow.

uv resolves for every Python and machine at once. It asks the index that its own settings name (UV_DEFAULT_INDEX) and
takes the hashes from there; the lock names no index.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lockfile

HEADER = """\
Written by `make lock`; not to be edited. The versions that were tested: Python 3.11 to 3.13 on Linux, x86-64 and Arm.
`make setup` takes the versions, `make setup LOCKED=1` and deploy/Containerfile the hashes too: see CONTRIBUTING.md."""


def _resolve() -> str:
    command = [
        *(str(Path(sys.executable).parent / "uv"), "pip", "compile", "pyproject.toml", "--extra", "dev"),
        *("--universal", "--python-version", "3.11", "--generate-hashes", "--upgrade", "--quiet"),
        *("--no-header", "--no-annotate", "--no-emit-index-url", "--constraints", str(lockfile.FOLDER / "tested.txt")),
    ]
    return subprocess.run(command, cwd=lockfile.FOLDER.parent, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Write the lock."""
    builds = lockfile.cpu_builds(lockfile.TORCH_CPU.read_text())
    entries = lockfile.with_cpu_builds(lockfile.read(_resolve()), builds)
    lockfile.LOCK.write_text(lockfile.write(entries, HEADER))
    print(f"{len(entries)} lines in {lockfile.LOCK.relative_to(lockfile.FOLDER.parent)}")


if __name__ == "__main__":
    main()
