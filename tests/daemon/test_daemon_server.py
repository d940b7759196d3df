"""The daemon's process: real sockets, one for each home, and what `kill -9` leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Request
from support.daemon.daemon_parts import NoAnswers, NoJobs, make_parts
from support.daemon.running_daemon import RunningDaemon, running_daemon

from isthmus.common.errors import ConfigError, HomeInUseError, NotRunningError, OwnershipError, PortInUseError
from isthmus.daemon import daemon_server as server
from isthmus.daemon.daemon_client import DaemonClient, RefusedRequestError
from isthmus.daemon.daemon_lock import holder, occupied
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.web.application import application
from isthmus.daemon.web.connections import HEAD_BYTES, BoundedConnection
from isthmus.daemon.web.context import Context, over_unix_socket

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon") / "home") as running:
        yield running


def test_it_answers_on_an_address_and_a_socket_and_ends_cleanly(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "home") as daemon:
        said = daemon.get("/isthmus/v1/status").json()
        assert said["pid"] == daemon.process.pid
        over_unix = DaemonClient(daemon.home).get("/isthmus/v1/status")
        assert over_unix["pid"] == said["pid"]
        assert stat_of(daemon.home.socket) == 0o600
        record = json.loads(daemon.home.running.read_bytes())
        assert (record["pid"], record["url"]) == (daemon.process.pid, daemon.url)
        assert holder(daemon.home) == daemon.process.pid
        _send_wrong_things(daemon)
        assert daemon.end(signal.SIGTERM) == "ended\n"
        assert daemon.process.returncode == 0
        assert not daemon.home.socket.exists()
        assert not daemon.home.running.exists()
        assert holder(daemon.home) is None
        text = daemon.home.log.read_text()
        assert "Invalid HTTP request" in text
        assert "w" * 43 not in text
        assert daemon.token not in text


def _send_wrong_things(daemon: RunningDaemon) -> None:
    wrong = {"Authorization": f"Bearer tml-{'w' * 43}"}
    assert httpx.get(f"{daemon.url}/v1/models", headers=wrong, trust_env=False).status_code == 401
    with socket.create_connection(("127.0.0.1", int(daemon.url.rpartition(":")[2]))) as client:
        client.sendall(b"no HTTP\r\n\r\n")
        assert b"400" in client.recv(100)


def stat_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_socket_asks_for_the_token_too(daemon: RunningDaemon) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.home.socket))) as client:
        assert client.get("http://localhost/isthmus/v1/status").status_code == 401
        assert client.get("http://localhost/healthz").status_code == 200
        assert client.get("http://evil.example/healthz").status_code == 403


def test_a_connection_that_was_reset_is_none_of_the_unix_socket(tmp_path: Path) -> None:
    """It has no address either. It waits, reset, before the server begins, so that the server sees nothing else."""
    seen: dict[str, tuple[bool, bool]] = {}

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        seen[scope["path"]] = (scope["client"] is None, await over_unix_socket(Request(scope)))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    def ask(client: socket.socket, path: str, *, reset: bool = False) -> None:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

    async def serve(serving: server._Server, tcp: socket.socket) -> None:
        serving.told = lambda: None
        task = asyncio.create_task(serving.serve(sockets=[tcp]))
        async with asyncio.timeout(30):
            while len(seen) < 3:
                await asyncio.sleep(0)
        serving.should_exit = True
        await task

    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        server._listen_unix(tmp_path / "s") as unix,
        socket.create_connection(tcp.getsockname()) as reset,
        socket.create_connection(tcp.getsockname()) as whole,
        socket.socket(socket.AF_UNIX) as owners,
    ):
        unix.listen()
        owners.connect(str(tmp_path / "s"))
        ask(reset, "/reset", reset=True)
        ask(whole, "/whole")
        ask(owners, "/owners")
        any_app: Any = app
        asyncio.run(serve(server._Server(server._config(any_app, DaemonSettings()), unix), tcp))
    assert seen == {"/reset": (True, False), "/whole": (False, False), "/owners": (True, True)}


def test_the_serving_process_imports_neither_torch_nor_grpc() -> None:
    code = (
        "import sys, isthmus.daemon.daemon_server as server; server.routers(); "
        "print([name for name in ('torch', 'grpc', 'transformers', 'peft', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_after_a_kill_it_starts_anew_with_the_same_token(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "home") as daemon:
        token = daemon.token
        (daemon.home.uploads / "half").write_bytes(b"an upload on its way")
        daemon.end(signal.SIGKILL)
        assert daemon.home.socket.exists()
        with pytest.raises(NotRunningError, match="no daemon runs"):
            DaemonClient(daemon.home).get("/isthmus/v1/status")
        with running_daemon(tmp_path / "home") as again:
            assert again.token == token
            assert again.get("/isthmus/v1/status").status_code == 200
            assert list(again.home.uploads.iterdir()) == []


def _healthy(client: socket.socket) -> bool:
    """Whether the daemon answers over a connection, which stays open."""
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += client.recv(1 << 16)
    return answer.startswith(b"HTTP/1.1 200")


def test_there_are_twice_as_many_connections_as_requests_may_be_under_way(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path / "home", "requests_at_once = 8\n") as daemon,
        contextlib.ExitStack() as stack,
    ):
        at = ("127.0.0.1", int(daemon.url.rpartition(":")[2]))
        clients = []
        for number in range(17):
            clients.append(stack.enter_context(socket.create_connection(at, timeout=5)))
            if number < 16:  # it is known once it is answered
                assert _healthy(clients[-1])
        assert clients[0].recv(1) == b""  # the one that rests longest
        for client in clients[1:]:
            assert _healthy(client)


def test_the_bounds_of_heads_and_connections_are_passed_on(tmp_path: Path) -> None:
    context = make_parts(DaemonSettings(requests_at_once=9), Home.make(tmp_path / "home"))
    config = server._config(application(context, []), context.settings)
    config.load()
    kind: Any = config.http_protocol_class
    assert (kind.most, config.h11_max_incomplete_event_size) == (18, HEAD_BYTES)
    assert issubclass(kind, BoundedConnection)
    context.database.close()


def test_a_second_daemon_of_a_home_is_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    settings = DaemonSettings(listen="127.0.0.1:0")
    with pytest.raises(HomeInUseError, match=f"process {daemon.process.pid} runs the daemon"):
        server.run(settings, daemon.home, lambda _: None, make_parts)
    assert daemon.get("/healthz").status_code == 200  # and the first one is none the worse
    assert daemon.home.running.exists()
    assert daemon.home.socket.exists()
    for _ in range(2):
        with occupied(Home.make(tmp_path / "other")):
            pass


def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PortInUseError, match=listen):
            server.run(DaemonSettings(listen=listen), Home.make(tmp_path / "home"), lambda _: None, make_parts)


def test_a_socket_whose_path_is_too_long_is_refused(tmp_path: Path) -> None:
    home = Home.make(tmp_path / ("x" * 100))
    with pytest.raises(ConfigError, match="shorter --home"):
        server.run(DaemonSettings(listen="127.0.0.1:0"), home, lambda _: None, make_parts)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "box.lan:0"])
@pytest.mark.parametrize("more", [{}, {"allow_remote": True}, {"tls_cert": "c", "tls_key": "k"}])
def test_an_address_for_others_needs_leave_and_tls(listen: str, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cross the network"):
        server.check_address(DaemonSettings.model_validate({"listen": listen, **more}))


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", "[::1]:0", "127.3.4.5:0"])
def test_an_address_of_this_machine_alone_needs_neither(listen: str) -> None:
    server.check_address(DaemonSettings(listen=listen))


def test_an_address_for_others_with_leave_and_tls_is_taken() -> None:
    whole = {"listen": "0.0.0.0:0", "allow_remote": True, "tls_cert": "c", "tls_key": "k"}
    server.check_address(DaemonSettings.model_validate(whole))


def test_with_tls_the_address_speaks_it_and_the_socket_does_not(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *more], check=True, capture_output=True)
    with running_daemon(tmp_path / "home", f'tls_cert = "{cert}"\ntls_key = "{key}"\n') as daemon:
        assert daemon.url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(cert))
        assert daemon.get("/isthmus/v1/status", verify=trusted).status_code == 200
        with pytest.raises(httpx.ConnectError):
            daemon.get("/healthz")
        assert DaemonClient(daemon.home).get("/isthmus/v1/status")["pid"] == daemon.process.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    class Slow(NoJobs):
        def start(self) -> None:
            super().start()
            os.kill(os.getpid(), number)

    jobs = Slow()

    def make(settings: DaemonSettings, home: Home) -> Context:
        context = make_parts(settings, home)
        object.__setattr__(context, "jobs", jobs)
        return context

    home = Home.make(tmp_path / "home")
    server.run(DaemonSettings(listen="127.0.0.1:0"), home, lambda _: None, make)
    assert jobs.calls == ["start", "stop"]
    assert not home.running.exists()


def test_a_home_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    Home.make(tmp_path / "home")
    for mode in (0o750, 0o701):
        (tmp_path / "home").chmod(mode)
        with pytest.raises(OwnershipError, match=f"mode {mode:04o}.*chmod 700"):
            Home.make(tmp_path / "home")
    (tmp_path / "home").chmod(0o700)
    Home.make(tmp_path / "home")


def test_the_log_says_when_a_cloud_goes_and_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    away: set[str] = set()
    for reachable in (None, True, False, False, None, True, True, False):
        cloud = {"name": "main", "reachable": reachable, "error": "no route" if reachable is False else None}
        server._log_changes({"clouds": [cloud]}, away)
    gone, back = "the cloud main is away: no route", "the cloud main is back"
    assert [record.getMessage() for record in caplog.records] == [gone, back, gone]


def test_a_client_that_sends_too_much_learns_why(daemon: RunningDaemon) -> None:
    """Instead of a broken connection."""
    headers = {"X-API-Key": daemon.token}
    refused = httpx.post(f"{daemon.url}/nothing", content=bytes(64 << 20), headers=headers, trust_env=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    assert daemon.get("/healthz").status_code == 200


def test_what_a_client_asks_over_the_socket_is_told_or_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    client = DaemonClient(daemon.home)
    assert client.get("/healthz") == {"status": "ok"}
    with pytest.raises(RefusedRequestError, match="nothing at this path"):
        client.post("/nothing", {"a": 1})
    with pytest.raises(NotRunningError, match="no daemon runs"):
        DaemonClient(Home(tmp_path / "nowhere")).get("/healthz")


def test_the_parts_begin_and_end_with_the_daemon_and_a_defect_of_one_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cloud = {"main": {"cloud": "isthmus://c:1#SHA256:x"}}
    context = make_parts(DaemonSettings.model_validate({"clouds": cloud}), Home.make(tmp_path / "home"))
    seen: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(_app: Any) -> Any:
        seen.append("begin")
        yield
        seen.append("end")

    class Broken(NoAnswers):
        async def look(self) -> None:
            raise KeyError("a defect")

    answers = Broken()
    object.__setattr__(context, "answers", answers)

    async def run() -> None:
        async with server.working(application(context, [APIRouter(lifespan=lifespan)])):
            while "asked_at" not in context.noted.answers or "a defect" not in caplog.text:
                await asyncio.sleep(0)
            seen.append("working")

    asyncio.run(run())
    jobs: Any = context.jobs
    assert isinstance(jobs, NoJobs)
    assert jobs.calls == ["start", "stop"]
    assert answers.calls == ["state", "stop"]
    assert seen == ["begin", "working", "end"]
    context.database.close()
