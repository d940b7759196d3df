"""A release: its bill of materials lists the lock, and its bytes are the commit's and the lock's alone."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support.lock_project import script

lockfile = script("lockfile")
release = script("release")
ENTRIES = lockfile.read(lockfile.LOCK.read_text())
PROJECT = {"name": "small", "version": "1.2", "license": "Apache-2.0"}
DIGEST = "a" * 64
FILES = {
    "pyproject.toml": '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    '[project]\nname = "small"\nversion = "1.2"\nlicense = "Apache-2.0"\n[tool.setuptools]\npackages = ["small"]\n',
    "small/__init__.py": "X = 1\n",
    "lock/requirements.txt": "".join(
        f"{name}=={metadata.version(name)} --hash=sha256:{DIGEST}\n" for name in release.TOOLS
    ),
}


def git(root: Path, *words: str) -> None:
    command = ("git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false", *words)
    subprocess.run(command, cwd=root, check=True, capture_output=True)


def checkout(root: Path, files: dict[str, str] = FILES) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "First")
    return root


def test_the_bill_lists_each_line_of_the_lock_with_its_hashes() -> None:
    bill = release.sbom(PROJECT, ENTRIES, "c" * 40, 0)
    listed = [
        (one["name"], one["version"], one["properties"][0]["value"], tuple(each["content"] for each in one["hashes"]))
        for one in bill["components"]
    ]
    assert listed == [(one.name, one.version, one.marker, one.digests) for one in ENTRIES]
    assert all(one["purl"] == f"pkg:pypi/{one['name']}@{one['version']}" for one in bill["components"])
    assert release.sbom(PROJECT, ENTRIES, "c" * 40, 0) == bill
    assert release.sbom(PROJECT, ENTRIES, "d" * 40, 0)["serialNumber"] != bill["serialNumber"]


def test_the_bill_is_one_of_cyclonedx() -> None:
    validation = pytest.importorskip("cyclonedx.validation.json", reason="pip-audit brings the format's own validator")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    bill = release.sbom(PROJECT, ENTRIES[:3], "c" * 40, 0)

    def fault(changes: dict[str, Any]) -> Any:
        return validator.validate_str(json.dumps({**bill, **changes}))

    assert fault({}) is None
    assert fault({"components": [{"name": "no type"}]}) is not None


def test_what_is_not_committed_and_other_tools_are_refused(tmp_path: Path) -> None:
    root, out = checkout(tmp_path / "tree"), tmp_path / "out"
    (root / "small" / "__init__.py").write_text("X = 2\n")
    with pytest.raises(release.ReleaseError, match="there are changes: commit them"):
        release.make_release(root, out)
    lock = FILES["lock/requirements.txt"].replace("setuptools==", "setuptools==0.")
    (root / "lock" / "requirements.txt").write_text(lock)
    git(root, "commit", "--quiet", "--all", "--message", "Second")
    with pytest.raises(release.ReleaseError, match=r"setuptools \S+ is installed, and the lock has 0\."):
        release.make_release(root, out)
    assert not out.exists()


@pytest.mark.long
def test_two_people_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout(tmp_path / "one")
    git(tmp_path, "clone", "--quiet", str(root), "two")
    (tmp_path / "two" / "small" / "untracked.py").write_text("")
    first = release.make_release(root, tmp_path / "first")
    before = os.umask(0o077)
    try:
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        os.utime(tmp_path / "two" / "small" / "__init__.py", (1, 1))
        assert release.make_release(tmp_path / "two", tmp_path / "second") == first
    finally:
        os.umask(before)
    names = [line.split("  ")[1] for line in first]
    assert names == ["small-1.2-py3-none-any.whl", "small-1.2.cdx.json", "small-1.2.tar.gz"]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "second", check=True)
    with zipfile.ZipFile(tmp_path / "first" / names[0]) as wheel:
        assert [name for name in wheel.namelist() if name.endswith(".py")] == ["small/__init__.py"]
    with tarfile.open(tmp_path / "first" / names[2]) as archive:
        assert sorted(archive.getnames()) == sorted(
            f"small-1.2{name}" for name in ("", "/lock", "/small", *(f"/{each}" for each in FILES))
        )
    (root / "small" / "__init__.py").write_text("X = 2\n")
    git(root, "commit", "--quiet", "--all", "--message", "Second")
    others = release.make_release(root, tmp_path / "third")
    assert not {line.split()[0] for line in others} & {line.split()[0] for line in first}
