"""The lock meets the ranges of pyproject.toml wherever it holds, names files by hashes, and is what is installed."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from support.lock_project import ROOT, Proof, script

lockfile = script("lockfile")
audit = script("audit")
LOCK = lockfile.read(lockfile.LOCK.read_text())
BUILDS = lockfile.cpu_builds(lockfile.TORCH_CPU.read_text())
PLACES = list(itertools.product(("3.11", "3.12", "3.13"), ("x86_64", "aarch64")))
DIGEST = "a" * 64


def _environment(python: str, machine: str) -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def _named() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    return [one for one in map(Requirement, texts) if one.name != project["name"]]


def _unmet(entries: list[Any], python: str, machine: str) -> list[str]:
    """What pyproject.toml names, and the lock does not have there exactly once, in a version that is allowed."""
    here = _environment(python, machine)
    versions: dict[str, list[str]] = {}
    for entry in entries:
        if not entry.marker or Marker(entry.marker).evaluate(here):
            versions.setdefault(entry.name, []).append(entry.version)
    return [
        str(one)
        for one in _named()
        if one.marker is None or one.marker.evaluate(here)
        if len(found := versions.get(canonicalize_name(one.name), [])) != 1 or found[0] not in one.specifier
    ]


@pytest.mark.parametrize(("python", "machine"), PLACES)
def test_the_lock_meets_the_ranges(python: str, machine: str) -> None:
    assert _unmet(LOCK, python, machine) == []


def test_a_lock_that_meets_no_range_is_noticed() -> None:
    without = [entry for entry in LOCK if entry.name != "torch"]
    assert len(_unmet(without, "3.12", "x86_64")) == 1
    old = [*without, lockfile.Entry("torch", "2.1.0", "", (DIGEST,))]
    assert len(_unmet(old, "3.12", "x86_64")) == 1
    twice = [*LOCK, lockfile.Entry("torch", "2.13.0", "", (DIGEST,))]
    assert len(_unmet(twice, "3.12", "x86_64")) == 1


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://index.example/simple",
        "--extra-index-url https://index.example/simple",
        f"torch @ https://index.example/torch.whl --hash=sha256:{DIGEST}",
        "torch==2.13.0",
        f"torch>=2.13.0 --hash=sha256:{DIGEST}",
        f"torch==2.13.0 --hash=md5:{DIGEST[:32]}",
    ],
)
def test_a_lock_names_files_by_hashes_alone(line: str) -> None:
    with pytest.raises(ValueError, match="versions with hashes alone"):
        lockfile.read(f"six==1.17.0 --hash=sha256:{DIGEST}\n{line}\n")


def test_what_is_written_is_read() -> None:
    assert lockfile.read(lockfile.write(LOCK, "A header\nof two lines.")) == LOCK
    assert not any("--hash" in entry.requirement for entry in LOCK)


def test_both_builds_of_torch_are_in_the_lock() -> None:
    """torch's CPU builds are on another index than the rest, so uv does not see their hashes."""
    (torch,) = (entry for entry in LOCK if entry.name == "torch")
    assert set(BUILDS.values()) < set(torch.digests)
    of = [parse_wheel_filename(name) for name in BUILDS]
    assert {str(version) for _, version, _, _ in of} == {f"{torch.version}+cpu"}
    tags = {tag for _, _, _, tags in of for tag in tags}
    for python, machine in PLACES:
        assert any(tag.interpreter == f"cp{python.replace('.', '')}" and tag.platform.endswith(machine) for tag in tags)


def test_a_cpu_build_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="bring them together"):
        lockfile.with_cpu_builds(LOCK, {"torch-2.9.0+cpu-cp311-cp311-linux_x86_64.whl": DIGEST})
    with pytest.raises(ValueError, match="sha256sum"):
        lockfile.cpu_builds("abc torch.whl\n")


# Installing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def proof(tmp_path: Path) -> Proof:
    return Proof(tmp_path)


def test_the_locks_versions_are_taken_and_not_newer_ones(proof: Proof) -> None:
    proof.lock(torch=[proof.wheel("torch", "2.0")], plain=[proof.wheel("plain", "1.0")])
    proof.wheel("plain", "1.1")
    done = proof.install()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert proof.installed() == {"lockproof": "1", "torch": "2.0", "plain": "1.0"}


def test_where_a_version_is_lacking_the_ranges_hold_and_a_line_says_so(proof: Proof) -> None:
    gone = proof.wheel("plain", "1.0")
    proof.lock(torch=[proof.wheel("torch", "2.0")], plain=[gone])
    gone.unlink()
    proof.wheel("plain", "1.1")
    done = proof.install()
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert "installing by pyproject.toml's ranges" in done.stdout
    assert proof.installed()["plain"] == "1.1"


