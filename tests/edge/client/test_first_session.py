"""The first session with a cloud whose connection string names several places: which are tried, and what is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cloud.memory_cloud import MemoryCloud, MemoryTransport, messages
from support.protocol.wire import EDGE, NOW, PIN

from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import (
    ConnectionLostError,
    DrainingError,
    FingerprintError,
    IsthmusError,
    NotEnrolledError,
    TooManySessionsError,
    UnreachableError,
    VersionError,
)
from isthmus.edge.client import link as link_module, session_keeper
from isthmus.edge.client.link import CONNECT_SECONDS, PLACE_SECONDS, Link, connect
from isthmus.edge.config.client_config import ClientConfig
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import ConnectionString, Tenant
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.rpc.transport import Stream

Becomes = Callable[[MemoryCloud], None]


class Places:
    """Places of one cloud, each with a worker of its own.

    Args:
        becomes: What each of the workers is; they are at a:1, b:1, c:1, …

    Attributes:
        tried: Where a stream was asked for, in order.
    """

    def __init__(self, served: Served, *becomes: Becomes) -> None:
        self.tried: list[str] = []
        self.clouds: dict[str, MemoryCloud] = {}
        for letter, become in zip("abcdefghijklmnop", becomes, strict=False):
            self.clouds[f"{letter}:1"] = MemoryCloud(served)
            become(self.clouds[f"{letter}:1"])

    def reach(self, address: str, opening: Callable[[], None] = lambda: None) -> MemoryTransport:
        """A transport to a place. `opening` is called where a stream is asked for."""
        tried = self.tried

        class Place(MemoryTransport):
            async def open(self) -> Stream:
                tried.append(address)
                opening()
                return await super().open()

        return Place(self.clouds[address])

    def link(self, pin: Fingerprint = PIN, **options: Any) -> Link:
        first, *further = self.clouds
        return Link(self.reach(first), pin, EDGE, name=first, reach=self.reach, further=further, **options)


def refuse_with(error: Exception) -> Becomes:
    def refuse(key: bytes) -> Tenant:
        raise error

    def become(cloud: MemoryCloud) -> None:
        cloud.authorize = refuse

    return become


def healthy(cloud: MemoryCloud) -> None:
    pass


def expired(cloud: MemoryCloud) -> None:
    cloud.not_after = NOW


def answers_nonsense(cloud: MemoryCloud) -> None:
    cloud.answer = lambda message: m.Pong(1, 1)


def sends_to(address: str) -> Becomes:
    """It takes an edge only that has settled, and sends any other one to an address."""

    def answer(message: m.Message) -> m.Message | None:
        sent = isinstance(message, m.Attach) and not message.settled
        return m.Workers((address,), address) if sent else None

    def become(cloud: MemoryCloud) -> None:
        cloud.answer = answer

    return become


def is_full(cloud: MemoryCloud) -> None:
    cloud.answer = lambda message: m.Status(m.StatusCode.OVER_QUOTA, None, "one session is allowed")


drains = refuse_with(DrainingError("it drains"))
is_lost = refuse_with(ConnectionLostError("cut"))
knows_nobody = refuse_with(NotEnrolledError("not enrolled"))


# What one place says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [expired, drains, is_full])
def test_a_new_edge_goes_on_to_the_next_place(shared: Served, no_waiting: list[float], first: Becomes) -> None:
    places = Places(shared, first, healthy, healthy)
    link = places.link()
    link.open(5)
    assert places.tried == ["a:1", "b:1"]
    assert len(messages(places.clouds["b:1"], m.Attach)) == 1
    assert no_waiting == []  # somebody else is asked: that needs no pause


@pytest.mark.usefixtures("no_waiting")
def test_a_new_edge_goes_on_from_a_place_of_another_version(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(shared, healthy, healthy)
    opened = session_keeper.SecureStream.open

    async def open_stream(*args: Any, **options: Any) -> session_keeper.SecureStream:
        if places.tried == ["a:1"]:
            raise VersionError("it speaks version 9")
        return await opened(*args, **options)

    monkeypatch.setattr(session_keeper.SecureStream, "open", open_stream)
    places.link().open(5)
    assert places.tried == ["a:1", "b:1"]


@pytest.mark.usefixtures("no_waiting")
def test_a_new_edge_goes_on_from_a_place_that_breaks_the_protocol_again_and_again(shared: Served) -> None:
    places = Places(shared, answers_nonsense, healthy)
    places.link().open(5)
    assert places.tried == ["a:1"] * session_keeper.PROTOCOL_FAULTS + ["b:1"]


@pytest.mark.usefixtures("no_waiting")
def test_a_place_that_would_send_the_edge_where_it_was_in_vain_takes_it(shared: Served) -> None:
    places = Places(shared, expired, sends_to("a:1"))
    places.link().open(5)
    assert places.tried == ["a:1", "b:1", "a:1", "b:1"]


# What is said where none gives a session ------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("becomes", "error"),
    [
        ((is_lost, drains, expired), DrainingError),
        ((expired, drains, is_lost), FingerprintError),
        ((is_lost, is_lost, is_full), TooManySessionsError),
    ],
)
def test_the_first_place_that_says_why_has_the_word(
    shared: Served, becomes: Sequence[Becomes], error: type[IsthmusError]
) -> None:
    places = Places(shared, *becomes)
    with pytest.raises(error):
        places.link().open(5)
    assert places.tried == ["a:1", "b:1", "c:1"]


@pytest.mark.usefixtures("no_waiting")
def test_another_root_key_at_all_places_is_an_error_of_the_fingerprint(shared: Served) -> None:
    other = Fingerprint.of(Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    places = Places(shared, healthy, healthy, healthy)
    with pytest.raises(FingerprintError):
        places.link(other).open(5)
    assert places.tried == ["a:1", "b:1", "c:1"]
    assert not any(cloud.seen for cloud in places.clouds.values())


@pytest.mark.usefixtures("no_waiting")
def test_an_edge_that_is_not_enrolled_is_told_so(shared: Served) -> None:
    places = Places(shared, expired, knows_nobody, healthy)
    with pytest.raises(NotEnrolledError):
        places.link().open(5)
    assert places.tried == ["a:1", "b:1"]  # the list is the cloud's: another worker has the same


@pytest.mark.usefixtures("no_waiting")
def test_what_a_place_said_before_the_first_session_is_not_said_of_a_later_loss(shared: Served) -> None:
    places = Places(shared, expired, healthy)

    def cut(message: m.Message) -> m.Message | None:
        if isinstance(message, m.Ping):
            for cloud in places.clouds.values():
                is_lost(cloud)
            raise ConnectionLostError("cut")
        return None

    places.clouds["b:1"].answer = cut
    link = places.link(give_up_after=3)
    with pytest.raises(UnreachableError, match="for 3 s"):
        link._keeper.ask(m.Pong, m.Ping(0))
    assert link.traffic.sessions == 1


# How long it takes ----------------------------------------------------------------------------------------------------


def connect_to(
    places: Places, silent: Sequence[str], no_waiting: list[float], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """Connect to places of which some drop packets, each for as long as its transport waits."""

    def transport(address: str, _tls: object, timeout: float, _keepalive: float) -> MemoryTransport:
        def drop() -> None:
            if address in silent:
                no_waiting.append(timeout)
                raise ConnectionLostError(f"no answer from {address}")

        return places.reach(address, drop)

    monkeypatch.setattr(link_module, "GrpcTransport", transport)
    monkeypatch.setattr(link_module, "load_edge", lambda path: EDGE)
    first, *others = places.clouds
    connect(str(ConnectionString(first[0], 1, PIN, others=tuple(others))), **options).close()


@pytest.mark.parametrize("count", [3, 16])
def test_places_that_drop_packets_leave_time_for_the_last_one(
    shared: Served, no_waiting: list[float], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    places = Places(shared, *[healthy] * count)
    *silent, last = places.clouds
    connect_to(places, silent, no_waiting, monkeypatch)
    assert places.tried == [*silent, last]
    assert no_waiting == [PLACE_SECONDS] * (count - 1)


@pytest.mark.parametrize(("seconds", "tried"), [(8.0, ["a:1", "b:1"]), (12.0, ["a:1", "b:1", "c:1"])])
def test_a_time_that_was_given_holds_for_all_places_together(
    shared: Served,
    no_waiting: list[float],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    tried: list[str],
) -> None:
    places = Places(shared, *[healthy] * 4)
    with pytest.raises(UnreachableError, match=f"for {seconds:.0f} s"):
        connect_to(places, list(places.clouds), no_waiting, monkeypatch, connect_timeout=seconds)
    assert places.tried == tried


def test_what_a_place_has_said_is_not_lost_where_the_time_ends_at_the_next(
    shared: Served, no_waiting: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(shared, expired, healthy, healthy)
    with pytest.raises(FingerprintError):
        connect_to(places, ["b:1"], no_waiting, monkeypatch, connect_timeout=3.0)
    assert places.tried == ["a:1", "b:1"]


def test_a_command_waits_by_default_as_connect_does() -> None:
    assert ClientConfig.model_fields["connect_timeout"].default == CONNECT_SECONDS
