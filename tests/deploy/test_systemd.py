"""The systemd units: systemd accepts them, and they leave a drain the time that it may take."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from isthmus.cli import daemon_commands
from isthmus.common.errors import ConfigError, HomeInUseError, KeyFileError, OwnershipError, StateError
from isthmus.daemon import daemon_server
from isthmus.daemon.jobs import job_runner, job_worker

UNITS = sorted((Path(__file__).parents[2] / "deploy" / "systemd").glob("*.service"))
USERS = [unit for unit in UNITS if "daemon" in unit.name]
"""Units of a user's own systemd; the others are the system's."""
SYSTEMS = [unit for unit in UNITS if unit not in USERS]


def _values(unit: Path, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit.read_text(), re.MULTILINE)


def test_there_are_units() -> None:
    assert [unit.name for unit in UNITS] == [
        "isthmus-cloud.service",
        "isthmus-edge-daemon.service",
        "isthmus-edge-train@.service",
    ]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    # systemd-analyze looks for the program, which is not installed where the unit expects it.
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("ExecStart=/opt/isthmus/bin/isthmus ", "ExecStart=/bin/sh "))
    manager = "--user" if unit in USERS else "--system"
    command = ["systemd-analyze", manager, "verify", "--man=no", "--recursive-errors=no", str(copy)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    complaints = [line for line in done.stderr.splitlines() if unit.stem in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_core_file_is_never_written(unit: Path) -> None:
    assert _values(unit, "LimitCORE") == ["0"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_unit_can_be_enabled(unit: Path) -> None:
    assert _values(unit, "WantedBy") == ["default.target" if unit in USERS else "multi-user.target"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_gpu_is_not_closed(unit: Path) -> None:
    """systemd before 253 closes with ProtectClock= all devices that DeviceAllow= does not name."""
    assert _values(unit, "PrivateDevices") == []
    assert _values(unit, "ProtectClock") == [] or _values(unit, "DeviceAllow") != []


@pytest.mark.parametrize("unit", SYSTEMS, ids=lambda unit: unit.stem)
def test_caches_are_where_the_unit_may_write(unit: Path) -> None:
    (state,) = _values(unit, "StateDirectory")
    folders = re.findall(r"(\w+)=(\S+)", " ".join(line for line in _values(unit, "Environment") if "%S" in line))
    assert {"ISTHMUS_CACHE", "HF_HOME"} <= dict(folders).keys()
    assert ("TRITON_CACHE_DIR" in dict(folders)) == ("cloud" in unit.name)  # kernels run in the cloud alone
    assert all(folder.startswith(f"%S/{state}/") for _, folder in folders)


def test_the_readme_makes_the_user_and_the_state_folder_before_the_keys() -> None:
    text = (UNITS[0].parents[1] / "README.md").read_text()
    (user,), (state,) = (
        {*_values(SYSTEMS[0], name), *_values(SYSTEMS[1], name)} for name in ("User", "StateDirectory")
    )
    made = [
        text.index(f"useradd --system --user-group --home-dir /var/lib/{state} --shell /usr/sbin/nologin {user}\n"),
        text.index(f"install -d -o {user} -g {user} -m 0700 /var/lib/{state}\n"),
        text.index(f"runuser -u {user} -- /opt/isthmus/bin/isthmus cloud keygen"),
    ]
    assert made == sorted(made)
    section = text[: text.index("## Containers")]
    assert re.findall(r"^isthmus ", section, re.MULTILINE) == []  # it is not on the PATH
    assert "systemctl enable --now isthmus-edge-train@NAME" in section
    assert "systemctl disable isthmus-edge-train@NAME" in section


def test_a_drain_has_time_to_end() -> None:
    (cloud, _) = SYSTEMS
    (grace,) = re.findall(r"--grace (\d+)", _values(cloud, "ExecStart")[0])
    (timeout,) = _values(cloud, "TimeoutStopSec")
    assert int(timeout) > int(grace)


def test_who_stops_a_daemon_waits_for_its_jobs_to_save() -> None:
    """Each waits for longer than the next one: systemd and `stop`, the daemon, the processes of jobs."""
    (unit,) = USERS
    (timeout,) = _values(unit, "TimeoutStopSec")
    patience = inspect.signature(daemon_commands.stop).parameters["patience"].default
    daemon = daemon_server.GRACE_SECONDS + job_runner.STOP_SECONDS
    assert min(int(timeout), patience) > daemon
    assert job_runner.STOP_SECONDS > job_worker.STOP_SECONDS


@pytest.mark.parametrize("unit", USERS, ids=lambda unit: unit.stem)
def test_a_users_unit_has_nothing_that_needs_the_systems_manager(unit: Path) -> None:
    text = unit.read_text()
    assert (
        re.findall(r"^(User|Group|ProtectSystem|ProtectHome|PrivateTmp|CapabilityBoundingSet)=", text, re.MULTILINE)
        == []
    )
    assert _values(unit, "NoNewPrivileges") == ["yes"]
    assert _values(unit, "UMask") == ["0077"]


def test_a_daemon_is_not_started_again_where_that_cures_nothing() -> None:
    (unit,) = USERS
    (codes,) = _values(unit, "RestartPreventExitStatus")
    lasting = (ConfigError, KeyFileError, OwnershipError, HomeInUseError, StateError)
    assert {int(code) for code in codes.split()} == {2, *(error.exit_code for error in lasting)}
