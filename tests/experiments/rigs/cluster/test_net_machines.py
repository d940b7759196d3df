"""Machines on a switch, without Ray: what a cut link loses, which processes count, and what a capture misses."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from isthmus.common.errors import UnreachableError
from isthmus.experiments.network.net_space import missing
from isthmus.experiments.rigs.cluster.machine_processes import (
    cloud_processes,
    is_rays_own,
    outer_pid,
    processes_of,
)
from isthmus.experiments.rigs.cluster.net_machines import Machine, Machines
from isthmus.experiments.rigs.cluster.packets import Packets

RAY = Path(ray.__file__).parent
SENT = [bytes([number]) * 1000 for number in range(50)]
needs_namespaces = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with Machines(tmp_path / "m") as made:
        for name in ("one", "other"):
            made.switch_on(made.add(name))
        yield made


def both(machines: Machines) -> tuple[Machine, Machine]:
    return machines.all["one"], machines.all["other"]


@pytest.mark.root
@needs_namespaces
def test_a_link_that_is_cut_loses_all_packets_and_heals(machines: Machines) -> None:
    one, other = both(machines)
    assert machines.delivered(one, other, SENT) == len(SENT)
    with machines.link_cut(other):
        assert machines.delivered(one, other, SENT) == 0
        assert machines.delivered(other, one, SENT) == 0
    assert machines.delivered(one, other, SENT) == len(SENT)
    assert machines.delivered(other, one, SENT) == len(SENT)


@pytest.mark.root
@needs_namespaces
def test_a_program_on_a_machine_counts_until_it_ends(machines: Machines, tmp_path: Path) -> None:
    one, other = both(machines)
    assert cloud_processes(one) == []
    program = one.start(["sleep", "60"], os.environ, tmp_path / "said.txt")
    deadline = time.monotonic() + 10.0
    while not (found := cloud_processes(one)) or found[0].name() != "sleep":
        assert time.monotonic() < deadline
    assert [each.name() for each in found] == ["sleep"]
    assert cloud_processes(other) == []
    inside = int(Path(f"/proc/{found[0].pid}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1])
    assert outer_pid(one, inside) == found[0].pid
    with pytest.raises(UnreachableError, match="the machine other has no process"):
        outer_pid(other, inside)
    one.signal(program, signal.SIGTERM)
    program.wait(10)
    assert cloud_processes(one) == []


@pytest.mark.root
@needs_namespaces
def test_no_process_outlives_a_machine_without_power(machines: Machines, tmp_path: Path) -> None:
    one, _ = both(machines)
    program = one.start([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, tmp_path / "said.txt")
    inside = processes_of(one)
    one.cut_power()
    assert program.returncode is not None
    psutil.wait_procs(inside, 10)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in inside)


@pytest.mark.root
@needs_namespaces
def test_all_that_crosses_is_captured(machines: Machines, tmp_path: Path) -> None:
    one, other = both(machines)
    with Packets(machines, tmp_path / "packets.bin") as packets:
        machines.delivered(one, other, SENT)
    captured = list(packets.parts())
    assert packets.dropped == 0
    assert len(captured) == packets.count
    assert all(any(content in packet for packet in captured) for content in SENT)


@pytest.mark.root
@needs_namespaces
def test_packets_that_a_capture_misses_are_counted(machines: Machines, tmp_path: Path) -> None:
    one, other = both(machines)
    with Packets(machines, tmp_path / "packets.bin", waiting_bytes=1 << 14) as packets, packets.lock:
        assert machines.delivered(one, other, SENT) == len(SENT)  # while nobody reads
    assert packets.dropped > 0
    assert packets.count < 2 * len(SENT)


@pytest.mark.parametrize(
    ("command", "own"),
    [
        ([f"{RAY}/core/src/ray/raylet/raylet", "--raylet_socket_name=/mnt/r/x"], True),
        ([f"{RAY}/core/src/ray/gcs/gcs_server"], True),
        ([sys.executable, "-u", f"{RAY}/dashboard/agent.py"], True),
        ([sys.executable, f"{Path(sys.executable).parent}/ray", "start", "--block"], True),
        ([sys.executable, "-m", "ray.util.client.server", "--address=10.78.0.2:6379"], True),
        (["ray::IDLE", ""], True),
        (["ray::DashboardAgent", ""], True),
        ([], True),
        (["ray::NodeWorker"], False),
        ([sys.executable, f"{RAY}/_private/workers/default_worker.py", "--node-ip-address=10.78.0.3"], False),
        ([sys.executable, "-m", "isthmus.cli.main", "cloud", "serve"], False),
        (["sleep", "60"], False),
    ],
)
def test_rays_own_processes_are_not_the_clouds(command: list[str], own: bool) -> None:
    assert is_rays_own(command) is own
