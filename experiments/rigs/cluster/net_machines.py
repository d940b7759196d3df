"""Machines that share nothing but a network: each has namespaces for network, processes and mounts of its own.

A switch (a bridge in a namespace of its own) connects them. A link is cut at the switch, so that the machine notices
nothing: packets are lost, and no error comes. Killing a machine's first process is a power cut: the kernel ends all
others with it. Namespaces of networks have no names, and are gone with this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from isthmus.common.errors import ConfigError, IsthmusError
from isthmus.experiments.network.net_space import missing, new_namespace, run, within

NETWORK = "10.78.0"
HERE = Path("/mnt")
"""A machine's own folder, as it is called there: a short path, which sockets need."""
_DISABLED, _FORWARDING = "0", "3"  # states of a bridge's port (bridge(8))
DATAGRAM_SECONDS = 1.0
"""For a datagram to cross the switch, which takes microseconds; longer, it counts as lost."""


class Machine:
    """One machine. Made by `Machines.add`.

    Attributes:
        name: its name.
        address: its IP address.
        folder: its own disk: what no other machine sees.
    """

    def __init__(self, name: str, address: str, folder: Path, namespace: int, port: str) -> None:
        self.name, self.address, self.folder = name, address, folder
        self.namespace, self.port = namespace, port
        self._first: subprocess.Popen[bytes] | None = None
        self._programs: list[subprocess.Popen[bytes]] = []

    @property
    def is_on(self) -> bool:
        """Whether it runs."""
        return self._first is not None and self._first.poll() is None

    @property
    def first_pid(self) -> int:
        """The id of its first process, as this process sees it. Raises IsthmusError where it is off."""
        if self._first is None or not self.is_on:
            raise IsthmusError(f"the machine {self.name} is off")
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()
        return int(children[0])

    def switch_on(self, hidden: Sequence[Path]) -> None:
        """Start its first process, which does nothing, with folders hidden from all that runs there."""
        mounts = ["--make-rprivate /", f"--bind {self.folder} {HERE}"]
        mounts += [f"-t tmpfs tmpfs {each}" for each in ("/dev/shm", *hidden)]  # noqa: S108
        script = " && ".join([*(f"mount {each}" for each in mounts), "echo on", "exec sleep infinity"])
        options = ("--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
        with within(self.namespace):
            self._first = subprocess.Popen(
                ["unshare", *options, "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        if self._first.stdout is None or not self._first.stdout.readline():
            raise ConfigError(f"the machine {self.name} cannot be made: the kernel refuses its namespaces")

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        stdout: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program there; its output is added to a file."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                ["nsenter", f"--target={self.first_pid}", "--mount", "--pid", "--net", *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file if stdout is None else stdout,
                stderr=file,
                start_new_session=True,
            )
        self._programs.append(process)
        return process

    @staticmethod
    def signal(process: subprocess.Popen[bytes], number: int) -> None:
        """Send a signal to a program that `start` has started; none where it has ended."""
        # The process that was started is nsenter's, which waits for the one inside.
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), number)

    def cut_power(self) -> None:
        """Kill its first process, and so all others."""
        first, self._first = self._first, None
        if first is not None and first.poll() is None:
            with contextlib.suppress(ProcessLookupError, IndexError, OSError):
                children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
                os.kill(int(children[0]), signal.SIGKILL)
        for process in (first, *self._programs):  # which are gone with it
            if process is not None:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()
        self._programs.clear()


class Machines:
    """A switch, and machines on it. A context manager, which ends all of them.

    Args:
        root: a folder; each machine has one in it, which the others do not see.

    Raises:
        ConfigError: on entering, where this machine cannot make namespaces; the message says why.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.all: dict[str, Machine] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Machines:
        reason = missing()
        if reason is not None:
            raise ConfigError(f"cannot make machines: {reason}")
        self._switch = new_namespace()
        self._stack.callback(os.close, self._switch)
        with within(self._switch):
            run("ip", "link", "add", "switch", "type", "bridge")
            run("ip", "link", "set", "switch", "type", "bridge", "mcast_snooping", "0")
            run("ip", "link", "set", "switch", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.all.values():
            machine.cut_power()
        self._stack.close()

    def add(self, name: str) -> Machine:
        """A machine on the switch, which is off."""
        number = len(self.all) + 1
        namespace, port, address = new_namespace(), f"port{number}", f"{NETWORK}.{number}"
        self._stack.callback(os.close, namespace)
        there = f"/proc/{os.getpid()}/fd/{namespace}"
        with within(self._switch):
            run("ip", "link", "add", port, "type", "veth", "peer", "name", "wire", "netns", there)
            run("ip", "link", "set", port, "master", "switch", "up")
        with within(namespace):
            run("ip", "link", "set", "lo", "up")
            run("ip", "link", "set", "wire", "addrgenmode", "none")
            run("ip", "address", "add", f"{address}/24", "dev", "wire")
            run("ip", "link", "set", "wire", "up")
            run("ip", "route", "add", "default", "via", f"{NETWORK}.254", "dev", "wire", "onlink")
        folder = self.root / name
        folder.mkdir(mode=0o700, parents=True)
        machine = self.all[name] = Machine(name, address, folder, namespace, port)
        return machine

    def switch_on(self, machine: Machine, hidden: Sequence[Path] = ()) -> None:
        """Start a machine; it sees no other machine's folder, and none of those that are hidden from it."""
        machine.switch_on([*(other.folder for other in self.all.values() if other is not machine), *hidden])

    @contextlib.contextmanager
    def link_cut(self, machine: Machine) -> Iterator[None]:
        """Lose all packets from and to a machine inside the context."""
        self._set_port(machine, _DISABLED)
        try:
            yield
        finally:
            self._set_port(machine, _FORWARDING)

    def delivered(self, sender: Machine, receiver: Machine, contents: Sequence[bytes]) -> int:
        """Send datagrams from a machine to another, as they are; returns how many arrive."""
        with contextlib.ExitStack() as stack:
            with within(receiver.namespace):
                there = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with within(sender.namespace):
                here = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            there.bind((receiver.address, 0))
            there.settimeout(DATAGRAM_SECONDS)
            for content in contents:
                here.sendto(content, there.getsockname())
            arrived = 0
            with contextlib.suppress(TimeoutError):
                while arrived < len(contents):
                    arrived += there.recv(1 << 16) in contents
            return arrived

    @contextlib.contextmanager
    def on_the_switch(self) -> Iterator[None]:
        """Move this thread to the switch, where all packets between machines pass."""
        with within(self._switch):
            yield

    def _set_port(self, machine: Machine, state: str) -> None:
        with within(self._switch):
            run("bridge", "link", "set", "dev", machine.port, "state", state)
