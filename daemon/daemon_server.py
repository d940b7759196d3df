"""The daemon's process: its parts put together, on a TCP address and a Unix socket, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI
from starlette.concurrency import run_in_threadpool

from isthmus.common.errors import ConfigError, DiskError, IsthmusError, PortInUseError
from isthmus.common.files import write_atomic
from isthmus.daemon.daemon_lock import occupied
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_service import JobService
from isthmus.daemon.openai import openai_routes
from isthmus.daemon.page import jobs_api, page_routes
from isthmus.daemon.serving.answers import Answers
from isthmus.daemon.set_aside import move_unknown, remove_old
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import first_owner
from isthmus.daemon.tinker import tinker_routes
from isthmus.daemon.web.access import is_loopback, urls
from isthmus.daemon.web.application import application
from isthmus.daemon.web.connections import HEAD_BYTES, KEEP_ALIVE_SECONDS, BoundedConnection
from isthmus.daemon.web.context import UNIX_SOCKET, Context

log = logging.getLogger("isthmus.daemon")

GRACE_SECONDS = 5
"""What answers that stream have, when the daemon is told to stop."""
ASK_EVERY = 5.0
"""Seconds between two questions to the process that answers, how it is."""
LOOK_EVERY = 60.0
"""Seconds between two looks at what the clouds serve."""
SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket (`sun_path` without its final zero; unix(7))."""


@dataclass(frozen=True, slots=True)
class Started:
    """What the start message says.

    Attributes:
        url: Where the APIs and the page are.
        clouds: Names of those in daemon.toml.
        remote: Whether other machines can connect.
        code: Signs in to the page, once (`isthmus.daemon.tokens.SignInCode`).
    """

    url: str
    home: Home
    clouds: list[str]
    remote: bool
    code: str


def routers() -> list[APIRouter]:
    """Those of all APIs."""
    return [openai_routes.router(), tinker_routes.router(), page_routes.router(), jobs_api.router()]


def make_context(settings: DaemonSettings, home: Home) -> Context:
    """The parts of a daemon.

    Raises:
        StateError: The database is damaged, or of a newer release.
        KeyFileError: The token's file is damaged, or others may read it.
        OwnershipError: The token's file is another user's.
        DiskError: The home cannot be written.
    """
    database = Database(home.database)
    first_owner(database, home.token)
    room = DiskRoom(home.path, settings.disk_gib)
    jobs = JobService(settings, home, database, room)
    return Context(settings, home, database, jobs, Answers(settings, home, database), room)


def run(
    settings: DaemonSettings,
    home: Home,
    ready: Callable[[Started], None],
    make: Callable[[DaemonSettings, Home], Context] = make_context,
) -> None:
    """Serve until Ctrl-C or SIGTERM: answers that stream have a short while then, and jobs are paused.

    Args:
        settings: What the owner decides.
        home: The daemon's folder.
        ready: Called once the daemon answers.
        make: What puts the parts together.

    Raises:
        ConfigError: The address is one that other machines reach, and it is not allowed or without TLS.
        HomeInUseError: Another daemon has the home.
        PortInUseError: The address is taken.
        IsthmusError: Another one that `make` raises.
    """
    check_address(settings)
    with occupied(home), _temporary_files(home):
        context = make(settings, home)
        try:
            move_unknown(home, context.database)
            remove_old(home, settings.keep_days)
            with contextlib.ExitStack() as stack:
                tcp = stack.enter_context(contextlib.closing(_listen(settings)))
                unix = stack.enter_context(_listen_unix(home.socket))
                _raise_file_limit(settings)
                asyncio.run(_serve(context, tcp, unix, ready))
        finally:
            context.database.close()


def check_address(settings: DaemonSettings) -> None:
    """Refuse an address that other machines reach, unless the owner has said so and there is TLS.

    Raises:
        ConfigError: It is refused; the message says what it would mean.
    """
    host, _ = settings.address
    if is_loopback(host):
        return
    if not settings.allow_remote or settings.tls_cert is None:
        raise ConfigError(
            f"listen = {settings.listen!r} lets other machines connect, so prompts, training data and answers cross "
            "the network: give tls_cert, tls_key and allow_remote = true in daemon.toml, or listen on 127.0.0.1"
        )


