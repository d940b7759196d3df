"""A gateway for files alone: its sessions end when their key is taken off the list, and when they are too old."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cluster.owners_folder import OwnersFolder

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.gateway import file_gateway
from isthmus.cloud.gateway.file_gateway import FileGateway
from isthmus.cloud.nodes.peers import Peers
from isthmus.cloud.session.file_store import FileStore
from isthmus.common.errors import ConnectionLostError, IsthmusError, NotEnrolledError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import AuthorizedEdges, Quota, Tenant
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity, load_issuer
from isthmus.rpc.secure_stream import SecureStream

Log = Callable[[], list[dict[str, object]]]
Ask = Callable[[], Awaitable[m.Message]]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Controller:
    """A gateway, and the keys that it lets in."""

    def __init__(self, folder: Path) -> None:
        self.owner = OwnersFolder(folder)
        self.key = Ed25519PrivateKey.generate()
        self.raw = self.key.public_key().public_bytes_raw()
        self.known = [self.raw]
        self.clock = Clock()
        self._files = folder / "model"
        self._files.mkdir()
        (self._files / "config.json").write_text("{}")

    def _edges(self) -> AuthorizedEdges:
        return AuthorizedEdges(
            {
                key: Tenant(f"worker-{number}", Fingerprint.of(key), Quota(), stage=True)
                for number, key in enumerate(self.known)
            }
        )

    def converse(self, talk: Callable[[Ask], Awaitable[None]]) -> None:
        """Run a test's part of a session, in which it asks for the list of files."""
        key = Ed25519PrivateKey.generate()
        issued = load_issuer(self.owner.folder).issue(key.public_key().public_bytes_raw(), time.time() + 3600)
        identity = WorkerIdentity(key, issued)
        store = FileStore(self._files, m.FileSet.MODEL)

        async def run() -> None:
            gateway = FileGateway(
                "tiny", "00" * 32, {m.FileSet.MODEL: lambda: store}, lambda: identity, self._edges,
                bounds=Bounds(max_session_age=100.0), clock=self.clock,
            )  # fmt: skip
            port = await gateway.start("127.0.0.1:0")
            peers = Peers(self.owner.pin, self.key)

            def asking(stream: SecureStream) -> Ask:
                async def ask() -> m.Message:
                    return (await stream.ask(m.FetchList(m.FileSet.MODEL), 10.0, 0)).message

                return ask

            try:
                async with peers._session(f"127.0.0.1:{port}") as stream:
                    await talk(asking(stream))
            finally:
                await gateway._server.stop(0)

        asyncio.run(run())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_gateway, "REVIEW_SECONDS", 0.01)


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return Controller(tmp_path)


async def ended(ask: Ask) -> IsthmusError:
    """Ask until the session is ended. Returns what the worker is told."""
    async with asyncio.timeout(10):
        while True:
            try:
                assert isinstance(await ask(), m.FileList)
            except IsthmusError as error:
                return error
            await asyncio.sleep(0.01)


def test_a_session_ends_once_its_key_is_taken_off_the_list(controller: Controller, log: Log) -> None:
    async def talk(ask: Ask) -> None:
        assert isinstance(await ask(), m.FileList)
        controller.known.clear()
        assert isinstance(await ended(ask), ConnectionLostError)

    controller.converse(talk)
    closed = [line["ending"] for line in log() if line["event"] == "session_closed"]
    assert closed == ["this key is no longer enrolled"]
    with pytest.raises(NotEnrolledError):
        controller.converse(talk)


def test_an_idle_session_ends_as_well(controller: Controller, log: Log) -> None:
    async def talk(ask: Ask) -> None:
        controller.known.clear()
        async with asyncio.timeout(10):
            while not [line for line in log() if line["event"] == "session_closed"]:
                await asyncio.sleep(0.01)

    controller.converse(talk)


def test_a_session_ends_at_its_greatest_age(controller: Controller, log: Log) -> None:
    async def talk(ask: Ask) -> None:
        controller.clock.now = 99.0
        await asyncio.sleep(0.1)
        assert isinstance(await ask(), m.FileList)
        controller.clock.now = 100.0
        assert isinstance(await ended(ask), ConnectionLostError)

    controller.converse(talk)
    closed = [line["ending"] for line in log() if line["event"] == "session_closed"]
    assert closed == ["the session has reached its greatest age"]


def test_a_session_goes_on_when_other_keys_come_and_go(controller: Controller) -> None:
    async def talk(ask: Ask) -> None:
        assert isinstance(await ask(), m.FileList)
        controller.known.insert(0, bytes(32))  # which gives this one another name
        await asyncio.sleep(0.1)
        assert isinstance(await ask(), m.FileList)

    controller.converse(talk)
