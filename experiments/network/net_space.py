"""Two network namespaces with a way between them that is as narrow and as long as it is asked to be.

The edge's and the cloud's namespace have nothing but a loopback and one TUN device each. The rate is limited by the
kernel's token bucket (`tc … tbf`) where packets leave a namespace; behind it a relay in a process of its own
(`isthmus.experiments.network.delay_relay`) carries them over, and makes the delay and whatever else the way does
to them. It is also the default route, as programs find out their own address by it.

The namespaces have no names: they are held by descriptors, so that nothing is left behind however this process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from isthmus.common.errors import ConfigError, IsthmusError
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.network.delay_relay import Conditions

Side = Literal["edge", "cloud"]
ADDRESSES: Final[dict[Side, str]] = {"edge": "10.77.0.1", "cloud": "10.77.0.2"}  # nobody outside ever sees them

DEVICE = "wire"
MTU = 1500  # bytes of a packet
QUEUED_PACKETS = 10_000  # between the kernel and the relay: only the token bucket drops
BURST_SECONDS = 0.002  # bytes of so much time, and at least four packets, may leave at once
QUEUE_SECONDS = 0.05  # what waits for the token bucket, at least; a round trip where that is longer, as routers do

TUN = Path("/dev/net/tun")
OWN_NAMESPACE = "/proc/thread-self/ns/net"
CLONE_NEWNET = 0x40000000  # sched.h
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # if_tun.h
IFREQ = "16sH22x"

STOP_SECONDS = 5.0
CONNECT_SECONDS = 30.0


def missing() -> str | None:
    """What this machine lacks for a `NetSpace`, in words; None where nothing is missing."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, and this is {sys.platform}"
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            return f"the command {command} is not here: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root: run as root"
    if not TUN.exists():
        return f"there is no {TUN}: load the kernel's module tun"
    try:
        os.close(new_namespace())
    except OSError as error:
        return f"the kernel refuses a network namespace ({error.strerror}): run with CAP_SYS_ADMIN"
    return None


class NetSpace:
    """A context manager: an edge's and a cloud's namespace, and the way between them.

    Args:
        rate: bits per second in each direction, headers of IP and TCP included; None for no limit.
        conditions: delay, loss and the like, until `change` is called.

    Raises:
        ConfigError: on entering, where the machine cannot do it; the message says why.
        IsthmusError: on leaving, where the relay did not live and end as it should.
    """

    def __init__(self, rate: int | None, conditions: Conditions) -> None:
        self._rate = rate
        self._conditions = conditions
        self._namespaces: dict[Side, int] = {}
        self._relay: TaskProcess | None = None
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def inside(self, side: Side) -> Iterator[None]:
        """Move this thread into a namespace; see `within`."""
        with within(self._namespaces[side]):
            yield

    def change(self, conditions: Conditions) -> None:
        """Let the way treat packets otherwise from now on; returns when it does.

        Raises IsthmusError where the relay is gone.
        """
        if self._relay is None:
            raise IsthmusError("the way's conditions can be changed only inside `with`: there is no relay yet")
        self._relay.ask(dataclasses.asdict(conditions))

    @contextlib.contextmanager
    def connection(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """A TCP connection across the way: the edge's end, which has opened it, and the cloud's."""
        with self.inside("cloud"):
            listener = socket.create_server((ADDRESSES["cloud"], 0))
        with listener:
            listener.settimeout(CONNECT_SECONDS)
            with self.inside("edge"):
                edge = socket.create_connection(listener.getsockname(), CONNECT_SECONDS)
            with edge, listener.accept()[0] as cloud:
                for end in (edge, cloud):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    end.settimeout(CONNECT_SECONDS)
                yield edge, cloud

    def __enter__(self) -> NetSpace:
        reason = missing()
        if reason is not None:
            raise ConfigError(f"cannot make network namespaces: {reason}")
        # The relay alone keeps the devices: when it ends, the way is gone, and nobody waits for silence to pass.
        with contextlib.ExitStack() as stack, contextlib.ExitStack() as handed_over:
            devices = [self._make(side, stack, handed_over) for side in ADDRESSES]
            self._start_relay(devices, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make(self, side: Side, stack: contextlib.ExitStack, handed_over: contextlib.ExitStack) -> int:
        """Make a namespace with its TUN device; returns the device's descriptor."""
        self._namespaces[side] = new_namespace()
        stack.callback(os.close, self._namespaces[side])
        with self.inside(side):
            device = _open_tun()
            handed_over.callback(os.close, device)
            self._configure(side)
        return device

    def _configure(self, side: Side) -> None:
        (other,) = (address for name, address in ADDRESSES.items() if name != side)
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "set", DEVICE, "addrgenmode", "none")  # no IPv6, which would send packets of its own
        run("ip", "address", "add", ADDRESSES[side], "peer", other, "dev", DEVICE)
        run("ip", "link", "set", DEVICE, "mtu", str(MTU), "txqueuelen", str(QUEUED_PACKETS), "up")
        run("ip", "route", "add", "default", "via", other, "dev", DEVICE)
        if self._rate is not None:
            burst = max(4 * MTU, round(self._rate / 8 * BURST_SECONDS))
            queue = max(QUEUE_SECONDS, self._conditions.rtt_s)
            limits = ("rate", f"{self._rate}bit", "burst", str(burst), "latency", f"{queue * 1e3:.0f}ms")
            run("tc", "qdisc", "replace", "dev", DEVICE, "root", "tbf", *limits)

    def _start_relay(self, devices: list[int], stack: contextlib.ExitStack) -> None:
        task = {"ends": devices, "conditions": dataclasses.asdict(self._conditions)}
        module = "isthmus.experiments.network.delay_relay"
        self._relay = stack.enter_context(
            TaskProcess("the relay between the namespaces", module, task, shown=True, pass_fds=devices)
        )
        stack.callback(_stop_relay, self._relay)
        self._relay.answer()  # it is there


def _stop_relay(relay: TaskProcess) -> None:
    try:
        relay.finish(STOP_SECONDS)
    except IsthmusError as error:
        raise IsthmusError(f"{error}; what was measured meanwhile counts for nothing, run it again") from None


@contextlib.contextmanager
def within(namespace: int) -> Iterator[None]:
    """Move this thread into a namespace: sockets that it opens and processes that it starts belong to it for good.

    May be nested. Other threads, also those that gRPC has started already, stay where they are.
    """
    own = os.open(OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(namespace)
        yield
    finally:
        _enter(own)
        os.close(own)


def new_namespace() -> int:
    """A descriptor of a new network namespace. Raises OSError where the kernel refuses one."""
    own = os.open(OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _libc("unshare", CLONE_NEWNET)  # this thread alone
        return os.open(OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        _enter(own)
        os.close(own)


def _enter(namespace: int) -> None:
    _libc("setns", namespace, CLONE_NEWNET)


def _libc(function: str, *arguments: int) -> None:
    """Call the C library: Python has these two functions since 3.12. Raises OSError."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _open_tun() -> int:
    device = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack(IFREQ, DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    except OSError as error:
        os.close(device)
        raise ConfigError(
            f"cannot make a TUN device ({error.strerror}): run with CAP_NET_ADMIN on a kernel that has tun"
        ) from None
    return device


def run(*command: str) -> None:
    """Run a command. Raises ConfigError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"`{' '.join(command)}` failed: {done.stderr.strip() or 'it does not say why'}")
