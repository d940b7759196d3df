"""What may be wrong with a daemon and what is around it, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sqlite3
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.common.errors import ConfigError, IsthmusError
from isthmus.common.ownership import check_private
from isthmus.common.readable import size
from isthmus.daemon.cloud_check import check_clouds
from isthmus.daemon.daemon_client import DaemonClient
from isthmus.daemon.daemon_lock import holder
from isthmus.daemon.daemon_server import check_address
from isthmus.daemon.daemon_settings import EXPORT_NO_PROXY, DaemonSettings
from isthmus.daemon.disk_room import taken
from isthmus.daemon.home import Home
from isthmus.daemon.settings_file import read_daemon_settings
from isthmus.daemon.tokens import read_token

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_LOCAL = ("127.0.0.1", "localhost")
_ALMOST = 0.9
LEAST_FREE = 1 << 30
"""Bytes of the disk that a daemon should find: checkpoints are written beside the older ones."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What.
        ok: Whether it is as it should be.
        said: How it is.
        remedy: What to do; empty where it is ok.
    """

    check: str
    ok: bool
    said: str
    remedy: str = ""

    def line(self) -> str:
        """As a person reads it."""
        remedy = f"\n      {self.remedy}" if self.remedy else ""
        return f"{'ok   ' if self.ok else 'wrong'} {self.check}: {self.said}{remedy}"

    def tree(self) -> dict[str, Any]:
        """As a program reads it."""
        return asdict(self)


def examine(home: Home, config: Path | None, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at everything, one thing after the other.

    Args:
        home: The daemon's folder; it need not exist.
        config: Its daemon.toml; None where there is none.
        environment: The variables that clients of this shell have.
    """
    yield _versions()
    settings: DaemonSettings | None = None
    try:
        settings = read_daemon_settings(config)
        check_address(settings)
        yield Finding("settings", True, "by default" if config is None else f"{config} can be read")
    except ConfigError as error:
        yield Finding("settings", False, str(error), "mend it; `isthmus edge daemon config` prints a whole one")
    yield _home(home)
    yield _token(home)
    if settings is not None:
        yield _disk(home, settings)
        pid = holder(home)
        yield _port(settings, pid)
        yield _running(home, pid)
    yield _proxies(environment)
    if settings is not None:
        yield from _clouds(settings)


def _versions() -> Finding:
    names = ("isthmus", "fastapi", "uvicorn", "sqlalchemy")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    said = f"{found}, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"
    if sqlite3.sqlite_version_info < (3, 35):
        return Finding("versions", False, said, "use a Python with SQLite 3.35 or newer")
    return Finding("versions", True, said)


def _home(home: Home) -> Finding:
    if not home.path.exists():
        return Finding("home", True, f"{home.path} is not there yet; the first start makes it")
    try:
        check_private(home.path)
        mode = stat.S_IMODE(home.path.stat().st_mode)
    except (OSError, IsthmusError) as error:
        return Finding("home", False, str(error), f"give another --home, or make {home.path} yours alone")
    if mode & 0o077:
        return Finding("home", False, f"others may enter {home.path} (mode {mode:04o})", f"run `chmod 700 {home.path}`")
    return Finding("home", True, f"{home.path} is private")


def _token(home: Home) -> Finding:
    if not home.token.exists():
        return Finding("token", True, "not there yet; the first start makes it")
    try:
        read_token(home.token)
    except (OSError, IsthmusError) as error:
        return Finding("token", False, str(error), "see the message; removing the file and a start make a new one")
    return Finding("token", True, f"{home.token} has mode 0600")


def _disk(home: Home, settings: DaemonSettings) -> Finding:
    place = next(path for path in (home.path, *home.path.parents) if path.exists())
    used = taken(home.path) if home.path.exists() else 0
    most, free = int(settings.disk_gib * 2**30), shutil.disk_usage(place).free
    said = f"the home takes {size(used)} of {size(most)}; the disk has {size(free)} left"
    if used > _ALMOST * most:
        return Finding("disk", False, said, "delete files, models or jobs, or raise `disk_gib` in daemon.toml")
    if free < LEAST_FREE:
        return Finding("disk", False, said, "free some space")
    return Finding("disk", True, said)


def _port(settings: DaemonSettings, pid: int | None) -> Finding:
    host, port = settings.address
    if pid is not None:
        return Finding("port", True, f"the daemon (process {pid}) has its address")
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        remedy = "stop what uses it, or set `listen` in daemon.toml to another port"
        return Finding("port", False, f"{settings.listen} cannot be listened on ({error.strerror})", remedy)
    return Finding("port", True, f"{settings.listen} is free")


def _running(home: Home, pid: int | None) -> Finding:
    if pid is None:
        return Finding("daemon", True, "does not run; `isthmus edge daemon start` starts it")
    try:
        version = DaemonClient(home, timeout=10.0).get("/isthmus/v1/status")["version"]
    except IsthmusError as error:
        return Finding("daemon", False, str(error), "see `isthmus edge daemon logs`; stop it and start it anew")
    ours = importlib.metadata.version("isthmus")
    if version != ours:
        return Finding("daemon", False, f"runs release {version}, and {ours} is installed", "stop it and start it anew")
    return Finding("daemon", True, f"runs (process {pid}) and answers")


def _proxies(environment: Mapping[str, str]) -> Finding:
    """Clients with a proxy would send what they ask the daemon, as plain text, to the proxy."""
    given = {name.upper() for name, value in environment.items() if value and name.upper() in PROXY_VARIABLES}
    if not given:
        return Finding("proxy", True, "no proxy variable is set")
    named = ", ".join(sorted(given))
    # Some programs read the one, some the other; the small one wins where a program reads both.
    lists = [environment[name] for name in ("no_proxy", "NO_PROXY") if environment.get(name)]
    parts = [{part.strip() for part in text.split(",")} for text in lists]
    if parts and all("*" in part or set(_LOCAL) <= part for part in parts):
        return Finding("proxy", True, f"{named} is set, and NO_PROXY leaves this machine out")
    return Finding(
        "proxy",
        False,
        f"{named} is set, so clients would send prompts and data to the proxy",
        f"run `{EXPORT_NO_PROXY}` where your scripts start",
    )


def _clouds(settings: DaemonSettings) -> Iterator[Finding]:
    if not settings.clouds:
        remedy = "add a table [clouds.NAME] to daemon.toml; `isthmus edge daemon config` shows one"
        yield Finding("clouds", False, "none is known, so there is no model", remedy)
        return
    for name, said in check_clouds(settings.clouds).items():
        if "message" in said:
            yield Finding(f"cloud {name}", False, said["message"], _remedy(said["code"], name))
        else:
            yield Finding(f"cloud {name}", True, f"serves {said['model']} ({said['plan']}), and takes the key")


def _remedy(code: int, name: str) -> str:
    match code:
        case 10:
            return (
                f"set what the message names in [clouds.{name}] of daemon.toml: `cloud` is the connection string that "
                "the cloud's owner gives, or the path of a file that holds it"
            )
        case 30:
            return (
                "make a key with `isthmus edge keygen`, set `key` of this cloud in daemon.toml, or do what the message "
                "says"
            )
        case 32:
            return "send the .pub file to the cloud's owner, who runs `isthmus cloud enroll`"
        case 31:
            return "do not go on: ask the cloud's owner for the connection string"
        case 40 | 43:
            return "check the address, and that the cloud runs and can be reached from here"
    return f"docs/exit-codes.md says more about code {code}"