@pytest.mark.parametrize("build", ["2.0+cpu", "2.0"])
def test_by_hashes_each_build_of_torch_brings_what_it_needs_and_no_more(proof: Proof, build: str) -> None:
    gpu = proof.wheel("torch", "2.0", ["cudalibs"])
    cpu = proof.wheel("torch", "2.0+cpu")
    unused = proof.wheel("unused", "1.0")
    proof.lock(
        torch=[gpu, cpu],
        plain=[proof.wheel("plain", "1.0")],
        cudalibs=[proof.wheel("cudalibs", "3.0")],
        unused=[unused],
    )
    if build == "2.0":
        cpu.unlink()
    done = proof.install("--hashes", "required")
    assert done.returncode == 0, done.stderr
    more = {"cudalibs": "3.0"} if build == "2.0" else {}
    assert proof.installed() == {"lockproof": "1", "torch": build, "plain": "1.0", **more}


@pytest.mark.parametrize(("name", "mode"), [("torch", "required"), ("plain", "where-had")])
def test_a_file_with_another_hash_is_not_installed(proof: Proof, name: str, mode: str) -> None:
    files = {"torch": proof.wheel("torch", "2.0"), "plain": proof.wheel("plain", "1.0")}
    proof.lock(**{one: [path] for one, path in files.items()})
    proof.wheel(name, "2.0" if name == "torch" else "1.0", content="changed")
    done = proof.install("--hashes", mode)
    assert done.returncode == 3
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the lock does not name the hash of the file above.")
    assert files[name].name in done.stderr
    assert name not in proof.installed()


@pytest.mark.long
def test_by_hashes_a_lacking_version_is_an_error_or_a_line(proof: Proof) -> None:
    gone = proof.wheel("plain", "1.0")
    proof.lock(torch=[proof.wheel("torch", "2.0")], plain=[gone])
    gone.unlink()
    proof.wheel("plain", "1.1")
    done = proof.install("--hashes", "required")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        4,
        "error: the index lacks a version, named above, that is in the lock",
    )
    assert "plain" not in proof.installed()
    done = proof.install("--hashes", "where-had")
    assert done.returncode == 0, done.stderr
    assert "the index lacks a version, named above, that is in the lock: installing without hashes" in done.stdout
    assert proof.installed()["plain"] == "1.1"


def test_what_the_lock_lacks_is_not_installed(proof: Proof) -> None:
    proof.wheel("hidden", "1.0")
    proof.lock(torch=[proof.wheel("torch", "2.0", ["hidden"])], plain=[proof.wheel("plain", "1.0")])
    done = proof.install("--hashes", "required")
    assert (done.returncode, "the lock has no hidden for Python" in done.stderr) == (3, True)
    assert "hidden" not in proof.installed()


@pytest.mark.long
def test_the_index_of_torch_is_torchs_alone(proof: Proof, tmp_path: Path) -> None:
    """What the other index has of other names is not taken, however new it is."""
    other = tmp_path / "index"
    for path in (proof.wheel("torch", "2.0+cpu"), proof.wheel("plain", "9.0")):
        folder = other / path.name.split("-")[0]
        folder.mkdir(parents=True)
        path.rename(folder / path.name)
        (folder / "index.html").write_text(f'<a href="{path.name}">{path.name}</a>')
    proof.lock(
        torch=[proof.wheel("torch", "2.0"), other / "torch" / "torch-2.0+cpu-py3-none-any.whl"],
        plain=[proof.wheel("plain", "1.0")],
    )
    for hashes in ((), ("--hashes", "required")):
        done = proof.install(*hashes, "--torch-index", other.as_uri(), "--", "--no-cache-dir")
        assert done.returncode == 0, done.stderr
        assert proof.installed() == {"lockproof": "1", "torch": "2.0+cpu", "plain": "1.0"}


# Known vulnerabilities ------------------------------------------------------------------------------------------------


def test_an_audit_tells_what_it_could_not_look_up() -> None:
    sound = {"name": "six", "version": "1.17.0", "vulns": []}
    weak = {"name": "torch", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}
    unknown = {"name": "ray", "skip_reason": "not found"}
    assert audit.report([sound]) == (["1 packages looked up, 0 known vulnerabilities"], 0)
    lines, code = audit.report([sound, weak, unknown])
    assert (lines[0], code) == ("torch 2.0: PYSEC-1, mended in 2.1", 1)
    lines, code = audit.report([sound, unknown])
    assert (lines[0].startswith("error: 1 of 2 packages could not be looked up"), code) == (True, 3)
    assert audit.report([])[1] == 3