async def _serve(context: Context, tcp: socket.socket, unix: socket.socket, ready: Callable[[Started], None]) -> None:
    settings, home = context.settings, context.home
    app = application(context, routers())
    server = _Server(_config(app, settings), unix)

    def told() -> None:
        host, port = tcp.getsockname()[:2]
        if settings.hosts and not is_loopback(host):
            host = settings.hosts[0]  # what the certificate is for, unlike 0.0.0.0
        (url,) = urls([(host, port)], tls=settings.tls_cert is not None)
        code = context.sign_in.make()
        # For the command that has started this process: the file is as private as the token's.
        record = {"pid": os.getpid(), "url": url, "started": time.time(), "code": code}
        write_atomic(home.running, json.dumps(record).encode(), 0o600)
        log.info("process %d answers at %s", os.getpid(), url)
        ready(Started(url, home, sorted(settings.clouds), not is_loopback(settings.address[0]), code))

    server.told = told

    def end(*_: object) -> None:
        server.should_exit = True

    # Uvicorn takes signals over once it serves, and at its end raises the one that ended it once more.
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        async with working(app):
            await server.serve(sockets=[tcp])
    finally:
        home.running.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _config(app: FastAPI, settings: DaemonSettings) -> uvicorn.Config:
    most = {"most": 2 * settings.requests_at_once}
    return uvicorn.Config(
        app,
        http=type("Connection", (BoundedConnection,), most),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        h11_max_incomplete_event_size=HEAD_BYTES,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


class _Server(uvicorn.Server):
    """Uvicorn's server, on a Unix socket besides, where there is no TLS."""

    told: Callable[[], None]

    def __init__(self, config: uvicorn.Config, unix: socket.socket) -> None:
        super().__init__(config)
        self._unix = unix

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer on both."""
        await super().startup(sockets)

        def connection() -> asyncio.Protocol:
            kind: Any = self.config.http_protocol_class
            made: asyncio.Protocol = kind(
                config=self.config, server_state=self.server_state, app_state={UNIX_SOCKET: True}
            )
            return made

        loop = asyncio.get_running_loop()
        self.servers.append(await loop.create_unix_server(connection, sock=self._unix, backlog=self.config.backlog))
        self.told()


@contextlib.asynccontextmanager
async def working(app: FastAPI) -> AsyncIterator[None]:
    """Keep the parts that work by themselves at work while the block runs, and the routers' own (their `lifespan`)."""
    context: Context = app.state.context
    await run_in_threadpool(context.jobs.start)
    tasks = [asyncio.create_task(_note(context)), asyncio.create_task(_look(context))]
    try:
        async with app.router.lifespan_context(app):
            yield
    finally:
        log.info("stopping: answers end, and jobs pause at their next micro-batch")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await run_in_threadpool(context.jobs.stop)
        await context.answers.stop()
        log.info("stopped")


async def _note(context: Context) -> None:
    """Ask the process that answers how it is, again and again."""
    away: set[str] = set()
    while True:
        try:
            state = await context.answers.state()
            context.noted.answers = {**state, "asked_at": time.time()}
            _log_changes(state, away)
        except IsthmusError as error:
            log.warning("the process that answers does not say how it is: %s", error)
        except Exception:  # a defect is logged, and the next time may go well
            log.exception("the process that answers was not asked how it is")
        await asyncio.sleep(ASK_EVERY)


def _log_changes(state: Mapping[str, Any], away: set[str]) -> None:
    """Log which clouds have gone, and which are back; `away` has the names of those that were logged as gone."""
    for cloud in state.get("clouds", []):
        name = cloud["name"]
        if cloud["reachable"] is False and name not in away:
            away.add(name)
            log.warning("the cloud %s is away: %s", name, cloud["error"])
        elif cloud["reachable"] and name in away:
            away.remove(name)
            log.info("the cloud %s is back", name)


async def _look(context: Context) -> None:
    """Look at what the clouds serve, again and again."""
    while context.settings.clouds:
        try:
            await context.answers.look()
        except IsthmusError as error:
            log.warning("the clouds were not looked at: %s", error)
        except Exception:  # as above
            log.exception("the clouds were not looked at")
        await asyncio.sleep(LOOK_EVERY)


def _listen(settings: DaemonSettings) -> socket.socket:
    host, port = settings.address
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"listen = {settings.listen!r}: there is no address {host!r} ({error.strerror})") from error
    listening = socket.socket(family, kind, number)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise PortInUseError(
            f"{settings.listen} cannot be listened on ({error.strerror}): stop what uses it, or give another --listen"
        ) from error
    return listening


@contextlib.contextmanager
def _listen_unix(path: Path) -> Iterator[socket.socket]:
    """The Unix socket, which its user alone may use. What a killed daemon has left is replaced."""
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise ConfigError(
            f"{path} is longer than a socket's path may be ({SOCKET_PATH_BYTES} bytes): give a shorter --home"
        )
    path.unlink(missing_ok=True)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listening:
        try:
            listening.bind(str(path))
            path.chmod(0o600)
        except OSError as error:
            raise DiskError(f"the socket {path} cannot be made ({error.strerror}): give another --home") from error
        try:
            yield listening
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary_files(home: Home) -> Iterator[None]:
    """Keep temporary files, such as uploads on their way, in the home: it is private, and their size counts."""
    shutil.rmtree(home.uploads, ignore_errors=True)
    home.uploads.mkdir(mode=0o700, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(home.uploads)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _raise_file_limit(settings: DaemonSettings) -> None:
    """Allow as many open files as connections may take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 4 * settings.requests_at_once + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
