"""Makes a release of the commit that is checked out (`make release`), the same bytes for everybody who makes it.

    dist/isthmus-VERSION.tar.gz               the commit's files
    dist/isthmus-VERSION-py3-none-any.whl     built from these, by the lock's build tools
    dist/isthmus-VERSION.cdx.json             what the lock names, as an SBOM of CycloneDX 1.6
    dist/SHA256SUMS                           their hashes

Times are the commit's, modes are fixed, members are sorted. What is left is zlib: another one may compress otherwise.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import uuid
import zlib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import lockfile
from lockfile import Entry

TOOLS = ("build", "packaging", "pyproject-hooks", "setuptools")
"""What builds the wheel, and may change its bytes."""


class ReleaseError(Exception):
    """No release can be made."""


def sbom(project: dict[str, Any], entries: Iterable[Entry], commit: str, seconds: int) -> dict[str, Any]:
    """A bill of materials: each line of the lock with its version, its hashes, and where it holds.

    Args:
        project: The table of pyproject.toml.
        entries: The lock's lines.
        commit: What is released.
        seconds: When it was committed, in Unix seconds.
    """
    own = f"pkg:pypi/{project['name']}@{project['version']}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{own}?commit={commit}')}",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)),
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": project["name"],
                "version": project["version"],
                "licenses": [{"license": {"id": project["license"]}}],
                "purl": own,
                "properties": [{"name": "isthmus:commit", "value": commit}],
            },
        },
        "components": [
            {
                "type": "library",
                "bom-ref": f"lock-{number}",
                "name": entry.name,
                "version": entry.version,
                "hashes": [{"alg": "SHA-256", "content": digest} for digest in entry.digests],
                "purl": f"pkg:pypi/{entry.name}@{entry.version}",
                "properties": [{"name": "isthmus:marker", "value": entry.marker}],
            }
            for number, entry in enumerate(entries, 1)
        ],
    }


def make_release(root: Path, out: Path) -> list[str]:
    """Make a release of the commit at `root` in `out`, which is emptied; returns the lines of SHA256SUMS.

    Raises:
        ReleaseError: Something is not committed, or a build tool is not the lock's.
    """
    if _git(root, "status", "--porcelain", "--untracked-files=no"):
        raise ReleaseError("a release is made of a commit, and there are changes: commit them, or put them aside")
    commit, seconds = _git(root, "log", "-1", "--format=%H %ct").decode().split()
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    entries = lockfile.read((root / "lock" / lockfile.LOCK.name).read_text())
    _check_tools(entries)
    name = f"{project['name']}-{project['version']}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    packed = _git(root, "-c", "tar.umask=0022", "archive", "--format=tar", f"--prefix={name}/", commit)
    with (
        (out / f"{name}.tar.gz").open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=int(seconds)) as compressed,
    ):
        compressed.write(packed)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        _build(Path(folder, name), out, seconds)
    bill = sbom(project, entries, commit, int(seconds))
    (out / f"{name}.cdx.json").write_text(json.dumps(bill, indent=1, ensure_ascii=False) + "\n")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in sorted(out.iterdir())]
    (out / "SHA256SUMS").write_text("".join(f"{line}\n" for line in lines))
    return lines


def _git(root: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    if done.returncode:
        raise ReleaseError(f"git {arguments[-1]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _check_tools(entries: Iterable[Entry]) -> None:
    locked = {entry.name: entry.version for entry in entries}
    for name in TOOLS:
        if (here := metadata.version(name)) != locked.get(name):
            raise ReleaseError(f"{name} {here} is installed, and the lock has {locked.get(name)}: make setup LOCKED=1")


def _build(tree: Path, out: Path, seconds: str) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": seconds}
    done = subprocess.run(command, env=environment, umask=0o022, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"the wheel cannot be built:\n{done.stdout}{done.stderr}")


def main() -> int:
    """Make it in dist/; returns the exit code."""
    root = lockfile.FOLDER.parent
    try:
        lines = make_release(root, root / "dist")
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    print(f"in dist/, with Python {sys.version.split()[0]} and zlib {zlib.ZLIB_RUNTIME_VERSION}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
