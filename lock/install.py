"""Installs the checkout into the environment of the Python that runs this, with the versions of the lock beside it.

    python lock/install.py [--hashes required|where-had] [--extras dev] [--no-editable] [--torch-index URL] [-- OPTIONS]

Without `--hashes` the lock's versions are pip's constraints; where pip cannot have them all, the ranges of
pyproject.toml hold, and a line says so.

With `--hashes` pip takes a file only if the lock has its hash. In that mode pip refuses an editable install, takes no
hashes from constraints, and would install everything that the lock names. So the checkout is installed without its
dependencies, and then, in rounds, what the installed packages require. torch's CPU build so brings no CUDA libraries.

OPTIONS are pip's.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import lockfile
from lockfile import Entry

ROOT = lockfile.FOLDER.parent
# What installs, builds the checkout and the few packages that are published as sources alone, and reads requirements.
FIRST = ("pip", "setuptools", "packaging")
EXIT_FAILED, EXIT_NOT_HAD = 3, 4


class InstallError(Exception):
    """The environment could not be made; pip has said why where it was pip."""

    exit_code = EXIT_FAILED


class NotHadError(InstallError):
    """The index lacks a version that the lock names."""

    exit_code = EXIT_NOT_HAD


class Pip:
    """pip, with the options that each call has."""

    def __init__(self, options: Sequence[str]) -> None:
        self._options = options

    def __call__(self, *arguments: str, verb: str = "install") -> None:
        """Run `pip install`, or what `verb` says.

        Raises:
            NotHadError: the index lacks a version.
            InstallError: anything else.
        """
        command = [sys.executable, "-m", "pip", verb, "--quiet", *self._options, *arguments]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            return
        sys.stderr.write(done.stderr)
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise InstallError(
                "the lock does not name the hash of the file above. Where it is another build of torch that you trust, "
                f"put the line that sha256sum prints of it into lock/{lockfile.TORCH_CPU.name}, and run make lock"
            )
        if "No matching distribution found" in done.stderr:
            raise NotHadError("the index lacks a version, named above, that is in the lock")
        raise InstallError("pip failed, for the reason above")

    def hashed(self, entries: Iterable[Entry], *arguments: str) -> None:
        """Install these entries, and nothing that they require."""
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("".join(f"{entry.hashed}\n" for entry in entries))
            file.flush()
            self("--require-hashes", "--no-deps", "--no-build-isolation", *arguments, "--requirement", file.name)
        importlib.invalidate_caches()


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def by_ranges(pip: Pip, target: Sequence[str], torch_index: str | None) -> None:
    """Install what the ranges of pyproject.toml allow."""
    pip("--upgrade", "pip")
    if torch_index:
        (torch,) = (text for text in _project()["dependencies"] if re.match(r"torch(?![\w.-])", text))
        pip("--no-deps", "--index-url", torch_index, torch)
    pip(*target)


def by_versions(pip: Pip, target: Sequence[str], torch_index: str | None, entries: Iterable[Entry]) -> None:
    """Install the lock's versions, or what the ranges allow where pip cannot have them all."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{entry.requirement}\n" for entry in entries))
        file.flush()
        constrained = ("--constraint", file.name)
        try:
            pip("--upgrade", "pip", *constrained)
            if torch_index:
                pip("--no-deps", "--index-url", torch_index, "torch", *constrained)
            pip(*target, *constrained)
        except InstallError:
            print("note: the lock's versions cannot all be had here (see above): installing by pyproject.toml's ranges")
            by_ranges(pip, target, torch_index)


def by_hashes(
    pip: Pip, target: Sequence[str], torch_index: str | None, entries: Iterable[Entry], extras: Sequence[str]
) -> None:
    """Install the lock's files, each checked against its hashes.

    Raises:
        NotHadError: the index lacks a version.
        InstallError: a hash differs, or the lock lacks a package.
    """
    lock = list(entries)
    pip.hashed(entry for entry in lock if entry.name in FIRST)
    here = _holding_here(lock)
    pip("--no-deps", "--no-build-isolation", *target)
    importlib.invalidate_caches()
    if "torch" not in here:
        raise _lacking("torch")
    _torch_by_hash(pip, here["torch"], torch_index)
    while missing := _missing(here, extras):
        pip.hashed(missing)
    command = [sys.executable, "-m", "pip", "check"]
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode != 0:
        raise InstallError("the lock's versions do not go together, as pip says above: run make lock")


def _torch_by_hash(pip: Pip, torch: Entry, torch_index: str | None) -> None:
    """Install the build of torch that pip takes without hashes: with them, it would pass over one in a plain folder."""
    with tempfile.TemporaryDirectory() as folder:
        only = ("--index-url", torch_index) if torch_index else ()
        pip(*only, "--no-deps", "--only-binary", ":all:", "--dest", folder, f"torch=={torch.version}", verb="download")
        pip.hashed([torch], "--no-index", "--find-links", folder)


def _holding_here(lock: Iterable[Entry]) -> dict[str, Entry]:
    try:
        from packaging.markers import Marker
    except ImportError:
        raise _lacking("packaging") from None
    return {entry.name: entry for entry in lock if not entry.marker or Marker(entry.marker).evaluate()}


def _lacking(name: str) -> InstallError:
    here = f"Python {platform.python_version()} on {platform.machine()}"
    return InstallError(f"the lock has no {name} for {here}: run make lock, or make setup without LOCKED")


def _missing(lock: dict[str, Entry], extras: Sequence[str]) -> list[Entry]:
    """What the installed packages require, from the project on, and is not installed in the lock's version."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    root = str(_project()["name"])
    waiting = [(root, extra) for extra in ("", *extras)]
    seen: set[tuple[str, str]] = set()
    missing: dict[str, Entry] = {}
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name != root:
            if name not in lock:
                raise _lacking(name)
            try:
                installed = Version(metadata.version(name)).public  # without +cpu
            except metadata.PackageNotFoundError:
                installed = ""
            if installed != lock[name].version:
                missing[name] = lock[name]
                continue
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(requirement.name), more) for more in ("", *requirement.extras)]
    return sorted(missing.values(), key=lambda entry: entry.name)


def main() -> int:
    """Install; returns the exit code: 3 where it failed, 4 where the index lacks a version."""
    parser = argparse.ArgumentParser(description="Install the checkout with the lock's versions.")
    parser.add_argument(
        "--hashes", choices=("required", "where-had"), help="check hashes, or fail where a version is lacking"
    )
    parser.add_argument("--extras", default="", help="the project's extras, with commas between them")
    parser.add_argument("--no-editable", action="store_true", help="install a copy of the checkout")
    parser.add_argument("--torch-index", metavar="URL", help="the index that torch, and torch alone, comes from")
    parser.add_argument("pip", nargs="*", help="options of pip's, behind --")
    given = parser.parse_args()
    extras = [extra for extra in given.extras.strip("[]").split(",") if extra]
    pip, editable = Pip(given.pip), () if given.no_editable else ("--editable",)
    target = (*editable, f".[{','.join(extras)}]" if extras else ".")
    entries = lockfile.read(lockfile.LOCK.read_text())
    torch_index = given.torch_index or None
    try:
        if given.hashes:
            try:
                by_hashes(pip, (*editable, "."), torch_index, entries, extras)
            except NotHadError as error:
                if given.hashes == "required":
                    raise
                print(f"note: {error}: installing without hashes")
            else:
                return 0
        by_versions(pip, target, torch_index, entries)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
