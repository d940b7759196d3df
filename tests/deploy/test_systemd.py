"""The systemd units: systemd accepts them, and they leave a drain the time that it may take."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).parents[2] / "deploy" / "systemd").glob("*.service"))


def _values(unit: Path, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit.read_text(), re.MULTILINE)


def test_there_are_units() -> None:
    assert [unit.name for unit in UNITS] == ["isthmus-cloud.service", "isthmus-edge-train@.service"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    # systemd-analyze looks for the program, which is not installed where the unit expects it.
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("ExecStart=/opt/isthmus/bin/isthmus ", "ExecStart=/bin/sh "))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if unit.stem in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_core_file_is_never_written(unit: Path) -> None:
    assert _values(unit, "LimitCORE") == ["0"]


def test_a_drain_has_time_to_end() -> None:
    (cloud, _) = UNITS
    (grace,) = re.findall(r"--grace (\d+)", _values(cloud, "ExecStart")[0])
    (timeout,) = _values(cloud, "TimeoutStopSec")
    assert int(timeout) > int(grace)
