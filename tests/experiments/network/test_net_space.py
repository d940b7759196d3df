"""Namespaces: what goes in comes out unharmed, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from isthmus.common.errors import ConfigError, IsthmusError
from isthmus.experiments.network import net_space
from isthmus.experiments.network.delay_relay import Conditions
from isthmus.experiments.network.net_space import ADDRESSES, DEVICE, NetSpace, missing
from isthmus.planner.link_spec import parse_rate, parse_seconds

RATE = 100_000_000
HERE = "/proc/thread-self/ns/net"

namespaces = pytest.mark.skipif(missing() is not None, reason=f"network namespaces: {missing()}")


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100mbit", RATE), ("2.5gbit", 2_500_000_000), ("64kbit", 64_000), ("8bit", 8)],
)
def test_rates_are_read_as_tc_writes_them(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("text", "seconds"), [("50ms", 0.05), ("1.5s", 1.5), ("800us", 0.0008), ("0ms", 0.0)],
)  # fmt: skip
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "100", "100 mbit", "100Mbit", "-1mbit", "0mbit", "7bit", "100mbps", "1e3bit"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a rate.*100mbit for example"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["", "50", "50 ms", "-1ms", "1m", "infs", "nans"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a length of time.*50ms for example"):
        parse_seconds(text)


def test_a_machine_without_the_means_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {"ip": "/sbin/ip", "tc": "/sbin/tc"}
    monkeypatch.setattr(shutil, "which", found.get)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(net_space, "TUN", tmp_path / "tun")
    with pytest.raises(ConfigError, match=r"cannot make network namespaces: there is no .*tun: load"), _space():
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert missing() == "network namespaces need root: run as root"
    del found["tc"]
    assert missing() == "the command tc is not here: install iproute2"
    monkeypatch.setattr(net_space.sys, "platform", "darwin")
    assert missing() == "network namespaces need Linux, and this is darwin"


def test_a_kernel_that_refuses_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse() -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(net_space, "TUN", tmp_path)
    monkeypatch.setattr(net_space, "new_namespace", refuse)
    assert missing() == "the kernel refuses a network namespace (Operation not permitted): run with CAP_SYS_ADMIN"


@namespaces
@pytest.mark.parametrize(
    "conditions",
    [Conditions(0.002), Conditions(0.004, loss=0.02, duplicate=0.05, reorder=0.05, seed=1)],
    ids=["good", "bad"],
)
def test_bytes_pass_unharmed_both_ways(conditions: Conditions) -> None:
    data = {side: os.urandom(1 << 20) for side in ADDRESSES}
    with NetSpace(RATE, conditions) as space, space.connection() as (edge, cloud):
        assert cloud.getpeername()[0] == ADDRESSES["edge"]
        threads = [
            threading.Thread(target=end.sendall, args=(data[side],)) for end, side in ((edge, "edge"), (cloud, "cloud"))
        ]
        for thread in threads:
            thread.start()
        assert _read(cloud, 1 << 20) == data["edge"]
        assert _read(edge, 1 << 20) == data["cloud"]
        for thread in threads:
            thread.join()


@namespaces
def test_the_way_can_be_changed_while_it_is_used() -> None:
    with NetSpace(None, Conditions()) as space, space.connection() as (edge, cloud):
        edge.sendall(b"before")
        assert _read(cloud, 6) == b"before"
        space.change(Conditions(silence_s=0.3))
        edge.sendall(b"during")  # TCP sends it again until it has passed
        assert _read(cloud, 6) == b"during"
        space.change(Conditions(0.002, loss=1.0))
        cloud.settimeout(0.3)
        edge.sendall(b"lost")
        with pytest.raises(TimeoutError):
            cloud.recv(1)
        space.change(Conditions(0.002))
        cloud.settimeout(20)
        assert _read(cloud, 4) == b"lost"


@namespaces
def test_a_way_that_is_gone_cannot_be_changed() -> None:
    space = _space()
    with pytest.raises(IsthmusError, match="there is no relay yet"):
        space.change(Conditions())

    def lose_the_relay() -> None:
        with space:
            (relay,) = _relays()
            os.kill(relay, signal.SIGKILL)
            with pytest.raises(IsthmusError, match="has ended"):
                space.change(Conditions())

    with pytest.raises(IsthmusError, match="exit code -9"):
        lose_the_relay()


@namespaces
def test_each_side_has_its_device_and_its_limit_and_nothing_else() -> None:
    own = Path(HERE).readlink()
    with _space() as space:
        seen = set()
        for side, address in ADDRESSES.items():
            with space.inside(side):
                seen.add(Path(HERE).readlink())
                links = _json("ip", "-json", "address")
                (limit,) = _json("tc", "-json", "qdisc", "show", "dev", DEVICE)
            assert [link["ifname"] for link in links] == ["lo", DEVICE]
            assert [entry["local"] for entry in links[1]["addr_info"]] == [address]
            assert (limit["kind"], limit["options"]["rate"] * 8) == ("tbf", RATE)
            assert Path(HERE).readlink() == own
        assert len(seen | {own}) == 3
        with space.inside("edge"), pytest.raises(ConnectionRefusedError):
            socket.create_connection((ADDRESSES["cloud"], 9), 20)


@namespaces
def test_no_limit_is_no_limit() -> None:
    with NetSpace(None, Conditions()) as space, space.inside("edge"):
        assert all(entry["kind"] != "tbf" for entry in _json("tc", "-json", "qdisc", "show", "dev", DEVICE))


@namespaces
def test_a_process_and_a_nested_visit_belong_to_the_innermost_side() -> None:
    def addresses() -> str:
        return subprocess.run(["ip", "-brief", "address"], capture_output=True, text=True, check=True).stdout

    with _space() as space, space.inside("cloud"):
        with space.inside("edge"):
            assert f"{ADDRESSES['edge']} peer" in addresses()
        assert f"{ADDRESSES['cloud']} peer" in addresses()


@namespaces
def test_nothing_is_left_behind_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    own, descriptors = Path(HERE).readlink(), _descriptors()

    def be_interrupted() -> None:
        with _space() as space, space.inside("cloud"):
            assert len(_relays()) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert not _relays()
    assert (Path(HERE).readlink(), _descriptors()) == (own, descriptors)

    def fail(*command: str) -> None:
        if command[0] == "tc":
            raise ConfigError("no tc")

    monkeypatch.setattr(net_space, "run", fail)
    with pytest.raises(ConfigError, match="no tc"), _space():
        pass
    assert not _relays()
    assert (Path(HERE).readlink(), _descriptors()) == (own, descriptors)


@namespaces
def test_a_relay_that_ends_before_its_time_is_told_of_and_takes_the_way_with_it() -> None:
    def lose_the_relay() -> None:
        with _space() as space, space.inside("edge"):
            (relay,) = _relays()
            os.kill(relay, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while any(link["ifname"] == DEVICE for link in _json("ip", "-json", "link")):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(OSError, match="unreachable"):
                socket.create_connection((ADDRESSES["cloud"], 9), 20)

    with pytest.raises(IsthmusError, match=r"the relay .* ended with exit code -9"):
        lose_the_relay()


@namespaces
def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(ConfigError, match=r"`ip link show nothing-of-this-name` failed: .*does not exist"):
        net_space.run("ip", "link", "show", "nothing-of-this-name")


def _space() -> NetSpace:
    return NetSpace(RATE, Conditions(0.002))


def _json(*command: str) -> list[dict[str, object]]:
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _read(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = end.recv(count - len(data))
        assert chunk, "the other side has closed"
        data += chunk
    return data


def _descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def _relays() -> list[int]:
    """Processes of relays that this process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            status, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        parent = status.rpartition(")")[2].split()[1]
        if int(parent) == os.getpid() and b"delay_relay" in command:
            found.append(int(entry.name))
    return found
