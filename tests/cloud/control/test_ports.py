"""What a cloud listens on, and what its operator is told of it."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from isthmus.cloud.control.ports import Listener, Ports, PortWatch, _name, listeners
from isthmus.common.errors import ConfigError, PortInUseError

CHILD = """
import socket, time
sockets = [socket.create_server((host, 0), family=family)
           for host, family in (("0.0.0.0", socket.AF_INET), ("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6))]
print(*(each.getsockname()[1] for each in sockets), flush=True)
time.sleep(600)
"""


def test_ports_of_this_process_and_of_those_it_has_started_are_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as own, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout is not None
            everywhere, loopback, loopback6 = map(int, child.stdout.readline().split())
            found = {each.port: each for each in listeners()}
            assert bound.getsockname()[1] not in found
            assert found[own.getsockname()[1]].process == "serve"
            assert [found[port].pid for port in (everywhere, loopback, loopback6)] == [child.pid] * 3
            assert [found[port].private for port in (everywhere, loopback, loopback6)] == [False, True, True]
        finally:
            child.kill()
            child.wait()
            child.stdout.close()  # type: ignore[union-attr]  # a pipe


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),  # as gRPC binds the loopback
        ("0.0.0.0", False),  # noqa: S104  # compared only
        ("::", False),
        ("::ffff:0.0.0.0", False),
        ("192.0.2.2", False),
        ("::ffff:192.0.2.2", False),
        ("fe80::1%eth0", False),
    ],
)
def test_what_other_machines_can_reach(host: str, private: bool) -> None:
    listener = Listener("raylet", 7, host, 80)
    assert listener.private is private
    assert ("every interface" in str(listener)) is (host in {"0.0.0.0", "::", "::ffff:0.0.0.0"})  # noqa: S104


def test_the_operator_is_told_of_each_port_once_and_not_of_those_announced() -> None:
    said: list[str] = []
    listening = [
        Listener("ray::Worker", 5, "0.0.0.0", 7443),  # noqa: S104
        Listener("gcs_server", 3, "::ffff:127.0.0.1", 6380),
        Listener("serve", 1, "127.0.0.1", 6379),
        Listener("raylet", 4, "::", 40001),
    ]
    watch = PortWatch([7443, 9464], said.append, lambda: listening)
    watch.first_check()
    assert said == [
        "Ray listens for this machine alone, on ports of the loopback: serve 6379, gcs_server 6380",
        "other machines can reach raylet (process 4) on port 40001 of every interface: keep it behind a firewall",
    ]
    watch.check()
    assert len(said) == 2
    listening.append(Listener("ray::Worker", 9, "192.0.2.2", 40002))
    watch.check()
    watch.check()
    assert said[2:] == [
        "other machines can reach ray::Worker (process 9) on port 40002 of 192.0.2.2: keep it behind a firewall"
    ]


def test_a_process_of_python_is_named_by_its_script() -> None:
    assert _name("python3.11", ["/venv/bin/python3.11", "-u", "/lib/ray/autoscaler/monitor.py", "--x"]) == "monitor"
    assert _name("python", ["python", "-c", "pass"]) == "python"
    assert _name("ray::Worker", ["ray::Worker", "", ""]) == "ray::Worker"


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "127.0.0.1:65536", "127.0.0.1:9999999999999999999999", "h:²"])
def test_a_port_that_is_none_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="address to listen on"):
        Ports().take(listen)


def test_ports_are_kept_until_their_workers_listen() -> None:
    ports = Ports()
    try:
        first, second = ports.take_several("127.0.0.1:0", 2)
        assert first != second
        host, _, port = first.rpartition(":")
        with socket.socket() as worker:  # as gRPC binds it
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            worker.bind((host, int(port)))
            worker.listen()
            with pytest.raises(PortInUseError, match=first):
                Ports().take(first)
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind((host, int(port)))
    finally:
        ports.close()
    start = int(port)
    given = Ports()
    try:
        assert given.take(f"127.0.0.1:{start}") == f"127.0.0.1:{start}"
    finally:
        given.close()
