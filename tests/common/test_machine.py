"""How many cores and how much memory there are to use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.common import machine
from isthmus.common.machine import cores_within, cpu_quota, threads_each, usable_cores, usable_memory

V2 = "31 23 0:28 {root} {mount} rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "32 31 0:29 {root} {mount} rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
OTHER = "33 31 0:31 / {mount}-memory rw,relatime - cgroup cgroup rw,memory\n40 1 8:1 / / rw - ext4 /dev/vda rw\n"


def proc(tmp_path: Path, memberships: str, mount: str, root: str = "/") -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "cgroup").write_text(memberships)
    top = tmp_path / "cgroup"
    (folder / "mountinfo").write_text(OTHER.format(mount=top) + mount.format(root=root, mount=top))
    return folder


def group(tmp_path: Path, path: str, **files: str) -> None:
    folder = tmp_path / "cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_a_quota_of_cgroup_v2_is_found_and_so_is_one_above(tmp_path: Path) -> None:
    folder = proc(tmp_path, "0::/user.slice/session\n", V2)
    group(tmp_path, "user.slice/session", cpu__max="max 100000")
    assert cpu_quota(folder) is None
    group(tmp_path, "user.slice", cpu__max="250000 100000")
    assert cpu_quota(folder) == 2.5
    group(tmp_path, "user.slice/session", cpu__max="150000 100000")
    assert cpu_quota(folder) == 1.5


def test_a_quota_of_cgroup_v1_is_found(tmp_path: Path) -> None:
    folder = proc(tmp_path, "4:memory:/elsewhere\n3:cpu,cpuacct:/docker/abc\n", V1)
    group(tmp_path, "docker/abc", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cpu_quota(folder) is None
    group(tmp_path, "docker/abc", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert cpu_quota(folder) == 3
    group(tmp_path, "", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    assert cpu_quota(folder) == 2


@pytest.mark.parametrize(("memberships", "root"), [("0::/\n", "/"), ("0::/docker/abc\n", "/docker/abc")])
def test_a_container_sees_its_own_group_at_the_top_of_the_mount(tmp_path: Path, memberships: str, root: str) -> None:
    folder = proc(tmp_path, memberships, V2, root)
    group(tmp_path, "", cpu__max="100000 50000")
    assert cpu_quota(folder) == 2


def test_without_cgroups_and_with_files_of_another_form_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none") is None
    (tmp_path / "empty").mkdir()
    for name in ("cgroup", "mountinfo"):
        (tmp_path / "empty" / name).touch()
    assert cpu_quota(tmp_path / "empty") is None
    folder = proc(tmp_path, "0::/a\n", V2)
    for text in ("", "max", "many 100000", "100000 0", "-5 100000"):
        group(tmp_path, "a", cpu__max=text)
        assert cpu_quota(folder) is None


def test_a_mount_with_a_name_that_is_no_utf8_hides_no_quota(tmp_path: Path) -> None:
    folder = proc(tmp_path, "0::/a\n", V2)
    group(tmp_path, "a", cpu__max="200000 100000")
    # A name in Latin-1, one with a no-break space, and one with a line separator of Unicode.
    strange = b"41 1 8:2 / /media/M\xfcller rw - ext4 /dev/vdb rw\n" + (
        "42 1 8:3 / /media/a\u00a0b rw - ext4 /dev/vdc rw\n43 1 8:4 / /media/a\u2028b rw - ext4 /dev/vdd rw\n".encode()
    )
    (folder / "mountinfo").write_bytes(strange + (folder / "mountinfo").read_bytes())
    assert cpu_quota(folder) == 2


def test_without_an_affinity_the_machines_cores_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.setattr(machine, "cpu_quota", lambda _proc: None)
    monkeypatch.delattr(os, "sched_getaffinity")
    for counted, usable in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda counted=counted: counted)
        assert usable_cores() == usable


def test_the_lesser_of_affinity_and_quota_counts_and_there_is_always_one() -> None:
    counted = [cores_within(*pair) for pair in ((8, None), (8, 2.0), (8, 3.9), (2, 16.0), (8, 0.25))]
    assert counted == [8, 2, 3, 2, 1]
    assert [threads_each(*pair) for pair in ((8, 1), (8, 4), (8, 3), (2, 4))] == [8, 2, 2, 1]


def test_cores_that_this_process_may_not_use_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda _proc: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores() == len(os.sched_getaffinity(0))
    code = (
        "import os; from isthmus.common.machine import usable_cores; "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(usable_cores())"
    )
    pinned = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert pinned.stdout.strip() == b"1"


def test_the_least_memory_limit_of_the_groups_counts_and_so_does_one_above(tmp_path: Path) -> None:
    for memberships, mount, name in (
        ("0::/a/b\n", V2, "memory.max"),
        ("7:memory:/a/b\n0::/\n", V1.replace("cpu,cpuacct", "memory"), "memory.limit_in_bytes"),
    ):
        top = tmp_path / name
        top.mkdir()
        folder = proc(top, memberships, mount)
        everything = usable_memory(folder)
        group(top, "a/b", **{name.replace(".", "__"): "max"})
        assert usable_memory(folder) == everything
        group(top, "a", **{name.replace(".", "__"): "1048576"})
        assert usable_memory(folder) == 1 << 20 < everything
