"""The ports that a cloud listens on: its own, and those of Ray."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.common.errors import ConfigError, PortInUseError

MAX_PORT = 65535


class Ports:
    """Reserves addresses to listen on: a restarted worker must come back on the same one.

    Between the choice of a port and its worker's start nobody listens on it, and Ray's own processes look for free
    ports just then. So the sockets that have found the ports stay bound, without listening, until `close`.
    """

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def take(self, listen: str, option: str = "--listen") -> str:
        """Reserve `host:port`; a port 0 becomes a free one. Returns the address.

        Raises:
            ConfigError: the address does not parse.
            PortInUseError: somebody listens there already.
        """
        host, port = parse_address(listen)
        bare = host.strip("[]")
        try:
            family = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0][0]
            with contextlib.ExitStack() as unless_taken:
                holder = unless_taken.enter_context(socket.socket(family, socket.SOCK_STREAM))
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                holder.bind((bare, port))
                unless_taken.pop_all()
            self._held.append(holder)
            return f"{host}:{holder.getsockname()[1]}"
        except socket.gaierror:
            raise ConfigError(f"the host of {listen!r} is unknown: check its spelling") from None
        except OSError as error:
            raise PortInUseError(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what uses it, or choose another {option}"
            ) from None

    def take_several(self, listen: str, count: int) -> list[str]:
        """Reserve so many addresses: the given port and those after it, or any free ones where it is 0.

        Raises what `take` raises.
        """
        host, port = parse_address(listen)
        return [self.take(f"{host}:{port + number if port else 0}") for number in range(count)]

    def close(self) -> None:
        """Release them."""
        for holder in self._held:
            holder.close()
        self._held.clear()


def parse_address(listen: str) -> tuple[str, int]:
    """The host and the port of `host:port`.

    Raises:
        ConfigError: it is none.
    """
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdecimal() or len(port) > 9:
        raise ConfigError(f"{listen!r} is no address to listen on: write host:port, for example 127.0.0.1:7443")
    if int(port) > MAX_PORT:
        raise ConfigError(f"{listen!r} is no address to listen on: a port is a number from 0 to {MAX_PORT}")
    return host, int(port)


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP port that a process listens on, at an address of this machine."""

    process: str
    pid: int
    host: str
    port: int

    @property
    def private(self) -> bool:
        """Whether this machine alone can reach it."""
        return self._address.is_loopback

    @property
    def _address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The address; an IPv4 one inside IPv6 is taken out, as Python versions judge the pair differently."""
        address = ipaddress.ip_address(self.host.partition("%")[0])
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return mapped or address

    def __str__(self) -> str:
        where = "every interface" if self._address.is_unspecified else self.host
        return f"{self.process} (process {self.pid}) on port {self.port} of {where}"


def listeners() -> list[Listener]:
    """The TCP ports on which this process and its children listen, Ray's and the workers' among them."""
    import psutil

    own = psutil.Process()
    return listeners_of((own, *own.children(recursive=True)), lambda process: "serve" if process == own else None)


def listeners_of(processes: Iterable[Any], name_of: Callable[[Any], str | None]) -> list[Listener]:
    """The TCP ports on which some processes (psutil's) listen.

    Args:
        processes: which; one that ends meanwhile is passed over.
        name_of: their names; None for that of a process's script or program.
    """
    import psutil

    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            name = name_of(process) or _name(process.name(), process.cmdline())
            found += [
                Listener(name, process.pid, connection.laddr.ip, connection.laddr.port)
                for connection in process.net_connections(kind="tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
    return found


def _name(name: str, command: list[str]) -> str:
    """The name of a process; of a Python process, that of its script."""
    script = next((word for word in command if word.endswith(".py")), "")
    return Path(script).stem if script and name.startswith("python") else name


class PortWatch:
    """Warns the operator once of each port that other machines can reach and that the operator has not chosen.

    Args:
        announced: ports that the operator has chosen.
        say: prints a line for the operator.
        look_up: returns the ports that are listened on now.
    """

    def __init__(
        self, announced: Iterable[int], say: Callable[[str], object], look_up: Callable[[], list[Listener]] = listeners
    ) -> None:
        self._known = set(announced)
        self._say, self._look_up = say, look_up

    def first_check(self) -> None:
        """Print the ports that only this machine can reach, in one line, and warn of the others as `check` does."""
        private = [each for each in self._look_up() if each.private and each.port not in self._known]
        if private:
            ports = ", ".join(f"{each.process} {each.port}" for each in sorted(private, key=lambda each: each.port))
            self._say(f"Ray listens for this machine alone, on ports of the loopback: {ports}")
        self.check()

    def check(self) -> None:
        """Warn of ports that are new; to be called now and then."""
        for each in self._look_up():
            if not each.private and each.port not in self._known:
                self._known.add(each.port)
                self._say(f"other machines can reach {each}: keep it behind a firewall")
